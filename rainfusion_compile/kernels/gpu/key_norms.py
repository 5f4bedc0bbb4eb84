# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""How long the longest key of each head is, in Triton: scores can be no larger than that allows."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rainfusion_compile.kernels.gpu.configs import next_power_of_2
from rainfusion_compile.kernels.gpu.launch import Launch
from rainfusion_compile.kernels.gpu.rows import VECTOR, Rows, row_strides, rows_of

SPLITS = 32  # parts of a head's keys, one program each: enough for a GPU, and one for each lane of a warp


@triton.jit(do_not_specialize=["heads", "tokens", "stride_b", "stride_h", "stride_s"])
def key_norms_kernel(
    k, norms, heads, tokens, stride_b, stride_h, stride_s, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    OFFSET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: norms[b, h, split], the largest squared length of keys in a part. What is no number is left out.
    Strides of k count VECTOR elements."""
    split, head = tl.program_id(0), tl.program_id(1)
    k += ((head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h) * VECTOR
    share = tl.cdiv(tl.cdiv(tokens, ROWS), tl.num_programs(0)) * ROWS
    column = tl.arange(0, WIDTH)[None, :]
    largest = tl.zeros([ROWS], tl.float32)
    for begin in tl.range(split * share, tl.minimum((split + 1) * share, tokens), ROWS, num_stages=STAGES):
        row = begin + tl.arange(0, ROWS)
        at = (row.to(OFFSET) * stride_s * VECTOR)[:, None] + column
        x = tl.load(k + at, mask=(row < tokens)[:, None] & (column < D), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.sum(x * x, 1))
    tl.store(norms + head * tl.num_programs(0) + split, tl.max(largest, 0))


def key_norms(k: Tensor) -> Tensor:
    """float32 ``[B, Hk, SPLITS]`` of the aligned rows of keys ``[B, Hk, S, D]``."""
    norms = torch.empty(*k.shape[:2], SPLITS, dtype=torch.float32, device=k.device)
    _launch(rows_of(k), k.device.index)(k, norms)
    return norms


@functools.lru_cache
def _launch(k: Rows, device: int | None) -> Launch:
    (batch, heads, tokens, dim), (strides, offset) = k.shape, row_strides(k)
    return Launch(
        key_norms_kernel, (SPLITS, batch * heads, 1),
        heads, tokens, *strides, D=dim, WIDTH=next_power_of_2(dim), ROWS=64, OFFSET=offset, STAGES=3, num_warps=4,
    )  # fmt: skip
