# SPDX-License-Identifier: Apache-2.0
"""Write an attention as SDPA next to its original, and erase an original that is no longer used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rainfusion_compile.passes.graph.mutation import mutates
from rainfusion_compile.passes.graph.nodes import describe, emit
from rainfusion_compile.passes.graph.symbolic_sizes import hint_of, shape_of
from rainfusion_compile.passes.normalize.spelling import Attention, NotSdpa, Step, tensor_of


def substitute(graph: fx.Graph, found: Attention) -> tuple[fx.Node, list[fx.Node]]:
    """Write an attention as SDPA behind its original, and let the graph use it.

    Returns:
        The SDPA node, and all new nodes. The last one stands for the original's output.

    Raises:
        NotSdpa: if that cannot be done; the graph is as before.
    """
    out, example = found.out, tensor_of(found.out)
    users, nodes = list(out.users), list[fx.Node]()
    shared: dict[Any, fx.Node] = {}

    def through(node: fx.Node, steps: Iterable[Step]) -> fx.Node:
        for step in steps:
            key = (node, *map(repr, step))
            if key not in shared:
                with torch.enable_grad():  # gradients must stay visible to the rule that keeps them dense
                    shared[key] = emit(out, step[0], node, *step[1:])
                nodes.append(shared[key])
            node = shared[key]
        return node

    try:
        with graph.inserting_before(out.next):
            q, k, v = (through(node, steps) for node, steps in found.operands)
            given: dict[str, Any] = {"dropout_p": found.dropout, "is_causal": found.causal, "scale": found.scale}
            if found.mask is not None:
                given["attn_mask"] = through(*found.mask)
            stand_in = graph.call_function(F.scaled_dot_product_attention, (q, k, v), {**given, "enable_gqa": True})
            nodes.append(stand_in)
            describe(stand_in, out, _output_like(found, q, v))
            new = through(stand_in, found.after)
            now = tensor_of(new)
            alike = tuple(map(hint_of, now.stride())) == tuple(map(hint_of, example.stride()))
            if not alike or shape_of(new) != shape_of(out) or now.dtype != example.dtype:
                raise NotSdpa("output cannot be given the shape, dtype and strides it had")
    except Exception as error:
        for node in reversed(nodes):
            graph.erase_node(node)
        if isinstance(error, NotSdpa):
            raise
        raise NotSdpa(f"cannot be spelled as SDPA: {error}") from error
    for user in users:
        user.replace_input_with(out, new)
    return stand_in, nodes


def erase(graph: fx.Graph, found: Attention) -> None:
    """Erase an original that nobody uses any more, and what it alone used."""
    todo, gone = [found.out], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in gone:
            continue
        others = [user for user in node.users if node is found.first and not user.users]  # unused outputs of several
        for user in others:
            graph.erase_node(user)
        mine = node in found.chain or node is found.first
        if node.users or node.op in ("placeholder", "output") or (mutates(node) and not mine):
            continue
        todo += node.all_input_nodes
        gone.add(node)
        graph.erase_node(node)


def _output_like(found: Attention, query: fx.Node, value: fx.Node) -> Tensor:
    """What SDPA returns here, in the memory layout that the graph was traced with."""
    example: Any = tensor_of(found.out)
    with example.fake_mode, torch.enable_grad():
        if found.before is None:
            batch, heads, tokens, _ = tensor_of(query).shape
            shape = (batch, tokens, heads, tensor_of(value).shape[-1])
            return torch.empty(shape, dtype=example.dtype, device=example.device).transpose(1, 2)
        for function, *rest in found.before:
            example = function(example, *rest)
        return example
