# SPDX-License-Identifier: Apache-2.0
"""Attention as one operator or function: flash-attn's, SageAttention's, torch's own kernels.

Their arguments are read by name, so versions may differ. Whatever is not known here must be as it is by default.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from rainfusion_compile.passes.attention_match import DenseReason
from rainfusion_compile.passes.graph.mutation import Order
from rainfusion_compile.passes.graph.nodes import bound, example_of, is_sdpa, parameters
from rainfusion_compile.passes.graph.symbolic_sizes import hint_of, shape_of
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
    with over(sizes[2 if heads_first else 1] if len(sizes) == 4 else None):
        _check(given, defaults)
        lengths = [given[name] for name in _LENGTHS if given.get(name) is not None]
        layout: list[Step] = [] if heads_first else [(torch.transpose, 1, 2)]
        after, before = layout, layout if not lengths else None
        if lengths:
            operands, after = _samples(operands, lengths, node, order)
        if any(tensor_of(item).dim() != 4 for item in operands):
            raise NotSdpa("operands are not 4-D")
        out = only_first(node, "statistics of the softmax")
        found = Attention(node, out, [(item, layout) for item in operands], after, before)
        found.mask = next(((given[name], []) for name in _MASKS if given.get(name) is not None), None)
        found.scale = next((given[name] for name in _SCALES if given.get(name) is not None), None)
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


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, OpOverloadPacket):
        return str(target._qualified_op_name)
    return str(target.name() if isinstance(target, OpOverload) else getattr(target, "__name__", ""))


# --- packed sequences, [B * S, H, D] with the places where each begins: those of one sequence for each sample ---------

_FUNCTIONS = {
    *(torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor, torch.cumsum, torch.cat),
    *(torch.mul, torch.add, F.pad, torch._C._nn.pad, operator.mul, operator.add, operator.getitem, operator.setitem),
}
_METHODS = {"cumsum", "new_zeros", "to", "int", "long", "mul", "add", "contiguous", "clone"}
_SMALL = 4096


def _samples(operands: list[Any], lengths: list[Any], node: fx.Node, order: Order) -> tuple[list[fx.Node], list[Step]]:
    """The operands as ``[B, S, H, D]``, and the steps that pack ``[B, H, S, D]`` again.

    Raises NotSdpa unless it is proved that all samples are one sequence of the same length.
    """
    if any(len(shape_of(item)) != 3 for item in operands) or len(lengths) != 2:
        raise NotSdpa("packed sequences whose operands are not [B * S, H, D]")
    places = [_constant(item, order.places[node], order) for item in lengths]
    starts, total = [item.tolist() for item in places if item is not None], shape_of(operands[0])[0]
    if len(starts) < 2:
        raise NotSdpa("packed sequences, whose lengths are known at run time only")
    batch = len(starts[0]) - 1
    same = batch > 0 and total is not None and total % batch == 0 and all(shape_of(x)[0] == total for x in operands)
    if not same or any(item != list(range(0, total + 1, total // batch)) for item in starts):
        raise NotSdpa("packed sequences that are not one of the same length for each sample")
    unpacked = [_unpacked(item, (batch, total // batch), node, order) for item in operands]
    return unpacked, [(torch.transpose, 1, 2), (torch.flatten, 0, 1)]


def _unpacked(packed: fx.Node, sizes: tuple[int, int], node: fx.Node, order: Order) -> fx.Node:
    """The ``[B, S, H, D]`` that was packed."""
    tensor_of(packed)
    below = packed.args[0] if packed.target in ("flatten", "reshape", "view", torch.flatten, torch.reshape) else None
    if shape_of(below) != (*sizes, *shape_of(packed)[1:]) or order.written(packed, node):
        raise NotSdpa("packed sequences that are no [B, S, H, D] made flat")
    assert isinstance(below, fx.Node)
    return below


def _constant(node: Any, until: int, order: Order) -> Tensor | None:
    """The value of a small integer tensor that is made of numbers and sizes only; None if it is not."""
    values: dict[fx.Node, Any] = {}
    for item in itertools.islice(order.places, until):
        example = example_of(item)
        if isinstance(example, torch.SymInt):
            values[item] = hint_of(example)  # who uses this makes the sizes of the graph those of this call
        elif item.op.startswith("call") and _calculable(item):
            if all(values.get(source) is not None for source in item.all_input_nodes):
                values[item] = _value(item, values)
                continue
            for source in item.all_input_nodes if item.target is operator.setitem else ():
                values.pop(source, None)
        if item in order.writes and any(source in values for source in item.all_input_nodes):
            values = {known: value for known, value in values.items() if not isinstance(value, Tensor)}
    found = values.get(node)
    return found if isinstance(found, Tensor) and found.dim() == 1 else None


def _calculable(node: fx.Node) -> bool:
    example = example_of(node)
    if node.target is operator.setitem or node.target not in (_FUNCTIONS if node.op == "call_function" else _METHODS):
        return node.target is operator.setitem
    if not isinstance(example, Tensor) or example.is_floating_point() or example.is_complex() or example.dim() > 1:
        return False
    return all(size is not None and size <= _SMALL for size in map(hint_of, example.shape))


def _value(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node, on CPU."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    cpu = torch.device("cpu")
    kwargs = {name: cpu if name == "device" else value for name, value in kwargs.items()}
    args = tree_map(lambda item: cpu if isinstance(item, torch.device) else item, args)
    function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    with torch.no_grad(), _disable_current_modes():
        return function(*args, **kwargs)
