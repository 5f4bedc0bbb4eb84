# SPDX-License-Identifier: Apache-2.0
"""What graphs know of their tensors' tokens, carried from one graph of a broken model to the next.

A model that breaks into several graphs shows its grid in one of them, and does attention in others. The tensors that
pass between them carry what is known of their dimensions, as an attribute: it is true of this tensor in this call, is
read again on every call, and is gone with the tensor. A tensor that other code made in between carries nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rainfusion_compile.options import Options
from rainfusion_compile.passes.provenance.axes import Axis, Dim, Dims, fresh, join, same, size_of
from rainfusion_compile.passes.provenance.find_layout import find_layout
from rainfusion_compile.runtime.tensor_notes import note, noted
from rainfusion_compile.sparsity.layout import Grids, VideoLayout, as_grids

_NAME = "carried"


@dataclass(frozen=True)
class CarriedDim:
    """A dimension of tokens; dims of equal `identity` run over the same tokens in the same order."""

    grid: Grids
    text: tuple[int, ...]
    identity: Any


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
class _Input:
    """The identity of dimension `dim` of input number `number`."""

    number: int
    dim: int


def carried_by(args: Sequence[Any]) -> Carried:
    """What the inputs of a graph carry, with identities by number: equal for calls that are alike."""
    numbers: dict[Any, int] = {}
    found: list[CarriedDims | None] = []
    for arg in args:
        known = noted(arg, _NAME)
        if known is None:
            found.append(None)
            continue
        found.append(
            tuple(
                dim and CarriedDim(dim.grid, dim.text, numbers.setdefault(dim.identity, len(numbers))) for dim in known
            )
        )
    return tuple(found)


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


def carried_out(outputs: Sequence[Dims | None], inputs: Sequence[Dims | None]) -> Carried:
    """What the outputs of a graph will carry; identities are inputs' where tokens come from there, else numbers."""
    seen: list[tuple[Dim, Any]] = []
    for number, dims in enumerate(inputs):
        seen += [(dim, _Input(number, place)) for place, dim in enumerate(dims or ())]
    found: list[CarriedDims | None] = []
    for dims in outputs:
        carried = [_carried(dim, seen) for dim in dims or ()]
        found.append(tuple(carried) if any(carried) else None)
    return tuple(found)


def _carried(dim: Dim, seen: list[tuple[Dim, Any]]) -> CarriedDim | None:
    layout = find_layout(dim)
    if not isinstance(layout, VideoLayout):
        return None
    for other, identity in seen:
        if size_of(other) == size_of(dim) and same(other, dim):
            return CarriedDim(layout.grid, layout.text, identity)
    seen.append((dim, len(seen)))
    return CarriedDim(layout.grid, layout.text, len(seen) - 1)


def attach(outputs: Sequence[Any], carried: Carried, args: Sequence[Any]) -> None:
    """Let the outputs of a call with these arguments carry what is known of them."""
    call = object()
    for output, dims in zip(outputs, carried, strict=False):
        if dims is None or not isinstance(output, Tensor):
            continue
        named = tuple(dim and CarriedDim(dim.grid, dim.text, _identity(dim.identity, call, args)) for dim in dims)
        note(output, _NAME, named)


def _identity(identity: Any, call: object, args: Sequence[Any]) -> Any:
    if isinstance(identity, _Input):
        known = noted(args[identity.number], _NAME)
        dim = known and known[identity.dim]
        if dim:
            return dim.identity
    return call, identity
