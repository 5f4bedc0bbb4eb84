# SPDX-License-Identifier: Apache-2.0
"""Axes and dims: what the dimensions of a tensor are made of. What can be done with them: `axes`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, NamedTuple

Role = Literal["time", "row", "col"]
ACROSS = "a slice across the borders of axes"
"""Where what may still be a sequence in order is `lost`."""


@dataclass(frozen=True)
class Source:
    """A tensor that axes stand side by side in: an input of the graph with `rank` dims, or a mesh (rank 0).

    A `parameter` holds no tokens. ``channels`` are the dims that an operator summed over as channels.
    """

    name: str
    rank: int = 0
    parameter: bool = False
    channels: set[int] = field(default_factory=set, compare=False)


@dataclass(eq=False, repr=False, slots=True)
class Axis:
    """One index space of `size` indices."""

    size: int
    _: KW_ONLY
    role: Role | None = None  # what a convolution made of it, if one did
    sources: frozenset[tuple[Source, int]] = frozenset()  # places where it was seen as a dimension of its own
    parts: tuple[Dim, ...] = ()  # the dims that it concatenates; empty for an ordinary axis
    coordinate: bool = False  # counts positions (`arange`)
    handed_over: bool = False  # a dim, but not the last, of what another graph made of its tokens
    several: bool = False  # its indices are computed from different inputs, as of two videos beside each other
    ranks: bool = False  # the numbers of the ranks of a group, each of which has something else
    permuted: bool = False  # holds another axis in an unknown order: its place in a grid is unknown, whatever it meets
    lost: str | None = None  # the operator that made it, and did nobody knows what: permuted too, but not known to be
    conflict: bool = False  # two operators contradict each other about its layout
    origin: str | None = None  # the node of the graph that it first came out of
    bound: Dim | None = None  # what it was found to be; None as long as it is atomic
    digit: tuple[Axis, int] | None = None  # what it was taken from, and its stride there
    cut: Cut | None = None  # the same of a slice; at most one of the two
    run: Cut | None = None  # what a concatenation is a run of, of which a rank has its part; it is not resolved by this
    resampled: Cut | None = None  # what a kernel made it of, position by position, in the same direction
    settled: bool = False  # found to be something by itself, and its whole is bound to it: no longer a piece of that
    resolving: bool = False  # being asked what it is; whatever it is found to be must not be made of it
    # what was made of it before, to be the same again; turned round and in an unknown order: see `permuted`
    digits: dict[tuple[int, int], Axis] = field(default_factory=dict)
    merges: dict[tuple[Dim, tuple[int, ...]], list[Dim]] = field(default_factory=dict)
    products: dict[Dim, Axis] = field(default_factory=dict)
    mirror: Axis | None = None
    reordered: Axis | None = None

    def __post_init__(self) -> None:
        self.permuted |= self.lost is not None

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


def fresh(size: int, *, permuted: bool = False, lost: str | None = None) -> Dim:
    """A dim of which nothing is known; or can be learnt, if it was `lost` in an operator that is not understood."""
    return () if size == 1 else (Axis(size, permuted=permuted, lost=lost),)


def size_of(dim: Iterable[Axis]) -> int:
    """Number of indices of a dim."""
    return math.prod(axis.size for axis in dim)


def long(dim: Iterable[Axis]) -> list[Axis]:
    """The axes of a dim that have more than one index."""
    return [axis for axis in dim if axis.size > 1]


def find(axis: Axis) -> Axis:
    """The axis that stands for all those joined with this one."""
    while axis.bound is not None and len(axis.bound) == 1:
        (up,) = axis.bound
        if up.bound is not None and len(up.bound) == 1:
            axis.bound = up.bound
        axis = up
    return axis


def reordered(axis: Axis) -> Axis:
    """An axis in an unknown order."""
    axis.reordered = axis.reordered or Axis(axis.size, permuted=True, lost=axis.lost)
    return axis.reordered
