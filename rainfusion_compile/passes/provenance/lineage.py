# SPDX-License-Identifier: Apache-2.0
"""What a tensor's elements are computed from: whose tokens they are, wherever they stand.

Axes tell positions, and two videos may share theirs: one table of positions added to both makes their axes one. So
self-attention takes more than equal axes: its queries and keys are computed from the same inputs, cut in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from torch import Tensor

from rainfusion_compile.passes.provenance.axes import cut_axis, is_of_data, origins, product, resolve, same, take
from rainfusion_compile.passes.provenance.axis import Axis, Cut, Dim, Dims, find, size_of


class Placed(NamedTuple):
    """A single index of an axis, or a `Pick`, which stands along another one, in places that numbers give it."""

    along: Axis
    whole: Axis
    at: object


class Pick(NamedTuple):
    """Something of an axis, as a sum over it with weights is, or a slice of it in another order; ``by`` whom, or the
    ends of a slice.

    ``moved``: it stands along the axis, but may have moved there, as what scans and convolutions make.
    """

    whole: Axis
    by: object
    moved: bool = False

    @property
    def is_slice(self) -> bool:
        return isinstance(self.by, tuple)


class ToldApart(NamedTuple):
    """Axes along which something told places apart; ``by`` what; ``throughout``: numbers did, and in all of it."""

    along: frozenset[Axis]
    by: object
    throughout: bool = False


class Lineage(NamedTuple):
    """``inputs``: the graph's inputs, without parameters. ``cuts``: the slices that were taken of what is computed from
    these, or of axes that tell of tokens by themselves. ``placed``: those that numbers put in places (`places`).
    ``picks``: of what axes something was taken in other ways than by slices. ``told``: what told places apart in it.
    ``pooled``: the axes that it was pooled along, or copied from some of to others, since the last layer.

    An input that carries what it was computed from, in other graphs, is that.
    """

    inputs: frozenset[Any] = frozenset()
    cuts: frozenset[Cut] = frozenset()
    placed: frozenset[Placed] = frozenset()
    picks: frozenset[Pick] = frozenset()
    told: frozenset[ToldApart] = frozenset()
    pooled: frozenset[Axis] = frozenset()

    def cut(self, dim: Dim, start: int, stop: int, step: int = 1) -> Lineage:
        """The lineage of a slice along `dim`."""
        axes = resolve(dim)
        if stop <= start or len(range(start, stop, step)) == size_of(axes):
            return self
        while len(axes) > 1 and step == 1 and start % axes[-1].size == stop % axes[-1].size == 0:  # one of the outer
            axes, inner = axes[:-1], axes[-1]
            start, stop = start // inner.size, stop // inner.size
        whole = product(axes)
        if not (self.inputs or _of_an_input(whole)):
            return self
        pieces = [one.cut for one in take(axes, start, stop, step) or () if one.cut is not None]
        picks = {Pick(find(cut.whole), cut[1:]) for cut in pieces if find(cut.whole) is not whole}
        if (longer := find(whole)).resampled is not None:  # by padding: where it is cut says how far it moved
            picks.add(Pick(find(longer.resampled.whole), Cut(longer, start, stop, step), moved=True))
        return self._replace(cuts=self.cuts | {Cut(whole, start, stop, step)}, picks=self.picks | picks)

    def picked(self, axes: Iterable[Axis], *, moved: bool = False) -> Lineage:
        """The lineage of something of these axes."""
        by = object()
        return self._replace(picks=self.picks | {Pick(axis, by, moved) for axis in axes})

    def in_layer(self) -> Lineage:
        """The lineage of what a layer makes of it: its features are other ones, of which nothing cancels out."""
        return self._replace(pooled=frozenset())

    def names(self) -> tuple[Any, ...]:
        """The same outside the graph, in an order that does not change."""
        cuts = ((cut.whole.size, *cut[1:]) for cut in _of_data(self.cuts))
        return tuple(sorted({*self.inputs, *cuts}, key=repr))

    def over(self, dims: Dims) -> Lineage:
        """The same of a tensor with these dims: it is no slice of an axis that it has whole."""
        cuts = (cut for cut in _known(self.cuts) if not any(same((cut.whole,), dim) for dim in dims))
        return self._replace(cuts=frozenset(cuts))

    def within(self, other: Lineage) -> bool:
        """Whether all of it is in the other."""
        return self.inputs <= other.inputs and _of_data(self.cuts) <= _known(other.cuts)


def _known(cuts: Iterable[Cut]) -> set[Cut]:
    return {cut._replace(whole=find(cut.whole)) for cut in cuts}


def _of_data(cuts: Iterable[Cut]) -> set[Cut]:
    """Without slices of axes that may be channels: queries and keys are such slices, if of the same inputs."""
    return {cut for cut in _known(cuts) if is_of_data(cut.whole) or any(one.several for one in origins(cut.whole))}


def _of_an_input(whole: Axis) -> bool:
    """Whether an axis may run over an input, or is in an unknown order; else a parameter alone may say what it is."""
    return any(axis.permuted or is_of_data(axis, even_last=True) for axis in resolve((whole,)))


def lineage_of(tensor: Tensor) -> Lineage:
    """What a tensor is computed from; nothing, if that was never told."""
    return getattr(tensor, "_rainfusion_lineage", Lineage())


def union_of(tensors: Iterable[Tensor]) -> Lineage:
    """The lineage of what is computed from these. Beside others, one number for each channel, or a single one, is
    nobody's tokens."""
    tensors = list(tensors)
    each = [lineage_of(tensor) for tensor in tensors if tensor.dim() > 1] or list(map(lineage_of, tensors))
    return Lineage(*(frozenset[Any]().union(*sets) for sets in zip(*each, strict=True)))


