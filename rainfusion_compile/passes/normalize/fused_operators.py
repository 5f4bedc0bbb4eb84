# SPDX-License-Identifier: Apache-2.0
"""Attention as one operator or function: flash-attn's, SageAttention's, torch's own kernels.

Their arguments are read by name, so versions may differ. Whatever is not known here must be as it is by default.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from rainfusion_compile.passes.attention_match import DenseReason
from rainfusion_compile.passes.graph.mutation import Order
from rainfusion_compile.passes.graph.nodes import bound, is_sdpa, parameters
from rainfusion_compile.passes.graph.symbolic_sizes import shape_of
from rainfusion_compile.passes.normalize.packed import Unpacked, unpack
from rainfusion_compile.passes.normalize.spelling import (
    Attention,
    NotSdpa,
    Step,
    number_of,
    only_first,
    over,
    tensor_of,
)

_BHSD = ("aten::_scaled_dot_product_",)
_BSHD = ("flash_attn", "sageattn", "aten::_flash_attention_forward", "aten::_efficient_attention_forward")
_OPERANDS = (("q", "k", "v"), ("query", "key", "value"))
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "cum_seq_q", "cum_seq_k")
_SCALES = ("softmax_scale", "sm_scale", "scale")
_MASKS = ("attn_bias", "attn_mask", "bias")
_CAUSAL = ("causal", "is_causal", "custom_mask_type")
# These change no output, or say again what the operands' shapes say.
_HARMLESS = (
    *("return_softmax", "return_attn_probs", "return_softmax_lse", "return_lse", "return_debug_mask"),
    *("deterministic", "num_splits", "pack_gqa", "sm_margin", "scheduler_metadata", "zero_tensors", "smooth_k"),
    *("compute_log_sumexp", "compute_logsumexp", "enable_gqa", "max_q", "max_k"),
    *("max_seqlen_q", "max_seqlen_k", "tensor_layout"),
)


def read(node: fx.Node, order: Order) -> Attention | None:
    """The attention that one call computes. Raises NotSdpa if it does more than SDPA can."""
    known = node.op == "call_function" and not is_sdpa(node) and any(name in _name(node) for name in (*_BHSD, *_BSHD))
    defaults = parameters(node.target) if known else {}
    names = next((names for names in _OPERANDS if {*names} <= {*defaults}), None)
    if names is None:
        return None
    given = {**defaults, **bound(node, *defaults)}
    operands = [given.pop(name) for name in names]
    sizes = shape_of(operands[0])
    heads_first = any(name in _name(node) for name in _BHSD) or given.get("tensor_layout") == "HND"
    tokens = sizes[2 if heads_first else 1] if len(sizes) == 4 else _longest(given) or next(iter(sizes), None)
    with over(tokens):
        _check(given, defaults)
        starts = [given[name] for name in _LENGTHS if given.get(name) is not None]
        layout: list[Step] = [] if heads_first else [(torch.transpose, 1, 2)]
        unpacked = unpack(operands, starts, node, order) if starts else Unpacked([(item, []) for item in operands])
        if not starts and any(tensor_of(item).dim() != 4 for item in operands):
            raise NotSdpa("operands are not 4-D")
        out = only_first(node, "statistics of the softmax")
        after, before = ([*layout, (torch.flatten, 0, 1)], None) if starts else (layout, layout)
        found = Attention(node, out, [(item, [*steps, *layout]) for item, steps in unpacked.operands], after, before)
        found.mask = next(((given[name], []) for name in _MASKS if given.get(name) is not None), None)
        if found.mask is not None and "aten::" in _name(node) and tensor_of(found.mask[0]).dtype == torch.bool:
            raise NotSdpa("mask of bools, which this operator would add to scores")
        found.scale = next((given[name] for name in _SCALES if given.get(name) is not None), None)
        if unpacked.sequences is not None:
            if found.mask is not None:
                raise NotSdpa("packed sequences with a mask")
            found.mask, found.finish = unpacked.sequences.key_mask, partial(unpacked.sequences.finish, found.scale)
            found.after = [(torch.flatten, 0, 1)]
        found.causal = any(given.get(name) for name in _CAUSAL)
        found.dropout = float(given.get("dropout_p") or 0.0)
        return found


def _check(given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises NotSdpa on arguments that are not understood."""
    understood = {*_HARMLESS, *_MASKS, *_SCALES, *_CAUSAL, *_LENGTHS, "dropout_p"}
    for name, value in given.items():
        if name in understood or value is None or value is False:
            continue
        sizes = value if isinstance(value, (list, tuple)) else (value,)
        endless = name.startswith("window_size") and all(size is None or (number_of(size) or 0) < 0 for size in sizes)
        off = name == "softcap" and number_of(value) is not None and value <= 0
        if not (endless or off or (not isinstance(value, fx.Node) and value == defaults.get(name))):
            raise NotSdpa(f"attention operator with {name}={value}")
    if any(given.get(name) is not None and (number_of(given[name]) or 0) <= 0 for name in _SCALES):
        raise NotSdpa("scale is not a known positive number")
    if number_of(given.get("dropout_p") or 0.0) is None:
        raise NotSdpa("dropout", DenseReason.DROPOUT)


def _longest(given: dict[str, Any]) -> int | None:
    """How many queries the longest of packed sequences has, as the call says."""
    lengths = (given.get(name) for name in ("max_seqlen_q", "max_q"))
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, OpOverloadPacket):
        return str(target._qualified_op_name)
    return str(target.name() if isinstance(target, OpOverload) else getattr(target, "__name__", ""))
