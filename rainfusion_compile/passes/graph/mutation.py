# SPDX-License-Identifier: Apache-2.0
"""What shows of a node: which tensors it may write into, and whether its graph may be run for nothing.

Asked by every pass, and answered here only, by schema. What is not known may write into all that it is given.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from rainfusion_compile.passes.graph.nodes import arguments, example_of

_NAMES = "add sub mul truediv floordiv pow mod and or xor matmul lshift rshift"
_IN_PLACE = {getattr(operator, f"i{name}") for name in _NAMES.split()} | {operator.setitem, operator.delitem, setattr}
_METHODS = {"__setitem__", "__delitem__", *(f"__i{name}__" for name in _NAMES.split())}
# Their functions do as their names say: one that ends in "_" writes into its first argument.
KNOWN = ("torch", "_operator", "operator", "builtins", "math", "_VariableFunctions", "einops")
_NAMESPACES = ("aten", "prims", "prim", "rainfusion")
_ALSO_RANDOM = ("gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d", "multi_head_attention_forward")


def mutated(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments of a node that it may write into. Their views and bases change with them."""
    return tuple(dict.fromkeys(item for item in tree_leaves(list(_written(node))) if isinstance(item, fx.Node)))


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
        self.writes = [node for node in self.places if mutated(node)]

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
    """The same number for tensors that share memory, under `vmap` too."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def repeatable(graph: fx.Graph) -> bool:
    """Whether a graph may be run, its outputs be dropped, and be run again for the same call.

    It writes into nothing that was there before, draws no random numbers, and calls nothing but PyTorch's own functions
    and ours: others, and collectives above all, may count how often they are called. No tensor is of a subclass.
    """
    outer = [example_of(node) for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    if any(is_traceable_wrapper_subclass(value) for value in outer) or not all(map(_is_quiet, graph.nodes)):
        return False
    written = [example_of(item) for node in graph.nodes for item in mutated(node)]
    known = all(value is not None for value in (*outer, *written))
    return not written or (known and storages_of(outer).isdisjoint(storages_of(written)))


def _is_quiet(node: fx.Node) -> bool:
    target: Any = node.target
    if node.op == "call_module" or isinstance(target, HigherOrderOperator):
        return False
    if node.op not in ("call_function", "call_method"):
        return True
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        packet = target.overloadpacket if isinstance(target, OpOverload) else target
        namespace, _, name = packet._qualified_op_name.partition("::")
        return namespace in _NAMESPACES and not (namespace == "aten" and _is_random(node, name))
    if node.op == "call_function":
        module = (getattr(target, "__module__", None) or "torch").split(".")
        if module[0] not in KNOWN or module[:2] == ["torch", "distributed"]:
            return False
    return not _is_random(node, target if isinstance(target, str) else getattr(target, "__name__", ""))


def _is_random(node: fx.Node, name: str) -> bool:
    if not _draws(name):
        return False
    given = arguments(node, node.target if inspect.isfunction(node.target) else getattr(torch.ops.aten, name))
    return not (False in (given.get("training"), given.get("train")) or 0 in (given.get("p"), given.get("dropout_p")))


@cache
def _draws(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    overloads = packet.overloads() if isinstance(packet, OpOverloadPacket) else ()
    tag = torch.Tag.nondeterministic_seeded
    return name in _ALSO_RANDOM or any(tag in getattr(packet, overload).tags for overload in overloads)
