# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Key masks in Triton kernels: of which kind one is, and which keys it touches.

Padding stands at the end of most sequences, so kernels run unmasked over what it leaves alone.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from rainfusion_compile.kernels.gpu.configs import cdiv
from rainfusion_compile.kernels.gpu.launch import Launch
from rainfusion_compile.kernels.gpu.rows import Rows, bounded, rows_of, strides_of

RUNTIME_ARGS = ["length", "block", "listed", "extra", "heads", "tokens", "stride_b", "stride_h", "stride_s"]


def mask_kind(key_mask: Rows | None) -> int:
    """The kernels' MASK_KIND: 0 without a mask, 1 for a bool mask (True: attend), 2 for an additive bias."""
    return 0 if key_mask is None else 1 if key_mask.dtype == torch.bool else 2


def touched_keys(
    key_mask: torch.Tensor | None, key_order: torch.Tensor, block: int, listed: int, extra: int = 0
) -> torch.Tensor | None:
    """What a ``[B or 1, H or 1, S]`` key mask touches, hides or changes; int32 ``[B or 1, H or 1, 1 + n]``.

    First which place of ``key_order`` from `extra` to `listed` is the first that it touches. Then for each of its n
    blocks 0 if the mask touches a key there. The length of ``key_order`` stands where it touches nothing.
    """
    if key_mask is None:
        return None
    (batch, heads, _), length = key_mask.shape, key_order.shape[0]
    shape = (batch, heads, 1 + cdiv(length, block))
    touched = torch.full(shape, length, dtype=torch.int32, device=key_mask.device)
    launch = _touched_launch(rows_of(key_mask), length, block, listed, extra, key_mask.device.index)
    launch(key_mask, key_order, touched)
    return touched


def touched_strides(key_mask: Rows | None, length: int, block: int) -> tuple[int, int]:
    """B and H strides of what :func:`touched_keys` gives; 0 for axes of length 1, and without a mask."""
    if key_mask is None:
        return 0, 0
    (batch, heads, _), each = key_mask.shape, 1 + cdiv(length, block)
    return heads * each if batch > 1 else 0, each if heads > 1 else 0


@functools.lru_cache
def _touched_launch(key_mask: Rows, length: int, block: int, listed: int, extra: int, device: int | None) -> Launch:
    (batch, heads, tokens), tile = key_mask.shape, 1024
    return Launch(
        _touched_keys_kernel, (cdiv(length, tile), batch * heads, 1),
        length, block, listed, extra, heads, tokens, *strides_of(key_mask, 3), KIND=mask_kind(key_mask), TILE=tile,
    )  # fmt: skip


CHUNK = tl.constexpr(1024)  # how many of a row's key blocks are asked about at a time


@triton.jit
def touched_blocks(indices, begin, end, touched, moved, blocks, each):
    """From where to where those of a row's key blocks from `begin` to `end` are that the mask touches: (`end`, 0) if
    there are none. each: the numbers below CHUNK."""
    found, after = end, 0
    for start in range(begin, end, CHUNK):
        at = start + each
        block = bounded(tl.load(indices + at, mask=at < end, other=0) + moved, blocks)
        clear = tl.load(touched + 1 + block, mask=at < end, other=1)
        found = tl.minimum(found, tl.min(tl.where(clear == 0, at, end), 0))
        after = tl.maximum(after, tl.max(tl.where(clear == 0, at + 1, 0), 0))
    return found, after


@triton.jit
def listed_samples(indices, last, front, sampled, row, of_order):
    """How many of the blocks that a row lists are samples; they are the first. of_order: the first block of `order`."""
    some = (front == 0) & (tl.load(indices) < of_order)
    return tl.where(some, tl.minimum(tl.load(sampled + 5 * row), last + 1), 0)


@triton.jit
def touched_tiles(
    touched, clear_samples, blocks, samples, front, sampled, row, keys, of_order, BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
):  # fmt: skip
    """(first, until, begin, end): of a row's tiles, the mask may touch [first, until) and [begin, end).

    The former have samples, or blocks that the head has selected, of which any may be touched. clear_samples: how many
    of the blocks that the row lists come before the first sample that the mask touches; blocks: from where to where in
    its list the others are.
    """
    tiles = tl.cdiv(keys, TILE_K)
    free_is_touched = tl.load(touched) // BLOCK_K < tl.load(sampled + 5 * row + 4) + of_order
    clear_samples = tl.where(front > 0, tl.where(free_is_touched, 0, front), clear_samples)
    until = tl.minimum(tl.cdiv((front + samples) * BLOCK_K, TILE_K), tiles)
    begin = tl.minimum((front + blocks[0]) * BLOCK_K // TILE_K, tiles)
    end = tl.minimum(tl.cdiv((front + blocks[1]) * BLOCK_K, TILE_K), tiles)
    return clear_samples * BLOCK_K // TILE_K, until, begin, end


@triton.jit
def masked_scores(s, visible, value, MASK_KIND: tl.constexpr):
    """Scores in base-2 units [queries, keys] and which keys are visible, by what a mask holds of these keys."""
    if MASK_KIND == 1:
        visible = visible & (value != 0)
    else:
        bias = value.to(tl.float32)
        visible = visible & (bias != float("-inf"))
        # A finite bias stays finite in base-2 units: only -inf hides a key for good.
        s += (tl.maximum(bias, -2.3e38) * 1.4426950408889634)[None, :]
    return s, visible


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def _touched_keys_kernel(
    mask, key_order, touched, length, block, listed, extra, heads, tokens, stride_b, stride_h, stride_s,
    KIND: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = position < length
    token = bounded(tl.load(key_order + position, mask=inside, other=0), tokens).to(tl.int64)
    value = tl.load(mask + batch * stride_b + head * stride_h + token * stride_s)
    found = ((value == 0) if KIND == 1 else (value != 0)) & inside
    touched += tl.program_id(1).to(tl.int64) * (1 + tl.cdiv(length, block))
    tl.store(touched + 1 + position // block, tl.zeros([TILE], tl.int32), mask=found)
    least = tl.min(tl.where(found & (position >= extra) & (position < listed), position, length), 0)
    if least < length:
        tl.atomic_min(touched, least.to(tl.int32))