def side_by_side(tensors: Sequence[Tensor]) -> Lineage:
    """The lineage of tensors put together: slices of one axis, one in each, are no slices any more."""
    each = [_known(lineage_of(tensor).cuts) for tensor in tensors]
    common = set.intersection(*each)
    everywhere = set.intersection(*({cut.whole for cut in cuts} for cuts in each))
    cuts = {cut for cut in set.union(*each) if cut in common or cut.whole not in everywhere}
    return union_of(tensors)._replace(cuts=frozenset(cuts))


def several(tensors: Sequence[Tensor]) -> bool:
    """Whether some tensors are computed from something that others are not, and these from something else."""
    each = {lineage_of(tensor).inputs for tensor in tensors}
    return any(not (one <= other or other <= one) for one, other in combinations(each, 2))


def all_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing tells different tensors apart: they are computed from the same inputs, cut in the same way."""
    each = map(lineage_of, tensors)
    lineages = {(one.inputs, frozenset(cut for cut in _known(one.cuts) if _of_an_input(cut.whole))) for one in each}
    return len(lineages) == 1 and len(set(map(id, tensors))) > 1


def indices_of(tensors: Sequence[Tensor]) -> list[Dim] | None:
    """Which index of an axis each of several tensors is: of the one axis that tells them apart; None if there is none.

    A tensor that was computed from several indices, as a scan's states are, is none of them; nor is one to which
    something of that axis was added, unless to all of them alike.
    """
    each = [single_indices(lineage_of(tensor).cuts) for tensor in tensors]
    mixed = picked_apart(tensors)
    found: list[list[Dim]] = []
    for whole in filter(_of_an_input, each[0]):
        if whole in mixed:
            continue
        indices = [one.get(whole, set[int]()) for one in each]
        common = set[int].intersection(*indices)
        own = [one - common for one in indices]
        if all(len(one) == 1 for one in own):
            found.append([(cut_axis(whole, index, index + 1, 1),) for (index,) in own])
    return found[0] if len(found) == 1 else None


def picked_apart(tensors: Sequence[Tensor]) -> set[Axis]:
    """The axes of which something else was picked for some of several tensors than for others."""
    picks = [{pick for pick in lineage_of(tensor).picks if not pick.is_slice} for tensor in tensors]
    return {one for pick in set[Pick]().union(*picks) - picks[0].intersection(*picks) for one in origins(pick.whole)}


def index_of(tensor: Tensor, size: int) -> Dim | None:
    """Which index of an axis of this size a tensor is; None if it is of none, or of several.

    An axis that may run over an input goes before those that a parameter alone names.
    """
    found = {whole: own for whole, own in single_indices(lineage_of(tensor).cuts).items() if whole.size == size}
    found = {whole: own for whole, own in found.items() if _of_an_input(whole)} or found
    if any(found.keys() & {*origins(pick.whole)} and not pick.is_slice for pick in lineage_of(tensor).picks):
        return None
    if [len(own) for own in found.values()] != [1]:
        return None
    ((whole, (index,)),) = found.items()
    return (cut_axis(whole, index, index + 1, 1),)


def is_mixed(tensor: Tensor, size: int) -> bool:
    """Whether a tensor was computed from several slices of one axis of this size that are as long as each other."""
    cuts = [cut for cut in _known(lineage_of(tensor).cuts) if cut.whole.size == size]
    return len(cuts) > len({(cut.whole, len(range(*cut[1:]))) for cut in cuts})


def single_indices(cuts: Iterable[Cut]) -> dict[Axis, set[int]]:
    """By axis, the single indices of it among slices."""
    found: dict[Axis, set[int]] = {}
    for whole, start, stop, step in cuts:
        if start < stop <= start + step:
            found.setdefault(find(whole), set()).add(start)
    return found
