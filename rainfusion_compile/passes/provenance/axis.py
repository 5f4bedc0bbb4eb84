# SPDX-License-Identifier: Apache-2.0
"""Axes and dims: what the dimensions of a tensor are made of. What can be done with them: `axes`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Role = Literal["time", "row", "col"]


@dataclass(frozen=True)
class Source:
    """A tensor that axes stand side by side in: an input of the graph with `rank` dims, or a mesh (rank 0).

    A `parameter` holds no tokens. ``channels`` are the dims that an operator summed over as channels.
    """

    name: str
    rank: int = 0
    parameter: bool = False
    channels: set[int] = field(default_factory=set, compare=False)


class Axis:
    """One index space.

    Attributes:
        size: number of indices.
        role: what a convolution made of it, if one did.
        sources: ``(source, dim)`` places where this axis was seen as a dimension of its own.
        parts: the dims that it concatenates; empty for an ordinary axis.
        coordinate: counts positions (`arange`).
        permuted: holds another axis in an unknown order, so its place in a grid is unknown, whatever it meets.
        lost: the operator that made it, and did nobody knows what: permuted as well, but not known to be.
        conflict: two operators contradict each other about its layout.
        origin: the node of the graph that it first came out of.
        bound: what it was found to be; None as long as it is atomic.
        digit, cut: what it was taken from; at most one of them.
        settled: it was found to be something by itself, and its whole is bound to it: no longer a piece of that.
        resolving: it is being asked what it is; whatever it is found to be must not be made of it.
        digits, merges, products: what was made of it before, to be the same again: digits, dims that merged, products.
        mirror, reordered: the same turned round, and in an unknown order: see `permuted`.
    """

    __slots__ = (
        "bound",
        "conflict",
        "coordinate",
        "cut",
        "digit",
        "digits",
        "lost",
        "merges",
        "mirror",
        "origin",
        "parts",
        "permuted",
        "products",
        "reordered",
        "resolving",
        "role",
        "settled",
        "size",
        "sources",
    )

    def __init__(
        self,
        size: int,
        *,
        role: Role | None = None,
        sources: Iterable[tuple[Source, int]] = (),
        parts: tuple[Dim, ...] = (),
        coordinate: bool = False,
        permuted: bool = False,
        lost: str | None = None,
    ) -> None:
        self.size = size
        self.role = role
        self.sources = frozenset(sources)
        self.parts = parts
        self.coordinate = coordinate
        self.permuted = permuted or lost is not None
        self.lost = lost
        self.conflict = False
        self.origin: str | None = None
        self.bound: Dim | None = None
        self.digit: tuple[Axis, int] | None = None
        self.cut: Cut | None = None
        self.settled = False
        self.resolving = False
        self.digits: dict[tuple[int, int], Axis] = {}
        self.merges: dict[tuple[tuple[Axis, ...], tuple[int, ...]], list[Dim]] = {}
        self.products: dict[Dim, Axis] = {}
        self.mirror: Axis | None = None
        self.reordered: Axis | None = None

    @property
    def known(self) -> bool:
        """Whether it says anything about the layout of tokens."""
        return bool(self.role or self.sources or self.parts or self.coordinate)

    @property
    def is_piece(self) -> bool:
        """Whether it is only known as a piece of its whole."""
        return not (self.settled or self.resolving) and (self.digit is not None or self.cut is not None)

    def __repr__(self) -> str:
        parts = " | ".join(map(repr, self.parts))
        flags = "?" * self.permuted + "!" * self.conflict
        return f"{self.role or ''}{self.size}{flags}" + (f"<{parts}>" if parts else "")


Dim = tuple[Axis, ...]
Dims = tuple[Dim, ...]


class Cut(NamedTuple):
    """The indices ``start, start + step, ...`` below ``stop`` of an axis."""

    whole: Axis
    start: int
    stop: int
    step: int


def fresh(size: int) -> Dim:
    """A dim of which nothing is known."""
    return () if size == 1 else (Axis(size),)


def lost(size: int, where: str) -> Dim:
    """A dim of which nothing is known, and nothing can be learnt: what an operator made that is not understood."""
    return () if size == 1 else (Axis(size, lost=where),)


def size_of(dim: Iterable[Axis]) -> int:
    """Number of indices of a dim."""
    return math.prod(axis.size for axis in dim)


def find(axis: Axis) -> Axis:
    """The axis that stands for all those joined with this one."""
    while axis.bound is not None and len(axis.bound) == 1:
        (up,) = axis.bound
        if up.bound is not None and len(up.bound) == 1:
            axis.bound = up.bound
        axis = up
    return axis
