# SPDX-License-Identifier: Apache-2.0
"""Packed sequences, ``[B * S, H, D]`` with the places where each begins: those of one sequence for each sample."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from rainfusion_compile.passes.graph.mutation import Order
from rainfusion_compile.passes.graph.nodes import example_of
from rainfusion_compile.passes.graph.symbolic_sizes import hint_of, shape_of
from rainfusion_compile.passes.normalize.spelling import NotSdpa, Step, tensor_of

_FUNCTIONS = {
    *(torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor, torch.cumsum, torch.cat),
    *(torch.mul, torch.add, F.pad, torch._C._nn.pad, operator.mul, operator.add, operator.getitem, operator.setitem),
}
_METHODS = {"cumsum", "new_zeros", "to", "int", "long", "mul", "add", "contiguous", "clone"}
_SMALL = 4096


def samples(operands: list[Any], lengths: list[Any], node: fx.Node, order: Order) -> tuple[list[fx.Node], list[Step]]:
    """The operands as ``[B, S, H, D]``, and the steps that pack ``[B, H, S, D]`` again.

    Raises:
        NotSdpa: unless it is proved that all samples are one sequence of the same length.
    """
    if any(len(shape_of(item)) != 3 for item in operands) or len(lengths) != 2:
        raise NotSdpa("packed sequences whose operands are not [B * S, H, D]")
    starts = [_constant(item, order.places[node], order) for item in lengths]
    total, found = shape_of(operands[0])[0], starts[0]
    if found is None or starts[1] is None:
        raise NotSdpa("packed sequences, whose lengths are known at run time only")
    batch = found.numel() - 1
    same = batch > 0 and total is not None and total % batch == 0 and all(shape_of(x)[0] == total for x in operands)
    if not same or any(item.tolist() != list(range(0, total + 1, total // batch)) for item in (found, starts[1])):
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
    for item, place in order.places.items():
        if place >= until:
            break
        example = example_of(item)
        if isinstance(example, torch.SymInt):
            values[item] = hint_of(example)  # who uses this makes the sizes of the graph those of this call
        elif item.op.startswith("call") and _calculable(item):
            inputs = item.all_input_nodes
            if all(values.get(source) is not None for source in inputs):
                values[item] = _value(item, values)
                continue
            for source in inputs if item.target is operator.setitem else ():
                values.pop(source, None)
        if item in order.writes and any(source in values for source in item.all_input_nodes):
            values = {known: value for known, value in values.items() if not isinstance(value, Tensor)}
    found = values.get(node)
    return found if isinstance(found, Tensor) and found.dim() == 1 else None


def _calculable(node: fx.Node) -> bool:
    if node.target not in (_FUNCTIONS if node.op == "call_function" else _METHODS):
        return False
    example = example_of(node)
    if node.target is operator.setitem:
        return True
    if not isinstance(example, Tensor) or example.is_floating_point() or example.is_complex():
        return False
    sizes = [hint_of(size) for size in example.shape]
    return all(size is not None and size <= _SMALL for size in sizes) and len(sizes) <= 1


def _value(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node, on CPU."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    cpu = torch.device("cpu")
    kwargs = {name: cpu if name == "device" else value for name, value in kwargs.items()}
    args = tree_map(lambda item: cpu if isinstance(item, torch.device) else item, args)
    with torch.no_grad(), _disable_current_modes():
        if callable(node.target):
            return node.target(*args, **kwargs)
        return getattr(args[0], node.target)(*args[1:], **kwargs)
