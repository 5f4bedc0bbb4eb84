# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Selecting key blocks in Triton: as :mod:`rainfusion_compile.kernels.selection` does on a CPU.

Means of blocks, their products as one matrix product, then for each query block a bound that the best of its row
reach. Scores are compared as integers that rise with them, so that every row has an order, whatever it holds. One warp
for each block, and for each row unless it is long, sums up without shared memory.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rainfusion_compile.kernels.gpu.configs import cdiv, next_power_of_2
from rainfusion_compile.kernels.gpu.key_mask import mask_kind
from rainfusion_compile.kernels.gpu.launch import Launch
from rainfusion_compile.kernels.gpu.rows import (
    MASK_STRIDES,
    VECTOR,
    Rows,
    bounded,
    mask_rows,
    row_strides,
    rows_of,
    strides_of,
)
from rainfusion_compile.sparsity.block_tables import AttentionTables, ProbeTables

SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 1}
"""Bits of a float32 that say nothing of a score in this dtype (of float32, one is given up)."""
SIZES = "patterns tokens length heads group stride_b stride_h stride_s query_blocks key_blocks"
RUNTIME_ARGS = [*SIZES.split(), *MASK_STRIDES]


@triton.jit
def selects_nothing(choice, selected, patterns, batch_head):
    """Whether this (batch, head) has taken a candidate that selects no blocks."""
    pattern = tl.load(choice + batch_head)
    some = (pattern >= 0) & (pattern < patterns)
    return tl.load(selected + tl.where(some, pattern, 0), mask=some, other=0) <= 0


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def means_kernel(
    x, mask, order, which, means, choice, selected, factor, patterns, tokens, length, heads, group, stride_b, stride_h,
    stride_s, stride_mb, stride_mh, stride_ms, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, OFFSET: tl.constexpr, MASK_KIND: tl.constexpr,
):  # fmt: skip
    """One program: means[b, h, i], the mean of a block of x [B, H / group, S, D] times a factor, without tokens that
    the mask hides. Strides of x count VECTOR elements."""
    number = tl.program_id(0)
    batch_head = tl.program_id(1)
    if choice is not None:  # noqa: SIM102 (the one is known when the kernel is compiled, the other is not)
        if selects_nothing(choice, selected, patterns, batch_head):
            return
    block = number
    if which is not None:
        block = bounded(tl.load(which + number), tl.cdiv(length, BLOCK))
    row = tl.arange(0, ROWS)
    position = block * BLOCK + row
    inside = (row < BLOCK) & (position < length)
    token = bounded(tl.load(order + tl.minimum(position, length - 1)), tokens).to(OFFSET)
    if MASK_KIND != 0:
        mask += (batch_head // heads).to(tl.int64) * stride_mb + (batch_head % heads).to(tl.int64) * stride_mh
        seen = tl.load(mask + token.to(tl.int64) * stride_ms)
        inside = inside & (seen != (0 if MASK_KIND == 1 else float("-inf")))
    column = tl.arange(0, WIDTH)
    x += (
        (batch_head // heads).to(tl.int64) * stride_b + (batch_head % heads // group).to(tl.int64) * stride_h
    ) * VECTOR
    at = x + (token * stride_s * VECTOR)[:, None] + column[None, :]
    value = tl.load(at, mask=inside[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) * (factor / tl.maximum(tl.sum(inside.to(tl.float32), 0), 1.0))
    means += (batch_head.to(tl.int64) * tl.num_programs(0) + number) * D
    tl.store(means + column, mean.to(means.dtype.element_ty), mask=column < D)


@triton.jit
def rising(score, SHIFT: tl.constexpr):
    """An integer in [0, 2**31) for each score, the higher the score the larger."""
    bits = score.to(tl.float32).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((bits.to(tl.int64) + 0x80000000) >> SHIFT).to(tl.int32)


@triton.jit
def lowest_of(value, k, low, BITS: tl.constexpr):
    """A bound that the k largest of a vector of whole numbers of so many bits reach, and no others but for ties.

    Bit by bit from a bound `low` that k or more of them reach, until k do; or 0, and then 0 if not so many are >= 0.
    """
    room = tl.maximum(tl.max(value, 0).to(tl.int32) - low, 0)
    step = tl.full([], 1 << (BITS - 1), tl.int32)
    while step > room:
        step = step >> 1
    while step > 0:
        if value.dtype.is_floating():  # adders that saturate take half the time of comparing and selecting
            reach = tl.sum(tl.minimum(tl.maximum(value - (low + step - 1).to(tl.float32), 0.0), 1.0), 0).to(tl.int32)
        else:
            reach = tl.sum((value >= low + step).to(tl.int32), 0)
        low += tl.where(reach >= k, step, 0)
        step = tl.where(reach == k, 0, step >> 1)
    return low


@triton.jit
def _row(scores, free, row, key_blocks, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """The rising numbers of a row of scores, as float32 if that holds them; -1 for blocks that are not free."""
    column = tl.arange(0, WIDTH)
    real = column < key_blocks
    score = tl.load(scores + row.to(tl.int64) * key_blocks + column, mask=real, other=0.0)
    value = tl.where(tl.load(free + column, mask=real, other=0) != 0, rising(score, SHIFT), -1)
    holds: tl.constexpr = SHIFT > 8
    if holds:
        value = value.to(tl.float32)
    return value


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def select_each_kernel(
    scores, free, selected, selections, key_blocks, PATTERNS: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: selections[b, h, sample, block], a bit for every candidate by which a sample selects the block."""
    row = tl.program_id(0)
    value = _row(scores, free, row, key_blocks, SHIFT, WIDTH)
    bits = tl.zeros([WIDTH], tl.int32)
    last = tl.full([], 0x7FFFFFFF, tl.int32)
    low = tl.full([], 0, tl.int32)
    for number in range(PATTERNS - 1, -1, -1):  # most often from many to few, where each bound is one for the next
        count = tl.load(selected + number)
        if count > 0:
            low = lowest_of(value, count, tl.where(count <= last, low, 0), 32 - SHIFT)
            bits |= tl.where(value >= low, 1 << number, 0)
            last = count
    column = tl.arange(0, WIDTH)
    tl.store(selections + row.to(tl.int64) * key_blocks + column, bits, mask=column < key_blocks)


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def select_kernel(
    scores, free, choice, selected, lists, patterns, query_blocks, key_blocks, SHIFT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: lists[b, h, query block], the free blocks that are not selected, then those that are, ascending."""
    batch_head = tl.program_id(1)
    if selects_nothing(choice, selected, patterns, batch_head):
        return
    row = batch_head * query_blocks + tl.program_id(0)
    value = _row(scores, free, row, key_blocks, SHIFT, WIDTH)
    is_free = value >= 0
    count = tl.load(selected + tl.load(choice + batch_head))
    lowest = lowest_of(value, count, tl.full([], 0, tl.int32), 32 - SHIFT)
    above = value > lowest
    ties = (value == lowest).to(tl.int32)  # as many as are missing, the first ones
    taken = above | ((ties != 0) & (tl.cumsum(ties, 0) <= count - tl.sum(above.to(tl.int32), 0)))
    others = (is_free & ~taken).to(tl.int32)
    at = tl.where(taken, tl.sum(others, 0) + tl.cumsum(taken.to(tl.int32), 0), tl.cumsum(others, 0)) - 1
    column = tl.arange(0, WIDTH)
    tl.store(lists + row.to(tl.int64) * key_blocks + at, column.to(tl.int16), mask=is_free)


def means(
    x: Tensor, mask: Tensor | None, order: Tensor, block: int, selected: Tensor, heads: int, factor: float, *,
    which: Tensor | None = None, choice: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Means of each ``block`` tokens of ``order`` in the aligned rows of ``x [B, Hx, S, D]``, times a factor.

    ``[B, H, n, D]``: of all blocks or of those that ``which`` names; with ``choice``, only of heads that select blocks.
    """
    length = order.shape[0]
    count = cdiv(length, block) if which is None else which.shape[0]
    found = x.new_empty(x.shape[0], heads, count, x.shape[3])
    kind = (rows_of(x), mask_rows(mask), selected.shape[0], length, block, heads, factor, count, x.device.index)
    launch = _means_launch(*kind, named=which is not None, chosen=choice is not None)
    launch(x, mask, order, which, found, choice, selected)
    return found


@functools.lru_cache
def _means_launch(
    x: Rows, mask: Rows | None, patterns: int, length: int, block: int, heads: int, factor: float, count: int,
    device: int | None, *, named: bool, chosen: bool,
) -> Launch:  # fmt: skip
    (batch, x_heads, tokens, dim), (strides, offset) = x.shape, row_strides(x)
    return Launch(
        means_kernel, (count, batch * heads, 1),
        factor, patterns, tokens, length, heads, heads // x_heads, *strides, *strides_of(mask, 3), D=dim,
        WIDTH=next_power_of_2(dim), BLOCK=block, ROWS=next_power_of_2(block), OFFSET=offset, MASK_KIND=mask_kind(mask),
        num_warps=1,
    )  # fmt: skip


def _width(key_blocks: int) -> dict[str, int]:
    """The length of a row of scores as a vector, and the warps that hold it."""
    width = next_power_of_2(key_blocks)
    return {"WIDTH": width, "num_warps": min(max(width // 2048, 1), 16)}


def select_each(score: Tensor, tables: ProbeTables) -> Tensor:
    """int32 of the shape of ``score [B, H, n, nB]``: of each block, a bit for every candidate that selects it."""
    found = torch.empty_like(score, dtype=torch.int32)
    kind = (math.prod(score.shape[:-1]), score.shape[-1], tables.selected.shape[0], score.dtype, score.device.index)
    _select_each_launch(*kind)(score, tables.free, tables.selected, found)
    return found


@functools.lru_cache
def _select_each_launch(rows: int, key_blocks: int, patterns: int, dtype: torch.dtype, device: int | None) -> Launch:
    return Launch(
        select_each_kernel, (rows, 1, 1), key_blocks, PATTERNS=patterns, SHIFT=SHIFTS[dtype], **_width(key_blocks)
    )


def select_blocks(
    q: Tensor, k: Tensor, choice: Tensor, key_mask: Tensor | None, tables: AttentionTables, scale: float
) -> Tensor:
    """int16 ``[B, H, nQ, nB]``, of which the first numbers are the free blocks: those not selected, then the others.

    Only written for heads that select blocks.
    """
    kinds = (tables.selected, q.shape[1])
    q_means = means(q, None, tables.order, tables.block_q, *kinds, scale, choice=choice)
    k_means = means(k, key_mask, tables.order, tables.block_k, *kinds, 1.0, choice=choice)
    score = q_means @ k_means.transpose(2, 3)
    lists = torch.empty_like(score, dtype=torch.int16)
    launch = _select_launch(tuple(score.shape), tables.selected.shape[0], score.dtype, q.device.index)
    launch(score, tables.free, choice, tables.selected, lists)
    return lists


@functools.lru_cache
def _select_launch(shape: tuple[int, ...], patterns: int, dtype: torch.dtype, device: int | None) -> Launch:
    batch, heads, query_blocks, key_blocks = shape
    return Launch(
        select_kernel, (query_blocks, batch * heads, 1),
        patterns, query_blocks, key_blocks, SHIFT=SHIFTS[dtype], **_width(key_blocks),
    )  # fmt: skip
