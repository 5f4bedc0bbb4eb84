# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the launchers of both Triton kernels share: strides for row loads, and what a key mask touches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rainfusion_compile.kernels.gpu.configs import cdiv

VECTOR = tl.constexpr(8)  # elements at whose multiples all rows start: 16 bytes at least

# Numbers that change with the video's size or the memory layout: never a reason to compile again.
ATTENTION_RUNTIME_ARGS = (
    ["patterns", "batch_heads", "heads", "group", "tokens", "first_run", "query_blocks", "query_tiles"]
    + [f"stride_{tensor}{axis}" for tensor in "qkvo" for axis in "bhs"]
    + ["scale_log2", "stride_mb", "stride_mh", "stride_ms", "stride_fb", "stride_fh"]
)


def strides_of(tensor: torch.Tensor | None, axes: int) -> tuple[int, ...]:
    """The first strides, in elements; 0 for axes of length 1, whose strides mean nothing, and for no tensor at all."""
    if tensor is None:
        return (0,) * axes
    pairs = zip(tensor.shape[:axes], tensor.stride()[:axes], strict=True)
    return tuple(0 if length == 1 else stride for length, stride in pairs)


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` if its rows lie apart, are contiguous and start at multiples of 16 bytes, as in every layout that models use.

    Else a copy. (Triton 3.6 gets narrower copies to shared memory wrong where head_dim comes in two pieces.)
    """
    steps = [stride for length, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if length > 1]
    apart = x.shape[-2] == 1 or x.stride(-2) != 0
    ok = apart and x.stride(-1) == 1 and not any(step % VECTOR.value for step in steps) and x.data_ptr() % 16 == 0
    return x if ok else x.clone(memory_format=torch.contiguous_format)


def row_strides(*tensors: torch.Tensor) -> tuple[list[int], tl.dtype]:
    """How to address the aligned rows of ``[B, H, S, D]`` tensors: (B, H and S strides over VECTOR, offset dtype).

    Counting strides in vectors tells the compiler how rows are aligned. Offsets inside one head are int32 where they
    fit, else int64.
    """
    if tensors[0].shape[-1] % VECTOR.value:
        raise ValueError(f"head_dim must be a multiple of {VECTOR.value}, got {tensors[0].shape[-1]}")
    strides = [stride for tensor in tensors for stride in strides_of(tensor, 3)]
    reach = max(tensor.shape[2] * abs(tensor.stride(2)) + tensor.shape[3] for tensor in tensors)
    return [stride // VECTOR.value for stride in strides], tl.int32 if reach < 2**31 else tl.int64


def mask_kind(key_mask: torch.Tensor | None) -> int:
    """The kernels' MASK_KIND: 0 without a mask, 1 for a bool mask (True: attend), 2 for an additive bias."""
    if key_mask is None:
        return 0
    return 1 if key_mask.dtype == torch.bool else 2


def first_masked(key_mask: torch.Tensor, key_order: torch.Tensor, listed: int, extra: int = 0) -> torch.Tensor:
    """What a ``[B or 1, H or 1, S]`` key mask touches first: which of the first `listed` places of ``key_order``, which
    of these from place `extra` on, and which token of all.

    A bool mask touches what it hides, a bias what it changes. Returns int32 ``[B or 1, H or 1, 3]``, the length of
    ``key_order`` where nothing is touched. Padding stands at the end of most sequences, so kernels run unmasked up to
    here.
    """
    batch, heads, _ = key_mask.shape
    length = key_order.shape[0]
    first = torch.full((batch, heads, 3), length, dtype=torch.int32, device=key_mask.device)
    tile = 1024
    _first_masked_kernel[(cdiv(length, tile), batch * heads)](
        key_mask,
        key_order,
        first,
        length,
        listed,
        extra,
        heads,
        *strides_of(key_mask, 3),
        KIND=mask_kind(key_mask),
        TILE=tile,
    )
    return first


@triton.jit
def _lower(at, places, none):
    """Lower the number there to the least of these places, if that is one and not `none`."""
    least = tl.min(places, 0).to(tl.int32)
    if least < none:
        tl.atomic_min(at, least)


@triton.jit(do_not_specialize=["length", "listed", "extra", "heads", "stride_b", "stride_h", "stride_s"])
def _first_masked_kernel(
    mask, key_order, first, length, listed, extra, heads, stride_b, stride_h, stride_s,
    KIND: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = position < length
    token = tl.load(key_order + position, mask=inside, other=0).to(tl.int64)
    value = tl.load(mask + batch * stride_b + head * stride_h + token * stride_s)
    touched = ((value == 0) if KIND == 1 else (value != 0)) & inside
    first += tl.program_id(1) * 3
    place = tl.where(touched & (position < listed), position, length)
    _lower(first, place, length)
    _lower(first + 1, tl.where(position >= extra, place, length), length)
    _lower(first + 2, tl.where(touched, token, length), length)
