# SPDX-License-Identifier: Apache-2.0
"""May this node write into a tensor, and into which? Asked by every pass, and answered here only, by schema.

What is not known may write into all that it is given.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._pytree import tree_leaves

from rainfusion_compile.passes.graph.nodes import arguments, example_of

_NAMES = "add sub mul truediv floordiv pow mod and or xor matmul lshift rshift"
_IN_PLACE = {getattr(operator, f"i{name}") for name in _NAMES.split()} | {operator.setitem, operator.delitem, setattr}
_METHODS = {"__setitem__", "__delitem__", *(f"__i{name}__" for name in _NAMES.split())}
# Their functions do as their names say: one that ends in "_" writes into its first argument.
KNOWN = ("torch", "_operator", "operator", "builtins", "math", "_VariableFunctions", "einops")


def mutated(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments of a node that it may write into. Their views and bases change with them."""
    return tuple(dict.fromkeys(item for item in tree_leaves(list(_written(node))) if isinstance(item, fx.Node)))


def mutates(node: fx.Node) -> bool:
    """Whether a node may write into a tensor that others read."""
    return bool(mutated(node))


def written_arguments(overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """What a call of an operator writes into, as its schema says: tensors, or lists of such."""
    for number, argument in enumerate(overload._schema.arguments if overload._schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[number] if number < len(args) else kwargs.get(argument.name)


def _written(node: fx.Node) -> Iterator[Any]:
    target: Any = node.target
    yield node.kwargs.get("out")
    if node.op == "call_method":
        if target in _METHODS or _is_in_place(target):
            yield node.args[:1]
    elif node.op == "call_module" or isinstance(target, HigherOrderOperator):
        yield node.all_input_nodes
    elif node.op != "call_function":
        return
    elif isinstance(target, (OpOverload, OpOverloadPacket)):
        every = [target] if isinstance(target, OpOverload) else [getattr(target, name) for name in target.overloads()]
        for overload in every:
            yield from written_arguments(overload, node.args, dict(node.kwargs))
    elif (module := getattr(target, "__module__", None) or "torch").split(".")[0] not in KNOWN:
        yield node.all_input_nodes
    elif (
        target in _IN_PLACE
        or (module not in ("operator", "_operator") and _is_in_place(getattr(target, "__name__", "")))
        or (module == "torch.nn.functional" and arguments(node).get("inplace"))
    ):
        yield node.args[:1]


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


class Order:
    """Where the nodes of a graph stand, and which of them may write into a tensor that others read."""

    def __init__(self, graph: fx.Graph) -> None:
        self.places = {node: place for place, node in enumerate(graph.nodes)}
        self.writes = [node for node in self.places if mutates(node)]

    def written(self, first: fx.Node, last: fx.Node, but: Collection[fx.Node] = ()) -> bool:
        """Whether anything is written in place between two nodes."""
        start, end = self.places[first], self.places[last]
        return any(start < self.places[node] < end and node not in but for node in self.writes)


def written_storages(graph: fx.Graph) -> set[int]:
    """Memory that a graph writes into: what was read from there before may not be there any more."""
    return storages_of(example_of(node) for item in graph.nodes for node in mutated(item))


def storages_of(values: Iterable[Any]) -> set[int]:
    """The memory of all tensors among values, and in lists of such."""
    return {storage_of(value) for value in tree_leaves(list(values)) if isinstance(value, Tensor)}


def storage_of(tensor: Tensor) -> int:
    """The same number for tensors that share memory."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
