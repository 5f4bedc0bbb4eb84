# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rows of an output that no program writes, for `order` does not name them: cleared, in Triton.

There are none where `order` is a permutation, as the tables' is, and looking for them takes a hundredth of the time of
clearing all rows.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rainfusion_compile.kernels.gpu.configs import cdiv
from rainfusion_compile.kernels.gpu.launch import Launch
from rainfusion_compile.kernels.gpu.rows import bounded

TILE = 128  # tokens of a program
RUNTIME_ARGS = ["tokens", "batch", "row"]


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def note_places_kernel(order, places, tokens, TILE: tl.constexpr):
    """places[token]: where in `order` it stands. Tokens that it does not name keep what memory held."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token = bounded(tl.load(order + place, mask=place < tokens, other=0), tokens)
    tl.store(places + token, place, mask=place < tokens)


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def clear_rows_kernel(out, order, places, tokens, batch, row, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Zeros in out[b, token, :row] of those tokens that do not stand in `order` where their place says."""
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    place = bounded(tl.load(places + token, mask=token < tokens, other=0), tokens)
    unnamed = (bounded(tl.load(order + place), tokens) != token) & (token < tokens)
    if tl.max(unnamed.to(tl.int32), 0) != 0:
        column = tl.arange(0, WIDTH)[None, :]
        nothing = tl.zeros([TILE, WIDTH], out.dtype.element_ty)
        for sample in range(batch):
            at = out + ((sample * tokens + token).to(tl.int64) * row)[:, None]
            for begin in range(0, row, WIDTH):
                tl.store(at + begin + column, nothing, mask=unnamed[:, None] & (begin + column < row))


def clear_unnamed_rows(out: Tensor, order: Tensor) -> None:
    """Zeros in those rows of ``out``, contiguous ``[B, S, H, D]``, that int32 ``order [S]`` does not name."""
    places = torch.empty_like(order)
    note, clear = _launches(out.shape, out.dtype, out.device.index)
    note(order, places)
    clear(out, order, places)


@functools.lru_cache
def _launches(shape: tuple[int, ...], dtype: torch.dtype, device: int | None) -> tuple[Launch, Launch]:
    (batch, tokens, heads, head_dim), grid = shape, (cdiv(shape[1], TILE), 1, 1)
    note = Launch(note_places_kernel, (cdiv(tokens, 1024), 1, 1), tokens, TILE=1024)
    return note, Launch(clear_rows_kernel, grid, tokens, batch, heads * head_dim, TILE=TILE, WIDTH=64)
