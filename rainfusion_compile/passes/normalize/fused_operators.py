# SPDX-License-Identifier: Apache-2.0
"""Attention as one operator or function: flash-attn's, SageAttention's, torch's own kernels.

Their arguments are read by name, so versions may differ. Whatever is not known here must be as it is by default.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from rainfusion_compile.passes.graph.mutation import Order
from rainfusion_compile.passes.graph.nodes import is_sdpa
from rainfusion_compile.passes.graph.symbolic_sizes import shape_of
from rainfusion_compile.passes.normalize.spelling import (
    Attention,
    NotSdpa,
    Step,
    bound,
    number_of,
    only_first,
    over,
    tensor_of,
    transposed,
)
from rainfusion_compile.passes.normalize.varlen import samples
from rainfusion_compile.passes.reasons import DenseReason

_BHSD = ("aten::_scaled_dot_product_",)
_BSHD = ("flash_attn", "sageattn", "aten::_flash_attention_forward", "aten::_efficient_attention_forward")
_OPERANDS = (("q", "k", "v"), ("query", "key", "value"))
_LENGTHS = (("cu_seqlens_q", "cu_seqlens_k"), ("cum_seq_q", "cum_seq_k"))
_SCALES = ("softmax_scale", "sm_scale", "scale")
_MASKS = ("attn_bias", "attn_mask", "bias")
# These change no output, or say again what the operands' shapes say.
_HARMLESS = (
    *("return_softmax", "return_attn_probs", "return_softmax_lse", "return_lse", "return_debug_mask"),
    *("deterministic", "num_splits", "pack_gqa", "sm_margin", "scheduler_metadata", "zero_tensors", "smooth_k"),
    *("compute_log_sumexp", "compute_logsumexp", "enable_gqa", "max_q", "max_k"),
    *("max_seqlen_q", "max_seqlen_k", "tensor_layout"),
)


def read(node: fx.Node, order: Order) -> Attention | None:
    """The attention that one call computes.

    Raises:
        NotSdpa: if it does more than SDPA can.
    """
    defaults = _defaults(node)
    names = next((names for names in _OPERANDS if {*names} <= {*defaults}), None)
    if names is None:
        return None
    given = {**defaults, **bound(node, *defaults)}
    operands = [given.pop(name) for name in names]
    sizes = shape_of(operands[0])
    heads_first = any(name in _name(node) for name in _BHSD) or given.get("tensor_layout") == "HND"
    with over(sizes[2 if heads_first else 1] if len(sizes) == 4 else None):
        _check(given, defaults)
        lengths = [given[name] for pair in _LENGTHS for name in pair if given.get(name) is not None]
        layout: list[Step] = [] if heads_first else transposed()
        after, before = layout, layout if not lengths else None
        if lengths:
            operands, after = samples(operands, lengths, node, order)
        if any(tensor_of(item).dim() != 4 for item in operands):
            raise NotSdpa("operands are not 4-D")
        scales = [given[name] for name in _SCALES if given.get(name) is not None]
        masks = [(given[name], list[Step]()) for name in _MASKS if given.get(name) is not None]
        return Attention(
            node,
            only_first(node, "statistics of the softmax"),
            [(item, layout) for item in operands],
            after,
            before,
            mask=masks[0] if masks else None,
            scale=scales[0] if scales else None,
            causal=bool(given.get("causal") or given.get("is_causal") or given.get("custom_mask_type")),
            dropout=float(given.get("dropout_p") or 0.0),
        )


def _check(given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises NotSdpa on arguments that are not understood."""
    understood = {*_HARMLESS, *_MASKS, *_SCALES, "dropout_p", "causal", "is_causal", "custom_mask_type"}
    understood |= {name for pair in _LENGTHS for name in pair}
    for name, value in given.items():
        if name in understood or value is None or value is False:
            continue
        sizes = value if isinstance(value, (list, tuple)) else (value,)
        endless = name.startswith("window_size") and all(size is None or (number_of(size) or 0) < 0 for size in sizes)
        off = name == "softcap" and number_of(value) is not None and value <= 0
        default = defaults.get(name, inspect.Parameter.empty)
        if not (endless or off or (not isinstance(value, fx.Node) and value == default)):
            raise NotSdpa(f"attention operator with {name}={value}")
    if any(given.get(name) is not None and (number_of(given[name]) or 0) <= 0 for name in _SCALES):
        raise NotSdpa("scale is not a known positive number")
    if number_of(given.get("dropout_p") or 0.0) is None:
        raise NotSdpa("dropout", DenseReason.DROPOUT)


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, OpOverloadPacket):
        return str(target._qualified_op_name)
    return str(target.name() if isinstance(target, OpOverload) else getattr(target, "__name__", ""))


def _defaults(node: fx.Node) -> dict[str, Any]:
    """Parameters with their defaults, of a function whose name says that it is attention; none of others."""
    if node.op != "call_function" or is_sdpa(node) or not any(name in _name(node) for name in (*_BHSD, *_BSHD)):
        return {}
    target: Any = node.target
    if isinstance(target, OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, OpOverload):
        empty = inspect.Parameter.empty
        return {
            item.name: item.default_value if item.has_default_value() else empty for item in target._schema.arguments
        }
    try:
        return {name: item.default for name, item in inspect.signature(target).parameters.items()}
    except (TypeError, ValueError):
        return {}
