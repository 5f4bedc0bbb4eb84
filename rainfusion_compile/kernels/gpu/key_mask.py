# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Key masks in Triton kernels: of which kind one is, and where it first touches a key."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rainfusion_compile.kernels.gpu.configs import cdiv
from rainfusion_compile.kernels.gpu.launch import launch
from rainfusion_compile.kernels.gpu.rows import bounded, strides_of


def mask_kind(key_mask: torch.Tensor | None) -> int:
    """The kernels' MASK_KIND: 0 without a mask, 1 for a bool mask (True: attend), 2 for an additive bias."""
    return 0 if key_mask is None else 1 if key_mask.dtype == torch.bool else 2


def first_masked(
    key_mask: torch.Tensor | None, key_order: torch.Tensor, listed: int, extra: int = 0
) -> torch.Tensor | None:
    """What a ``[B or 1, H or 1, S]`` key mask touches first, hides or changes: which of the first `listed` places of
    ``key_order``, which of these from place `extra` on, and which token of all; int32 ``[B or 1, H or 1, 3]``, the
    length of ``key_order`` where nothing is touched. Padding stands at the end of most sequences, so kernels run
    unmasked up to here.
    """
    if key_mask is None:
        return None
    batch, heads, tokens = key_mask.shape
    length, tile = key_order.shape[0], 1024
    first = torch.full((batch, heads, 3), length, dtype=torch.int32, device=key_mask.device)
    launch(
        _first_masked_kernel, (cdiv(length, tile), batch * heads, 1),
        key_mask, key_order, first, length, listed, extra, heads, tokens, *strides_of(key_mask, 3),
        KIND=mask_kind(key_mask), TILE=tile,
    )  # fmt: skip
    return first


@triton.jit
def _lower(at, places, none):
    """Lower the number there to the least of these places, if that is one and not `none`."""
    least = tl.min(places, 0).to(tl.int32)
    if least < none:
        tl.atomic_min(at, least)


@triton.jit(do_not_specialize=["length", "listed", "extra", "heads", "tokens", "stride_b", "stride_h", "stride_s"])
def _first_masked_kernel(
    mask, key_order, first, length, listed, extra, heads, tokens, stride_b, stride_h, stride_s,
    KIND: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = position < length
    token = bounded(tl.load(key_order + position, mask=inside, other=0), tokens).to(tl.int64)
    value = tl.load(mask + batch * stride_b + head * stride_h + token * stride_s)
    touched = ((value == 0) if KIND == 1 else (value != 0)) & inside
    first += tl.program_id(1) * 3
    place = tl.where(touched & (position < listed), position, length)
    _lower(first, place, length)
    _lower(first + 1, tl.where(position >= extra, place, length), length)
    _lower(first + 2, tl.where(touched, token, length), length)
