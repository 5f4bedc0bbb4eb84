# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Keys as 8-bit integers, in Triton, and how far scores of such keys and queries are from exact ones.

Products of integers take a GPU half as long. A head's keys have one scale; their mean is taken off first, which adds
the same to all scores of a query and so changes nothing (SageAttention, arXiv 2410.02367). Queries are rounded where
they are multiplied, with a scale for 64 rows. Rounding to integers in this way makes attention's output two to five
times as exact as rounding to float8 does: docs/quality.md.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rainfusion_compile.kernels.gpu.configs import cdiv, next_power_of_2
from rainfusion_compile.kernels.gpu.launch import Launch
from rainfusion_compile.kernels.gpu.rows import VECTOR, Rows, bounded, row_strides, rows_of

LARGEST = 127.0
ZERO = 1.5 * 2**23  # floats around it are whole numbers: adding it rounds
SPLITS, ROWS, STAGES = 64, 32, 3  # parts of a head's keys, one program each; rows of a step; steps read ahead
_STRIDES = ["heads", "tokens", "stride_b", "stride_h", "stride_s"]
_LARGEST, _ZERO = tl.constexpr(LARGEST), tl.constexpr(ZERO)


@triton.jit(do_not_specialize=_STRIDES)
def key_sums_kernel(
    k, parts, heads, tokens, stride_b, stride_h, stride_s, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    OFFSET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: parts[b * h, split, :, column], of a part of a head's keys the sum, the sum of squares, the lowest
    and the highest number of each column. Strides of k count VECTOR elements."""
    split, head = tl.program_id(0), tl.program_id(1)
    k += ((head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h) * VECTOR
    share = tl.cdiv(tl.cdiv(tokens, ROWS), tl.num_programs(0)) * ROWS
    column = tl.arange(0, WIDTH)
    # Whole tiles, put together only at the end: threads need not tell each other of every step.
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    low = tl.full([ROWS, WIDTH], float("inf"), tl.float32)
    high = tl.full([ROWS, WIDTH], float("-inf"), tl.float32)
    for begin in tl.range(split * share, tl.minimum((split + 1) * share, tokens), ROWS, num_stages=STAGES):
        row = begin + tl.arange(0, ROWS)
        inside = (row < tokens)[:, None] & (column < D)[None, :]
        at = (row.to(OFFSET) * stride_s * VECTOR)[:, None] + column[None, :]
        x = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        total += x
        squares += x * x
        low = tl.minimum(low, tl.where(inside, x, float("inf")))
        high = tl.maximum(high, tl.where(inside, x, float("-inf")))
    parts += (head * tl.num_programs(0) + split).to(tl.int64) * 4 * WIDTH + column
    tl.store(parts, tl.sum(total, 0))
    tl.store(parts + WIDTH, tl.sum(squares, 0))
    tl.store(parts + 2 * WIDTH, tl.min(low, 0))
    tl.store(parts + 3 * WIDTH, tl.max(high, 0))


@triton.jit(do_not_specialize=["tokens"])
def key_scales_kernel(
    parts, means, scales, lengths, tokens, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):
    """One program: a head's mean key, the scale of what is left of its keys without it, and their mean squared
    length. A scale is NaN if a key has a number that is none."""
    head = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    parts += head.to(tl.int64) * SPLITS * 4 * WIDTH + (tl.arange(0, SPLITS) * 4 * WIDTH)[:, None] + column[None, :]
    mean = tl.sum(tl.load(parts), 0) / tokens
    squares = tl.sum(tl.load(parts + WIDTH), 0) / tokens
    low, high = tl.min(tl.load(parts + 2 * WIDTH), 0), tl.max(tl.load(parts + 3 * WIDTH), 0)
    real = column < D
    most = tl.max(tl.where(real, tl.maximum(high - mean, mean - low), 0.0), 0)
    most += tl.sum(mean - mean, 0)  # NaN where a mean is none
    tl.store(means + head * WIDTH + column, mean)
    tl.store(scales + head, tl.where(most == 0.0, 1.0, most / _LARGEST))
    tl.store(lengths + head, tl.sum(tl.where(real, tl.maximum(squares - mean * mean, 0.0), 0.0), 0))


@triton.jit(do_not_specialize=_STRIDES)
def round_keys_kernel(
    k, means, scales, rounded, heads, tokens, stride_b, stride_h, stride_s, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One program: rounded[b * h, rows, D], int8, keys less their mean over their scale."""
    head = tl.program_id(1)
    k += ((head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h) * VECTOR
    column = tl.arange(0, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < tokens)[:, None] & (column < D)[None, :]
    at = (row.to(OFFSET) * stride_s * VECTOR)[:, None] + column[None, :]
    x = tl.load(k + at, mask=inside, other=0.0).to(tl.float32) - tl.load(means + head * WIDTH + column)[None, :]
    x = x / tl.load(scales + head)
    x = (x + _ZERO) - _ZERO
    rounded += head.to(tl.int64) * tokens * D
    tl.store(rounded + (row.to(tl.int64) * D)[:, None] + column[None, :], x.to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["group", "count", "factor", *_STRIDES])
def score_noise_kernel(
    q, key_steps, lengths, samples, variances, heads, group, tokens, count, factor, stride_b, stride_h, stride_s,
    D: tl.constexpr, WIDTH: tl.constexpr, SAMPLES: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One program: variances[b * h, sample], of scores: see `score_noise`. Strides of q count VECTOR elements."""
    head = tl.program_id(0)
    q += ((head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h) * VECTOR
    sample, column = tl.arange(0, SAMPLES), tl.arange(0, WIDTH)
    real = sample < count
    token = bounded(tl.load(samples + sample, mask=real, other=0), tokens).to(OFFSET)
    inside = real[:, None] & (column < D)[None, :]
    x = tl.load(q + (token * stride_s * VECTOR)[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    step = tl.max(tl.max(tl.abs(x), 1), 0) / _LARGEST
    of_keys = head // heads * (heads // group) + head % heads // group
    key_step = tl.load(key_steps + of_keys)
    variance = tl.sum(x * x, 1) * key_step * key_step + tl.load(lengths + of_keys) * step * step
    tl.store(variances + head * count + sample, variance * factor, mask=real)


def key_scales(k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the aligned rows of keys ``[B, Hk, S, D]``: a head's mean key, its scale and the mean squared length of its
    keys without their mean, float32 ``[B, Hk, WIDTH]``, ``[B, Hk]``, ``[B, Hk]``."""
    batch, heads, _, dim = k.shape
    width = next_power_of_2(dim)
    parts = torch.empty(batch, heads, SPLITS, 4, width, dtype=torch.float32, device=k.device)
    means = torch.empty(batch, heads, width, dtype=torch.float32, device=k.device)
    scales, lengths = torch.empty(2, batch, heads, dtype=torch.float32, device=k.device)
    sums, finish, _ = _launches(rows_of(k), k.device.index)
    sums(k, parts)
    finish(parts, means, scales, lengths)
    return means, scales, lengths


def int8_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys ``[B, Hk, S, D]``, aligned rows, as integers, two of them in a number of k's dtype: ``[B, Hk, S, D / 2]``;
    and their scales, float32 ``[B, Hk]``."""
    means, scales, _ = key_scales(k)
    rounded = torch.empty(k.shape, dtype=torch.int8, device=k.device)
    _launches(rows_of(k), k.device.index)[2](k, means, scales, rounded)
    return rounded.view(k.dtype), scales


def score_noise(q: Tensor, k: Tensor, samples: Tensor, scale: float) -> Tensor:
    """How far rounding moves the scores of sampled queries, float32 ``[B, H, n]``: the variance to be expected.

    A number that is rounded to whole steps is off by a step over the root of 12. As scale of a query's 64 rows stands
    that of its head's samples, about as many.
    """
    _, steps, lengths = key_scales(k)  # of all keys: one that is longer than others makes the steps
    noise = torch.empty(*q.shape[:2], samples.shape[0], dtype=torch.float32, device=q.device)
    launch = _noise_launch(rows_of(q), k.shape[1], samples.shape[0], scale * scale / 12, q.device.index)
    launch(q, steps, lengths, samples, noise)
    return noise


@functools.lru_cache
def _noise_launch(q: Rows, key_heads: int, count: int, factor: float, device: int | None) -> Launch:
    (batch, heads, tokens, dim), (strides, offset) = q.shape, row_strides(q)
    return Launch(
        score_noise_kernel, (batch * heads, 1, 1),
        heads, heads // key_heads, tokens, count, factor, *strides, D=dim, WIDTH=next_power_of_2(dim),
        SAMPLES=next_power_of_2(count), OFFSET=offset, num_warps=8,
    )  # fmt: skip


@functools.lru_cache
def _launches(k: Rows, device: int | None) -> tuple[Launch, Launch, Launch]:
    (batch, heads, tokens, dim), (strides, offset) = k.shape, row_strides(k)
    width = next_power_of_2(dim)
    constants = {"D": dim, "WIDTH": width, "ROWS": ROWS, "OFFSET": offset, "num_warps": 4}
    return (
        Launch(key_sums_kernel, (SPLITS, batch * heads, 1), heads, tokens, *strides, STAGES=STAGES, **constants),
        Launch(key_scales_kernel, (batch * heads, 1, 1), tokens, D=dim, WIDTH=width, SPLITS=SPLITS, num_warps=8),
        Launch(round_keys_kernel, (cdiv(tokens, ROWS), batch * heads, 1), heads, tokens, *strides, **constants),
    )
