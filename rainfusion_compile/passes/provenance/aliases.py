# SPDX-License-Identifier: Apache-2.0
"""Tensors that share memory: what is written into one is seen through all the others."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from rainfusion_compile.passes.graph.mutation import storage_of
from rainfusion_compile.passes.provenance.axes import join, resolve, same, take
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, fresh, size_of
from rainfusion_compile.passes.provenance.lineage import (
    Lineage,
    ToldApart,
    index_of,
    is_mixed,
    lineage_of,
    side_by_side,
    union_of,
)
from rainfusion_compile.passes.provenance.others import of_others_beside
from rainfusion_compile.passes.provenance.rules import dims_of, set_dims
from rainfusion_compile.passes.provenance.rules_views import regroup

_WRITTEN = "memory that was written into"


class Aliases:
    """The tensors of one trace by the memory that they share."""

    def __init__(self) -> None:
        self._sharing: dict[int, list[weakref.ref[Tensor]]] = {}

    def add(self, tensor: Tensor) -> None:
        """Remember a tensor for as long as it lives."""
        sharing = self._sharing.setdefault(storage_of(tensor), [])
        if not any(other() is tensor for other in sharing):
            sharing[:] = [other for other in sharing if other() is not None] + [weakref.ref(tensor)]

    def wrote(self, tensor: Tensor, before: Dims, lineage: Lineage) -> None:
        """A tensor that was this before was written into: what shares its memory is something else now, too."""
        after = dims_of(tensor)
        pairs = zip(before, after, strict=True) if len(before) == len(after) else ()
        stayed = [new for old, new in pairs if same(old, new)]
        unchanged = len(stayed) == len(after) and lineage.cuts == lineage_of(tensor).cuts
        for reference in self._sharing.get(storage_of(tensor), []):
            other = reference()
            if other is None or other is tensor or _are_apart(other, tensor):
                continue
            if unchanged:
                found = union_of([other, tensor])._replace(cuts=lineage_of(other).cuts)
                _set_beside(other, tensor, dims_of(other), found)
                continue
            known = _with_slot(other, tensor) if tensor._base is other else None
            if known is None and _elements(other) == _elements(tensor) is not None:
                known = regroup(after, other.shape)
            dims = known or _where_they_stayed(dims_of(other), stayed)
            _set_beside(other, tensor, dims, side_by_side([other, tensor]).over(dims))


def _set_beside(base: Tensor, view: Tensor, dims: Dims, lineage: Lineage) -> None:
    """Set dims and lineage of a tensor that a view of it was written into, beside the rest."""
    if view.numel() >= base.numel():
        return set_dims(base, dims, lineage)
    if (place := _place(base, view)) is None:
        written = ToldApart(frozenset(chain(*map(resolve, dims))), object(), throughout=True)
        return set_dims(base, dims, lineage._replace(told=lineage.told | {written}))
    own, number = list(dims_of(view)), place[0]
    own[number:number] = [()] * (base.dim() - view.dim())
    set_dims(base, *of_others_beside([base, view], [dims_of(base), tuple(own)], dims, number, lineage))


def _where_they_stayed(dims: Dims, stayed: Sequence[Dim]) -> Dims:
    """The dims of a tensor of which a view was written into that had ``stayed`` whole, before and after.

    Of two dims that are the same, as of all tokens' products with all, the view may have one and be an index of the
    other.
    """
    return tuple(d if _count(d, dims) <= _count(d, stayed) else fresh(size_of(d), lost=_WRITTEN) for d in dims)


def _count(dim: Dim, dims: Sequence[Dim]) -> int:
    return sum(same(dim, one) for one in dims)


def _elements(tensor: Tensor) -> tuple[int, int] | None:
    """Which elements of its memory a tensor is, if it is a run of them, in their order."""
    return (int(tensor.storage_offset()), tensor.numel()) if tensor.is_contiguous() else None


def _are_apart(one: Tensor, other: Tensor) -> bool:
    """Whether one of two tensors ends in their memory before the other begins."""
    return _last_of(one) < other.storage_offset() or _last_of(other) < one.storage_offset()


def _last_of(tensor: Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()) + sum((size - 1) * stride for size, stride in sizes)


def _with_slot(base: Tensor, view: Tensor) -> Dims | None:
    """The dims of a tensor of which one slice, `view`, was written into; None if it is no slice along one dim."""
    place = _place(base, view)
    if place is None:
        return None
    number, start, step = place
    own, new = list(dims_of(base)), list(dims_of(view))
    if view.dim() < base.dim():
        new.insert(number, index_of(view, base.shape[number]) or (Axis(1, lost=_WRITTEN),))
    size, stop = base.shape[number], start + size_of(new[number]) * step
    if size_of(new[number]) == size:
        return tuple(new)
    if is_mixed(view, size):
        new[number] = (Axis(size_of(new[number]), lost=_WRITTEN),)
    dims = [old if at == number else _overwritten(old, new[at]) for at, old in enumerate(own)]
    pieces = take(own[number], 0, start), new[number], take(own[number], stop, size)
    whole = join(piece for piece in pieces if piece is not None and size_of(piece))
    dims[number] = whole if step == 1 else fresh(size, lost=_WRITTEN)
    return tuple(dims)


def _overwritten(old: Dim, new: Dim) -> Dim:
    """A dim beside the one that was written along: every slice must have the same."""
    blank = not any(axis.known or axis.permuted for axis in resolve(old))
    return new if blank or same(old, new) else fresh(size_of(old), lost=_WRITTEN)


def _place(base: Tensor, view: Tensor) -> tuple[int, int, int] | None:
    """The dim of `base` that `view` is a slice along, where the slice begins, and its step."""
    offset = view.storage_offset() - base.storage_offset()
    ours = list(zip(base.shape, base.stride(), strict=True))
    for number, (size, stride) in enumerate(ours):
        theirs = list(zip(view.shape, view.stride(), strict=True))
        if view.dim() == base.dim() - 1:
            theirs.insert(number, (1, stride))
        if len(theirs) != len(ours) or not stride or offset % stride or theirs[number][1] % stride:
            continue
        start, (count, apart) = offset // stride, theirs[number]
        step = apart // stride if count > 1 else 1
        others = ours[:number] + ours[number + 1 :], theirs[:number] + theirs[number + 1 :]
        if others[0] == others[1] and start >= 0 and step and start + (count - 1) * step < size:
            return number, start, step
    return None
