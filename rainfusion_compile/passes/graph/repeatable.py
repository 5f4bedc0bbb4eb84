# SPDX-License-Identifier: Apache-2.0
"""May a graph be run for nothing? What is not known may do something that shows."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rainfusion_compile.passes.graph.mutation import KNOWN, mutated, storages_of
from rainfusion_compile.passes.graph.nodes import arguments, example_of

_NAMESPACES = ("aten", "prims", "prim", "rainfusion")
_ALSO_RANDOM = ("gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d", "multi_head_attention_forward")


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
