# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""How kernels address the rows of ``[B, H, S, D]`` tensors (strides, offsets, alignment) and those of block tables.

Device code here is Triton's, and Gluon's too: vectors to count with come as arguments, for Gluon gives them a layout.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rainfusion_compile.kernels import phases

MIX = tl.constexpr(phases.MIX)
VECTOR = tl.constexpr(8)  # elements at whose multiples all rows start: 16 bytes at least

# Numbers that change with the video's size or the memory layout: never a reason to compile again.
SIZES = "patterns batch_heads heads group tokens first_run query_blocks query_tiles table_rows listed scale_log2"
MASK_STRIDES = ["stride_mb", "stride_mh", "stride_ms", "stride_fb", "stride_fh"]
RUNTIME_ARGS = [*SIZES.split(), *(f"stride_{tensor}{axis}" for tensor in "qkvo" for axis in "bhs"), *MASK_STRIDES]


@triton.jit
def bounded(index, length):
    """An index that was read, in [0, length): nothing is read or written out of bounds, whatever tables hold.

    One instruction: as an unsigned number, a negative one is a large one.
    """
    last = (length - 1).to(tl.uint32, bitcast=True)
    return tl.minimum(index.to(tl.uint32, bitcast=True), last).to(tl.int32, bitcast=True)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def dense_heads_first(choice, dense, rank, batch_heads, each):
    """The (batch, head) of this rank when the heads that stayed dense come first."""
    real = each < batch_heads
    is_dense = (tl.load(choice + each, mask=real, other=-1) == dense).to(tl.int32)
    before = tl.associative_scan(is_dense, 0, _add) - is_dense  # dense heads before this one
    place = tl.where(is_dense != 0, before, tl.sum(is_dense, 0) + each - before)
    return tl.sum(tl.where(real & (place == rank), each, 0), 0)


@triton.jit
def _mixed(drawn, number):
    """A further number's bits, without its sign, mixed into a draw: as `draws` of `kernels.phases`."""
    if number.dtype.primitive_bitwidth == 16:
        bits = number.to(tl.int16, bitcast=True).to(tl.int64) & 0x7FFF
    else:
        bits = number.to(tl.int32, bitcast=True).to(tl.int64) & 0x7FFFFFFF
    drawn = ((drawn ^ bits) * MIX) & 0xFFFFFFFF
    return drawn ^ (drawn >> 15)


@triton.jit
def sampled_blocks(q, order, tokens, stride_qs, sampled, row):
    """How many of a row's key blocks are samples, and by how many each moves for the phase that this head draws."""
    count = tl.load(sampled + 5 * row)
    q += bounded(tl.load(order + tokens // 2), tokens).to(tl.int64) * stride_qs * VECTOR
    drawn = _mixed(tl.load(q).to(tl.int64) * 0, tl.load(q))
    drawn = _mixed(_mixed(_mixed(drawn, tl.load(q + 1)), tl.load(q + 2)), tl.load(q + 3))
    return count, (drawn % tl.maximum(tl.load(sampled + 5 * row + 1), 1)).to(tl.int32)


@triton.jit
def before_listed(sampled, row):
    """How many key blocks, samples and those that the head has selected, a row reads before those that it lists."""
    selected = tl.load(sampled + 5 * row + 2)
    return tl.where(selected > 0, tl.load(sampled + 5 * row) + selected, 0)


@triton.jit
def draws_of(sampled, row):
    """How many of a row's blocks are samples, how many phases these have, and the first block of the granules."""
    return tl.load(sampled + 5 * row), tl.maximum(tl.load(sampled + 5 * row + 1), 1), tl.load(sampled + 5 * row + 3)


@triton.jit
def selected_keys(own, place, some, phase, sampled, row, of_order, blocks, BLOCK_K: tl.constexpr):
    """Where in `key_order` the keys at these places of a row stand, of those that come before the ones that it lists.

    own: the head's list for the query block; some: which places to look at; phase: by how many the samples move;
    of_order, blocks: the first block of `order` and how many there are.
    """
    count, phases, granules = draws_of(sampled, row)
    each = tl.maximum(BLOCK_K // phases, 1)
    number = tl.where(place < count * BLOCK_K, place // each, count * phases - count + place // BLOCK_K)
    block = bounded(tl.load(own + bounded(number, blocks), mask=some, other=0).to(tl.int32), blocks)
    sample = granules * BLOCK_K + (phase * blocks + block) * each + place % each
    return tl.where(place < count * BLOCK_K, sample, (of_order + block) * BLOCK_K + place % BLOCK_K)


@triton.jit
def extent(indices, last, first_run, tokens, BLOCK_K: tl.constexpr):
    """The first token of a row whose blocks are one run of memory, else -1, and how many keys it has."""
    # The last of the blocks of `order`, and of the runs that follow them, may be cut short.
    blocks = tl.cdiv(tokens, BLOCK_K)
    begin = bounded(tl.load(indices), first_run + blocks)
    end = bounded(tl.load(indices + last), first_run + blocks)
    left = tokens - (end - tl.where(end >= first_run, first_run, first_run - blocks)) * BLOCK_K
    is_run = (begin >= first_run) & (end - begin == last)
    return tl.where(is_run, (begin - first_run) * BLOCK_K, -1), last * BLOCK_K + tl.minimum(BLOCK_K, left)


class Rows(NamedTuple):
    """How a tensor lies in memory: all that launches are planned by. Strides count elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def rows_of(tensor: torch.Tensor) -> Rows:
    return Rows(tensor.shape, tensor.stride(), tensor.dtype)


def mask_rows(key_mask: torch.Tensor | None) -> Rows | None:
    return None if key_mask is None else rows_of(key_mask)


def strides_of(rows: Rows | None, axes: int) -> list[int]:
    """The first strides, in elements; 0 for axes of length 1, whose strides mean nothing, and for no tensor at all."""
    if rows is None:
        return [0] * axes
    return [0 if rows.shape[axis] == 1 else rows.strides[axis] for axis in range(axes)]


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` if its rows lie apart, are contiguous and start at multiples of 16 bytes, as in every layout that models use.

    Else a copy. (Triton 3.6 gets narrower copies to shared memory wrong where head_dim comes in two pieces.)
    """
    ok = x.data_ptr() % 16 == 0 and _in_step(x.shape, x.stride())
    return x if ok else x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache
def _in_step(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    *_, (length, step), (_, column) = zip(shape, strides, strict=True)
    if column != 1 or (length > 1 and step == 0):
        return False
    return not any(step % VECTOR.value for length, step in zip(shape[:-1], strides, strict=False) if length > 1)


def row_strides(*operands: Rows) -> tuple[list[int], tl.dtype]:
    """How to address the aligned rows of ``[B, H, S, D]`` tensors: (B, H and S strides over VECTOR, which tells the
    compiler how rows are aligned; dtype of offsets inside one head, int32 where they fit).
    """
    if operands[0].shape[-1] % VECTOR.value:
        raise ValueError(f"head_dim must be a multiple of {VECTOR.value}, got {operands[0].shape[-1]}")
    strides = [stride for rows in operands for stride in strides_of(rows, 3)]
    reach = max(rows.shape[2] * abs(rows.strides[2]) + rows.shape[3] for rows in operands)
    return [stride // VECTOR.value for stride in strides], tl.int32 if reach < 2**31 else tl.int64
