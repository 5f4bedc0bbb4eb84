# SPDX-License-Identifier: Apache-2.0
"""What is known of a graph's inputs and outputs: tokens of which grid, and which of them are the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rainfusion_compile.options import Options
from rainfusion_compile.passes.provenance.axes import join, same
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, fresh, size_of
from rainfusion_compile.passes.provenance.find_layout import find_layout
from rainfusion_compile.sparsity.layout import Grids, VideoLayout, as_grids


@dataclass(frozen=True)
class CarriedDim:
    """A dimension of tokens; dims of equal `identity` have the same positions in the same order.

    `lineage`: whose tokens these are, in names that mean the same for all inputs of a call.
    """

    grid: Grids
    text: tuple[int, ...]
    identity: Any
    lineage: tuple[Any, ...] = ()


CarriedDims = tuple[CarriedDim | None, ...]
Carried = tuple[CarriedDims | None, ...]
"""For each input of a graph."""


@dataclass(frozen=True)
class Told:
    """What is known of a call's tokens from outside its graph: what its inputs carry, what a context says."""

    carried: Carried = ()
    grid: Grids | None = None
    text: tuple[int, ...] | None = None

    def __bool__(self) -> bool:
        return any(self.carried) or self.grid is not None

    def added_to(self, options: Options) -> Options:
        """The options with the grid and the text that a context says, if it says any."""
        return options if self.grid is None else replace(options, grid=self.grid, text=self.text)


NOTHING = Told()


@dataclass(frozen=True)
class FromInput:
    """The identity of dimension `dim` of input number `number`."""

    number: int
    dim: int


@dataclass(frozen=True)
class FromTable:
    """The identity of the tokens that input number `number`, a table of positions, is about."""

    number: int


def dims_from(carried: CarriedDims, shape: Sequence[int], known: dict[Any, Dim]) -> Dims:
    """The dims of an input that carries this; `known` has the dims of the identities seen so far."""
    dims = []
    for size, dim in zip(shape, carried, strict=True):
        if dim is None:
            dims.append(fresh(size))
            continue
        if dim.identity not in known:
            known[dim.identity] = _tokens(dim)
        assert size_of(known[dim.identity]) == size, f"{dim} carried by a dimension of {size}"
        dims.append(known[dim.identity])
    return tuple(dims)


def _tokens(dim: CarriedDim) -> Dim:
    parts = [_text(dim.text[0])]
    for (time, row, col), after in zip(as_grids(dim.grid), dim.text[1:], strict=True):
        parts += [(Axis(time, role="time"), Axis(row, role="row"), Axis(col, role="col")), _text(after)]
    return join(part for part in parts if size_of(part))


def _text(tokens: int) -> Dim:
    return (Axis(tokens),)


def carried_out(
    outputs: Sequence[tuple[Dims, tuple[Any, ...]] | None], inputs: Sequence[Dims | None], told: Carried = ()
) -> Carried:
    """What the outputs of a graph will carry: by their dims, and the names of their lineage.

    Identities are inputs' where tokens come from there, else numbers.

    Tokens of which nothing but a table of positions tells are not followed further: who needs it is handed the table.
    """
    noted: list[tuple[Dim, Any]] = []
    tables: list[tuple[Dim, Any]] = []
    others: list[tuple[Dim, Any]] = []
    for number, dims in enumerate(inputs):
        known = told[number] if number < len(told) else None
        for place, dim in enumerate(dims or ()):
            source = known and known[place]
            if source and isinstance(source.identity, FromTable):
                tables.append((dim, None))
            else:
                (noted if source else others).append((dim, FromInput(number, place)))
    seen = [*noted, *tables, *others]
    found: list[CarriedDims | None] = []
    for dims, lineage in (output or ((), ()) for output in outputs):
        carried = [_carried(dim, lineage, seen) for dim in dims]
        found.append(tuple(carried) if any(carried) else None)
    return tuple(found)


def _carried(dim: Dim, lineage: tuple[Any, ...], seen: list[tuple[Dim, Any]]) -> CarriedDim | None:
    layout = find_layout(dim)
    if not isinstance(layout, VideoLayout):
        return None
    for other, identity in seen:
        if size_of(other) == size_of(dim) and same(other, dim):
            return None if identity is None else CarriedDim(layout.grid, layout.text, identity, lineage)
    seen.append((dim, len(seen)))
    return CarriedDim(layout.grid, layout.text, len(seen) - 1, lineage)
