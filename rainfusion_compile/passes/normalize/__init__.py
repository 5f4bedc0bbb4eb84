# SPDX-License-Identifier: Apache-2.0
"""Other spellings of attention: by hand, by the operators of flash-attn and of torch, by `nn.MultiheadAttention`.

Each spelling is one matcher in one file, which tells an attention in the words of `scaled_dot_product_attention`.
`normalize` writes that next to the original and lets the graph use it, so whatever is proved and rewritten later knows
SDPA only. What stays dense is put back by `Normalized.keep_only` as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from rainfusion_compile.passes.attention_match import AttentionMatch, DenseReason, Reason
from rainfusion_compile.passes.graph.mutation import Order, mutated
from rainfusion_compile.passes.graph.nodes import SDPA, describe, emit, module_name, subgraphs
from rainfusion_compile.passes.graph.symbolic_sizes import hint_of, shape_of
from rainfusion_compile.passes.normalize import aten, by_hand, flex, fused_operators, multi_head
from rainfusion_compile.passes.normalize.spelling import HOLDS, Asked, Attention, NotSdpa, Step, tensor_of

Matcher = Callable[[fx.Node, Order], Attention | None]
MATCHERS: tuple[Matcher, ...] = (by_hand.read, fused_operators.read, multi_head.read, flex.read, aten.read)


@dataclass
class Normalized:
    """The stand-ins in a graph: by SDPA node, the original and the nodes that were written.

    ``asks``: what it would help to know of inputs, by their numbers.
    """

    gm: fx.GraphModule
    refused: list[AttentionMatch] = field(default_factory=list)
    asks: dict[int, Asked] = field(default_factory=dict)
    substitutes: dict[fx.Node, tuple[Attention, list[fx.Node]]] = field(default_factory=dict)

    def in_order(self, matches: list[AttentionMatch]) -> list[AttentionMatch]:
        """Matches, and the attentions that could not be told as SDPA, in the order they run; nested ones last."""
        places = {("", node.name): place for place, node in enumerate(self.gm.graph.nodes)}  # as in copies of the graph
        every = [*matches, *self.refused]
        return sorted(every, key=lambda match: places.get((match.graph, match.node.name), len(places)))

    def keep_only(self, sparse: Iterable[fx.Node]) -> None:
        """Keep the stand-ins that become sparse, and drop their originals; put all other originals back."""
        chosen = set(sparse)
        for stand_in, (found, nodes) in self.substitutes.items():
            if stand_in in chosen:
                _erase(self.gm.graph, found)
                continue
            nodes[-1].replace_all_uses_with(found.out)
            for node in reversed(nodes):
                node.graph.erase_node(node)
        self.substitutes = {}


def normalize(gm: fx.GraphModule, holds: Collection[int] = ()) -> Normalized:
    """Let a graph use SDPA wherever it spells attention in another way that is understood.

    ``holds``: numbers of inputs that hold what was asked of them before.
    """
    normalized, contradicting = Normalized(gm), set[int]()
    inputs = {node: number for number, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    for node, number in inputs.items():
        node.meta[HOLDS] = number in holds
    for name, graph in (("", gm), *subgraphs(gm)):
        nested = Reason(DenseReason.NESTED, f"inside a higher-order operator ({name})") if name else None
        order = Order(graph.graph)
        for node in list(graph.graph.nodes):
            try:
                found = _read(node, order)
                if found is None:
                    continue
                if nested is None:
                    stand_in, nodes = _substitute(gm.graph, found)
                    normalized.substitutes[stand_in] = found, nodes
                    continue
                reason, tokens, asks = nested, None, dict[int, Asked]()
            except NotSdpa as refusal:
                reason, tokens = nested or refusal.reason, refusal.tokens
                asks = {} if nested else {inputs[item]: asked for item, asked in refusal.lacks}
            refused = AttentionMatch(node, name, module_name(node), tokens=tokens, reason=reason, waits=bool(asks))
            normalized.refused.append(refused)
            for number, asked in asks.items():
                if normalized.asks.setdefault(number, asked) != asked:
                    contradicting.add(number)
    for number in contradicting:  # what holds then would be one or the other
        del normalized.asks[number]
    return normalized


def _read(node: fx.Node, order: Order) -> Attention | None:
    found = next((found for read in MATCHERS if (found := read(node, order)) is not None), None)
    if found is not None:
        if any(None in shape_of(item) for item in (found.out, *(base for base, _ in found.operands))):
            raise NotSdpa("sizes that are known at run time only", DenseReason.ANY_SIZE)
        if order.written(found.first, found.out, but=found.chain):
            raise NotSdpa("something is written in place between scores and output")
    return found


def _substitute(graph: fx.Graph, found: Attention) -> tuple[fx.Node, list[fx.Node]]:
    """Write an attention as SDPA behind its original, and let the graph use it.

    Returns the SDPA node, and all new nodes, of which the last one stands for the original's output. Raises NotSdpa if
    that cannot be done; the graph is as before.
    """
    out, example = found.out, tensor_of(found.out)
    users, nodes = list(out.users), list[fx.Node]()
    shared: dict[Any, fx.Node] = {}

    def write(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with torch.enable_grad():  # gradients must stay visible to the rule that keeps them dense
            nodes.append(emit(out, target, *args, **kwargs))
        return nodes[-1]

    def through(node: fx.Node, steps: Iterable[Step]) -> fx.Node:
        for step in steps:
            key = (node, *map(repr, step))
            if key not in shared:
                shared[key] = write(step[0], node, *step[1:])
            node = shared[key]
        return node

    try:
        with graph.inserting_before(out.next):
            q, k, v = operands = [through(node, steps) for node, steps in found.operands]
            given: dict[str, Any] = {"dropout_p": found.dropout, "is_causal": found.causal, "scale": found.scale}
            if found.mask is not None:
                given["attn_mask"] = through(*found.mask) if isinstance(found.mask, tuple) else found.mask(write)
            stand_in = graph.call_function(SDPA[0], (q, k, v), {**given, "enable_gqa": True})
            nodes.append(stand_in)
            describe(stand_in, out, _output_like(found, q, v))
            new = through(found.finish(write, stand_in, operands) if found.finish else stand_in, found.after)
            now = tensor_of(new)
            alike = tuple(map(hint_of, now.stride())) == tuple(map(hint_of, example.stride()))
            if not alike or shape_of(new) != shape_of(out) or now.dtype != example.dtype:
                raise NotSdpa("output cannot be given the shape, dtype and strides it had")
    except Exception as error:
        for node in reversed(nodes):
            graph.erase_node(node)
        raise error if isinstance(error, NotSdpa) else NotSdpa(f"cannot be spelled as SDPA: {error}") from error
    for user in users:
        user.replace_input_with(out, new)
    return stand_in, nodes


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


def _erase(graph: fx.Graph, found: Attention) -> None:
    """Erase an original that nobody uses any more, and what it alone used."""
    todo, gone = [found.out], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in gone:
            continue
        for user in [*node.users] if node is found.first else []:
            if not user.users:  # unused outputs of several
                graph.erase_node(user)
        mine = node in found.chain or node is found.first
        if node.users or node.op in ("placeholder", "output") or (mutated(node) and not mine):
            continue
        todo += node.all_input_nodes
        gone.add(node)
        graph.erase_node(node)
