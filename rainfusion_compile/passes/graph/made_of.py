# SPDX-License-Identifier: Apache-2.0
"""Which of a graph's inputs have a part in what a node holds."""

from __future__ import annotations

from types import NoneType
from typing import Any

from torch import fx, nn

from rainfusion_compile.passes.graph.mutation import mutated, storages_of
from rainfusion_compile.passes.graph.nodes import example_of, operator_name, tensor_at

_LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}  # a second tensor tells how, and gives no values


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values one is made of."""
    return node.all_input_nodes[:1] if operator_name(node) in _LIKE else node.all_input_nodes


def inputs_of_nodes(graph: fx.Graph) -> dict[fx.Node, frozenset[int]]:
    """The numbers of the tensors that each node is made of, with all that is ever written into its memory.

    Inputs that are parameters are left out.
    """
    values = ((number, node, tensor_at(node)) for number, node in enumerate(graph.find_nodes(op="placeholder")))
    tensors = ((number, node) for number, node, value in values if not isinstance(value, NoneType | nn.Parameter))
    numbers = {node: frozenset([number]) for number, node in tensors}
    writes = {node: written for node in graph.nodes if (written := mutated(node))}
    storages = {node: _storages(node) if writes else set() for node in graph.nodes}
    into: dict[Any, frozenset[int]] = {}
    while True:  # until nothing is new: what is written late may be seen by an earlier name
        before, found = dict(into), dict(numbers)
        for node in graph.nodes:
            sources = [found[item] for item in value_inputs(node)] + [into[one] for one in storages[node] & into.keys()]
            found[node] = found.get(node, frozenset()).union(*sources)
            for one in {one for item in writes.get(node, ()) for one in storages[item]}:
                into[one] = into.get(one, frozenset()) | found[node]
        if into == before:
            return found


def _storages(node: fx.Node) -> set[Any]:
    """The memory of a node's value; one for all whose memory does not show."""
    value = example_of(node)
    return {None} if value is None else storages_of([value])
