# SPDX-License-Identifier: Apache-2.0
"""What is known of a graph's inputs and outputs: tokens of which grid, and which of them are the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rainfusion_compile.passes.provenance.axes import join, resolve, same, slice_of
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, size_of
from rainfusion_compile.passes.provenance.find_layout import find_layout
from rainfusion_compile.passes.provenance.ranks import take_part
from rainfusion_compile.sparsity.layout import Grids, VideoLayout, as_grids


class Run(NamedTuple):
    """The places from `start` on, up to `stop`, of so many."""

    start: int
    stop: int
    of: int


class CarriedDim(NamedTuple):
    """A dimension of tokens, or of what may be such: without a grid, it is only known where else the same ones are."""

    grid: Grids | None
    text: tuple[int, ...]
    identity: Any  # dims of an equal one have the same positions in the same order
    lineage: tuple[Any, ...] = ()  # whose tokens these are, in names that mean the same for all inputs of a call
    run: Run | None = None  # the rest is about something longer, of which these places are there


CarriedDims = tuple[CarriedDim | None, ...]
Carried = tuple[CarriedDims | None, ...]
"""For each input of a graph."""


class Told(NamedTuple):
    """What is known of a call's tokens from outside its graph: what its inputs carry, what a context says.

    ``holds``: numbers of inputs that hold what was asked of them.
    """

    carried: Carried = ()
    grid: Grids | None = None
    text: tuple[int, ...] | None = None
    holds: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return any(self.carried) or self.grid is not None or bool(self.holds)


NOTHING = Told()


class FromInput(NamedTuple):
    """The identity of dimension `dim` of input number `number`."""

    number: int
    dim: int


class FromTable(NamedTuple):
    """The identity of the tokens that input number `number`, a table of positions, is about."""

    number: int


def laid_out(carried: Carried) -> dict[Any, Dim]:
    """The dims of the identities whose grid some input knows."""
    dims = (dim for one in carried for dim in one or () if dim is not None)
    return {dim.identity: _tokens(dim.grid, dim.text) for dim in dims if dim.grid is not None}


def dims_from(carried: CarriedDims, shape: Sequence[int], known: dict[Any, Dim]) -> Dims:
    """The dims of an input that carries this; `known` has the dims of identities, and gets those of new ones."""
    dims: list[Dim] = []
    table = any(dim is not None and isinstance(dim.identity, FromTable) for dim in carried)  # which holds no tokens
    for place, (size, dim) in enumerate(zip(shape, carried, strict=True)):
        run = (dim and dim.run) or Run(0, size, size)
        new: Dim = () if run.of == 1 else (Axis(run.of, handed_over=not table and place < len(shape) - 1),)
        dims.append(new if dim is None else take_part(known.setdefault(dim.identity, new), run.start, run.stop))
        assert size_of(dims[-1]) == size, f"{dim} carried by a dimension of {size}"
    return tuple(dims)


def _tokens(grid: Grids, text: tuple[int, ...]) -> Dim:
    parts: list[Dim] = [(Axis(text[0]),)]
    for (time, row, col), after in zip(as_grids(grid), text[1:], strict=True):
        parts += [(Axis(time, role="time"), Axis(row, role="row"), Axis(col, role="col")), (Axis(after),)]
    return join(part for part in parts if size_of(part))


def carried_out(
    outputs: Sequence[tuple[Dims, tuple[Any, ...]] | None],
    inputs: Sequence[Dims | None],
    told: Carried = (),
    least: int = 2,
    *,
    attends: bool = True,
) -> Carried:
    """What the outputs of a graph will carry: by their dims, and the names of their lineage.

    Of dims without a grid that is known, those of at least so many places: another graph may show it of one of them.
    Identities are inputs' where tokens come from there, else numbers. First of inputs that carry some themselves, of
    these of what is made of the most: a table that another graph made is nobody's tokens. Tokens of which nothing but a
    table of positions tells are not followed further: who needs it is handed the table. That is so of graphs that have
    attention; others, if not `attends`, may have turned queries and keys for one by the table.
    """
    ranked: list[tuple[tuple[int, int], Dim, Any]] = []
    for number, dims in enumerate(inputs):
        known = told[number] if number < len(told) else None
        for place, dim in enumerate(dims or ()):
            source = known[place] if known else None
            table = source is not None and isinstance(source.identity, FromTable)
            if table and not attends:
                continue
            whole, run = dim, source and source.run
            if run:
                whole, start, stop = slice_of(dim) or ((), 0, 0)
                if Run(start, stop, size_of(whole)) != run:  # it is known as something by itself, not as that run
                    continue
            rank = (int(table), -len(source.lineage)) if source else (2, 0)
            ranked.append((rank, whole, None if table else FromInput(number, place)))
    seen = [(dim, identity) for _, dim, identity in sorted(ranked, key=lambda one: one[0])]
    each = (tuple(_carried(dim, out[1], seen, least) for dim in out[0]) if out else () for out in outputs)
    return tuple(carried if any(carried) else None for carried in each)


def _carried(dim: Dim, lineage: tuple[Any, ...], seen: list[tuple[Dim, Any]], least: int) -> CarriedDim | None:
    found, run = slice_of(dim), None
    if found is not None and (_layout(found[0]) or not _layout(dim)) and _seen(dim, seen) == len(seen):
        run = Run(*found[1:], size_of(found[0]))
        dim = found[0]
    layout = _layout(dim)
    if layout is None and (size_of(dim) < max(least, 2) or any(one.permuted or one.conflict for one in resolve(dim))):
        return None
    identity = _seen(dim, seen)
    if identity == len(seen):
        seen.append((dim, identity))
    grid, text = (layout.grid, layout.text) if layout is not None else (None, ())
    return None if identity is None else CarriedDim(grid, text, identity, lineage, run)


def _seen(dim: Dim, seen: list[tuple[Dim, Any]]) -> Any:
    """The identity of a dim, the next number if it is new."""
    return next((one for other, one in seen if size_of(other) == size_of(dim) and same(other, dim)), len(seen))


def _layout(dim: Dim) -> VideoLayout | None:
    layout = find_layout(dim)
    return layout if isinstance(layout, VideoLayout) else None
