# SPDX-License-Identifier: Apache-2.0
"""Other spellings of attention: by hand, by the operators of flash-attn and of torch, by `nn.MultiheadAttention`.

Each spelling is one matcher in one file, which tells an attention in the words of `scaled_dot_product_attention`.
`normalize` writes that next to the original and lets the graph use it, so whatever is proved and rewritten later knows
SDPA only. What stays dense is put back by `Normalized.keep_only` as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import fx

from rainfusion_compile.passes.attention_match import AttentionMatch
from rainfusion_compile.passes.graph.mutation import Order
from rainfusion_compile.passes.graph.nodes import module_name, subgraphs
from rainfusion_compile.passes.graph.symbolic_sizes import shape_of
from rainfusion_compile.passes.normalize import by_hand, flex, fused_operators, multi_head
from rainfusion_compile.passes.normalize.spelling import Attention, NotSdpa
from rainfusion_compile.passes.normalize.substitute import erase, substitute
from rainfusion_compile.passes.reasons import DenseReason, Reason

MATCHERS: tuple[Callable[[fx.Node, Order], Attention | None], ...] = (
    by_hand.read,
    fused_operators.read,
    multi_head.read,
    flex.read,
)


@dataclass
class Normalized:
    """The stand-ins in a graph: by SDPA node, the original and the nodes that were written."""

    gm: fx.GraphModule
    refused: list[AttentionMatch] = field(default_factory=list)
    substitutes: dict[fx.Node, tuple[Attention, list[fx.Node]]] = field(default_factory=dict)

    def in_order(self, matches: list[AttentionMatch]) -> list[AttentionMatch]:
        """Matches, and the attentions that could not be told as SDPA, in the order they run."""
        places = {node.name: place for place, node in enumerate(self.gm.graph.nodes)}  # as in copies of the graph
        return sorted(
            [*matches, *self.refused],
            key=lambda match: len(places) if match.graph else places.get(match.node.name, len(places)),
        )

    def keep_only(self, sparse: Iterable[fx.Node]) -> None:
        """Keep the stand-ins that become sparse, and drop their originals; put all other originals back."""
        chosen = set(sparse)
        for stand_in, (found, nodes) in self.substitutes.items():
            if stand_in in chosen:
                erase(self.gm.graph, found)
                continue
            nodes[-1].replace_all_uses_with(found.out)
            for node in reversed(nodes):
                self.gm.graph.erase_node(node)
        self.substitutes = {}


def normalize(gm: fx.GraphModule) -> Normalized:
    """Let a graph use SDPA wherever it spells attention in another way that is understood."""
    normalized = Normalized(gm)
    order = Order(gm.graph)
    for node in list(gm.graph.nodes):
        try:
            found = _read(node, order)
            if found is not None:
                stand_in, nodes = substitute(gm.graph, found)
                normalized.substitutes[stand_in] = found, nodes
        except NotSdpa as refusal:
            normalized.refused.append(_refused(node, "", refusal.reason, refusal.tokens))
    for name, graph in subgraphs(gm):
        order = Order(graph.graph)
        for node in graph.graph.nodes:
            try:
                found, tokens = _read(node, order), None
            except NotSdpa as refusal:
                found, tokens = None, refusal.tokens
            else:
                if found is None:
                    continue
            reason = Reason(DenseReason.NESTED, f"inside a higher-order operator ({name})")
            normalized.refused.append(_refused(node, name, reason, tokens))
    return normalized


def _read(node: fx.Node, order: Order) -> Attention | None:
    for matcher in MATCHERS:
        found = matcher(node, order)
        if found is not None:
            if any(None in shape_of(node) for node in (found.out, *(node for node, _ in found.operands))):
                raise NotSdpa("sizes that are known at run time only", DenseReason.ANY_SIZE)
            if order.written(found.first, found.out, but=found.chain):
                raise NotSdpa("something is written in place between scores and output")
            return found
    return None


def _refused(node: fx.Node, graph: str, reason: Reason, tokens: int | None) -> AttentionMatch:
    return AttentionMatch(node, graph, module_name(node), tokens=tokens, reason=reason)
