# SPDX-License-Identifier: Apache-2.0
"""What a matcher hands over: one attention in SDPA's words. And how matchers look at nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from rainfusion_compile.passes.attention_match import DenseReason, Reason
from rainfusion_compile.passes.graph.nodes import example_of

Step = tuple[Any, ...]  # a function or a method's name, and what follows its first argument
Write = Callable[..., fx.Node]  # writes a call of a function, or of a method by its name, into the graph

HOLDS = "rainfusion_holds"  # in an input's meta: whether it is known to hold what was asked of it


class Asked(NamedTuple):
    """What it would help to know of an input: that none of its integers is less than one, `low`; or that those of a row
    are each between one of `low` and one of `high`.
    """

    low: tuple[int, ...]
    high: tuple[int, ...] | None = None


NOT_NEGATIVE = Asked((0,))


class NotSdpa(Exception):
    """An attention that cannot be told in SDPA's words: why, and over how many queries, if that is known.

    `lacks`: it could, were that known of these inputs of the graph.
    """

    tokens: int | None = None
    lacks: frozenset[tuple[fx.Node, Asked]] = frozenset()

    def __init__(self, message: str, kind: DenseReason = DenseReason.SPELLING) -> None:
        super().__init__(message)
        self.reason = Reason(kind, message)


@contextmanager
def over(tokens: int | None) -> Iterator[None]:
    """Whatever is refused here is an attention over that many queries."""
    try:
        yield
    except NotSdpa as reason:
        reason.tokens = tokens
        raise


@dataclass
class Attention:
    """One attention in SDPA's words: nodes, with the steps that make SDPA's operands of them.

    Attributes:
        first, out: the nodes between which the operands are read and the output is made.
        operands: query, key and value.
        mask: SDPA's, or what writes it.
        after, before: steps from SDPA's output to `out`, and back as views; None where that is no view, and memory is
            ``[B, S, H, D]``.
        chain: nodes that nobody else uses, even where they write in place.
        finish: writes what else is to be done to SDPA's output, given its three operands, before `after`.
    """

    first: fx.Node
    out: fx.Node
    operands: list[tuple[fx.Node, list[Step]]]
    after: list[Step]
    before: list[Step] | None = None
    mask: tuple[fx.Node, list[Step]] | Callable[[Write], fx.Node] | None = None
    scale: float | None = None
    causal: bool = False
    dropout: float = 0.0
    chain: set[fx.Node] = field(default_factory=set)
    finish: Callable[[Write, fx.Node, list[fx.Node]], fx.Node] | None = None


def tensor_of(node: Any) -> Tensor:
    """The tensor that Dynamo saw. Raises NotSdpa if it saw none, or one of a subclass."""
    example = example_of(node)
    if type(example) is not FakeTensor:
        raise NotSdpa("operands are not known", DenseReason.NO_TENSOR)
    return example


def number_of(value: Any) -> float | None:
    """A known number; None of anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def only_first(node: fx.Node, others: str) -> fx.Node:
    """A node that returns a tensor, or the first of several. Raises NotSdpa if any of the others is used."""
    if isinstance(example_of(node), Tensor):
        return node
    first = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if len(first) != 1 or any(user.users or user.target is not operator.getitem for user in {*node.users} - {*first}):
        raise NotSdpa(f"{others} are used elsewhere" if len(node.users) > len(first) else "output is not used once")
    return first[0]
