# SPDX-License-Identifier: Apache-2.0
"""flash-attn's operators as Dynamo sees them, computed by PyTorch on any device and in any dtype.

The names and arguments are those of flash-attn 2.8 (`flash_attn/flash_attn_interface.py`), as far as forwards go.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def define(namespace: str) -> None:
    """Register the operators under a namespace: `flash_attn` for code that calls the functions below."""
    for name, compute, fake in (
        ("_flash_attn_forward", _forward, _fake_forward),
        ("_flash_attn_varlen_forward", _varlen_forward, _fake_varlen_forward),
    ):
        torch.library.custom_op(f"{namespace}::{name}", compute, mutates_args=()).register_fake(fake)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), q.new_zeros(q.shape[:3])


def _fake_forward(q: Tensor, *rest: object, **others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


def _varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor]:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    start, first = next(ends)
    for end, last in ends:
        one, two, three = (x.transpose(0, 1)[None] for x in (q[start:end], k[first:last], v[first:last]))
        if end > start:
            found = F.scaled_dot_product_attention(one, two, three, scale=softmax_scale)
            out[start:end] = found[0].transpose(0, 1)
        start, first = end, last
    return out, q.new_zeros(q.shape[:2])


def _fake_varlen_forward(q: Tensor, *rest: object, **others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2])


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """Attention over ``[B, S, H, D]``."""
    scale = softmax_scale or q.shape[-1] ** -0.5
    out: Tensor = torch.ops.flash_attn._flash_attn_forward(q, k, v, dropout_p, scale, causal, *window_size)[0]
    return out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """Attention over packed sequences ``[tokens, H, D]``."""
    scale = softmax_scale or q.shape[-1] ** -0.5
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    operator = torch.ops.flash_attn._flash_attn_varlen_forward
    out: Tensor = operator(q, k, v, *lengths, dropout_p, scale, causal, *window_size)[0]
    return out
