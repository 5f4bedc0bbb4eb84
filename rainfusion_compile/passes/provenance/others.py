# SPDX-License-Identifier: Apache-2.0
"""Tokens of others beside a sample's own: another sample's, or its own that have moved or were pooled.

They stand in the same places, so operators pair them, and what comes out is of both at all places. But where numbers
choose between them, as a mask over rows does, or told places apart in one of them before, some rows are of the one and
some of the other. Then their order is lost.

Except where numbers say how much of them is added to a sample's own tokens, which stand there as they are: residual
branches move tokens, by convolutions, or are one frame's for all. That does not hold for other samples.

Of what was pooled no numbers are needed: twice the mean of two tokens, less one of them, is the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rainfusion_compile.passes.provenance.axes import leaves, origins, resolve
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, find, size_of
from rainfusion_compile.passes.provenance.lineage import Lineage, Pick, ToldApart, lineage_of, single_indices
from rainfusion_compile.passes.provenance.values import values_of

_LESS = object()
"""By what tokens were told apart of which own ones were subtracted: added to these, they take their places."""
_Operand = tuple[Tensor, Dims]


class _Member(NamedTuple):
    """What an operator adds, chooses or multiplies: some of its operands, and what told places apart in them."""

    operands: list[_Operand]
    lineage: Lineage
    told: frozenset[ToldApart]
    singles: dict[Axis, set[int]]  # by axis of frames, rows, columns or samples, the single indices of it
    picks: frozenset[Pick]  # without slices
    at_home: frozenset[tuple[Axis, int]] = frozenset()  # indices of axes, if it is put there alone

    @property
    def frames(self) -> dict[Axis, int]:
        """By axis the one index of it that this was computed from."""
        return {whole: min(at) for whole, at in self.singles.items() if len(at) == 1}

    def runs_over(self, whole: Axis) -> bool:
        return any(whole in resolve(dim) for _, own in self.operands for dim in own)


def of_others(
    name: str, tensors: Sequence[Tensor], dims: Sequence[Dims], out: Sequence[Dim], *, less: bool = False
) -> tuple[list[Dim], frozenset[ToldApart]]:
    """Dims of what an operator of this name makes of tensors, lost where it may be of different tokens in different
    places; and what told places apart in it. ``less``: whether it subtracts one of two.
    """
    if not any(lineage_of(tensor).inputs for tensor in tensors):
        return list(out), frozenset()
    operands = [(one, ((),) * (len(out) - len(own)) + tuple(own)) for one, own in zip(tensors, dims, strict=True)]
    groups, weights, adds = _groups(name, operands)
    groups = [group for group in groups if _of_inputs(group)]
    members = [_member(group, weights, out, alone=len(groups) == 1) for group in groups]
    if not members:  # data is in the weights alone
        return list(out), _tells(operands, out)
    if name == "where" and len(members) > 1:
        at_home = _chosen_alone(weights[0], out)
        members = [one._replace(at_home=home) for one, home in zip(members, at_home, strict=True)]
    found, told = list(out), frozenset[ToldApart]().union(*(one.told for one in members))
    apart = set[Axis]()
    known = [(one.picks, one.lineage.pooled) for one in members]
    alike = len(members) == 1 or not (_differ(known) or any(one.singles for one in members))
    for number, dim in enumerate(() if alike else out):
        axes = {*resolve(dim)}
        if size_of(dim) > 1 and _mixed(members, axes, adds=adds):
            found[number] = (Axis(size_of(dim), lost="numbers that choose between different tokens"),)
        elif less and len(set(_placed(members, axes))) > 1:
            apart |= axes
    if not adds:
        return found, told | _tells(operands, out)
    # places that numbers told apart in some of it only, or that they were added to, are apart, but not all of it is
    common = frozenset[ToldApart].intersection(*(one.told for one in members))
    numbers = [own[at] for one, own in operands for at in range(len(out)) if not lineage_of(one).inputs]
    partly = {*chain(*(one.along for one in told - common)), *chain(*map(resolve, numbers))}
    common |= {ToldApart(frozenset(partly), object())} if partly else set()
    return found, common | ({ToldApart(frozenset(apart), _LESS)} if apart else set())


def _groups(name: str, operands: list[_Operand]) -> tuple[list[list[_Operand]], list[_Operand], bool]:
    """The operands by members; those that weigh these against each other; and whether the members are added up."""
    if name == "where" and len(operands) == 3:
        return [[operands[1]], [operands[2]]], operands[:1], True
    if name == "lerp" and len(operands) == 3:
        return [[operands[0]], [operands[1]]], operands[2:], True
    if name in ("addcmul", "addcdiv"):
        return [operands[:1], operands[1:]], [], True
    return [[one] for one in operands], [], name in ("add", "sub", "rsub", "lerp")


def _member(group: list[_Operand], weights: list[_Operand], out: Sequence[Dim], *, alone: bool) -> _Member:
    lineage, *more = (lineage_of(one) for one, _ in group)
    if more:
        lineage = Lineage(*(frozenset[Any]().union(*sets) for sets in zip(lineage, *more, strict=True)))
    told = lineage.told | (_tells([*weights, *group], out) if weights or more else frozenset())
    cuts = () if alone else lineage.cuts
    singles = {whole: at for whole, at in single_indices(cuts).items() if _is_of_tokens(whole)}
    return _Member(group, lineage, told, singles, frozenset(one for one in lineage.picks if not one.is_slice))


def _chosen_alone(condition: _Operand, out: Sequence[Dim]) -> list[frozenset[tuple[Axis, int]]]:
    """The single indices of axes at which a condition that only depends on these is true, and false."""
    along = [dim for dim, own in zip(out, condition[1], strict=True) if size_of(own) > 1]
    axes = resolve(along[0]) if len(along) == 1 else ()
    values = values_of(condition[0]) if len(axes) == 1 else None
    at = [[number for number, value in enumerate(values or ()) if value == wanted] for wanted in (True, False)]
    return [frozenset({(axes[0], one[0])} if len(one) == 1 else ()) for one in at]


def _of_inputs(operands: Iterable[_Operand]) -> bool:
    return any(lineage_of(one).inputs for one, _ in operands)


def _tells(operands: Sequence[_Operand], out: Sequence[Dim]) -> frozenset[ToldApart]:
    """What tells places apart in a product: numbers, or data by data. Numbers are what is computed from no input, or
    broadcast itself, as masks are."""
    by_numbers, by_data = set[Axis](), set[Axis]()
    most = size_of(chain(*out))
    data = [one for one in operands if lineage_of(one[0]).inputs]
    numbers = [
        one for one in operands if not lineage_of(one[0]).inputs or one[0].dtype == torch.bool or one[0].numel() < most
    ]
    for number, dim in enumerate(out):
        if any(size_of(one[1][number]) > 1 and any(one is not other for other in data) for one in numbers):
            by_numbers.update(resolve(dim))
        elif sum(size_of(one[1][number]) > 1 for one in data) > 1:
            by_data.update(resolve(dim))
    told = [ToldApart(frozenset(by_numbers), object(), throughout=True), ToldApart(frozenset(by_data), object())]
    return frozenset(one for one in told if one.along)


def _mixed(members: list[_Member], axes: set[Axis], *, adds: bool) -> bool:
    """Whether what comes out may be of different tokens in different places along axes."""
    if adds and _differ([{one for one in member.lineage.pooled if _pooled_along(one, axes)} for member in members]):
        return True
    told = [{one for one in member.told if _tells_along(one, axes)} for member in members]
    by = [{one.by for one in each} for each in told]
    if not _differ(by):
        return False
    if _differ([_samples(member, axes) for member in members]) or _clash(members):
        return True
    placed = _placed(members, axes)
    throughout = [{one.by for one in each if one.throughout} for each in told]
    if not adds or not _differ(placed) or not _differ(throughout):
        return False

    def stay(own: int) -> bool:
        """Whether a member is a sample's own tokens as they are, and others are added to them."""
        return all(
            placed[own] <= placed[other] and throughout[own] <= throughout[other] and _LESS not in by[other] - by[own]
            for other in range(len(members))
        )

    return not any(map(stay, range(len(members))))


def _differ(each: Sequence[Any]) -> bool:
    return any(one != each[0] for one in each)


def _along(axis: Axis, axes: set[Axis]) -> bool:
    return not axes.isdisjoint(leaves(axis))


def _tells_along(told: ToldApart, axes: set[Axis]) -> bool:
    return any(_along(axis, axes) for axis in told.along)


def _pooled_along(whole: Axis, axes: set[Axis]) -> bool:
    """Whether axes have what was pooled of an axis: all of it, or digits of it that are not the outer one."""
    inner = (axis for axis in axes if axis.digit is None or axis.digit[1] * axis.size < find(axis.digit[0]).size)
    return any(find(whole) in origins(axis) for axis in inner)


def _samples(member: _Member, axes: set[Axis]) -> set[object]:
    """The samples that a member was computed from, as far as it may not have each in its place."""
    found: set[object] = {(one, index) for one, at in member.singles.items() if _is_of_samples(one) for index in at}
    picks = (one for one in member.picks if find(one.whole) not in axes and _is_of_samples(find(one.whole)))
    return found | {one.by for one in picks}


def _clash(members: list[_Member]) -> bool:
    """Whether members are different indices of one axis, which none of them runs over."""
    each = [{one: at for one, at in member.frames.items() if not member.runs_over(one)} for member in members]
    return any(one[whole] != other[whole] for one in each for other in each for whole in one.keys() & other.keys())


def _placed(members: list[_Member], axes: set[Axis]) -> list[frozenset[object]]:
    """Of each member what may stand elsewhere than its own tokens do: what moved along axes or was taken of them, and
    one index for all, where another member has all of them."""
    found = []
    for member in members:
        moved = {one.by for one in member.picks if _along(one.whole, axes)}
        frames = {one for one in member.frames.items() - member.at_home if not member.runs_over(one[0])}
        others = {one for one in frames if any(other.runs_over(one[0]) for other in members)}
        found.append(frozenset[object]({*moved, *others}))
    return found


def _is_of_samples(whole: Axis) -> bool:
    return whole.role is None and any(dim == 0 for dim, _ in _places(whole))


def _is_of_tokens(whole: Axis) -> bool:
    return whole.role is not None or any(dim == 0 or rank == 5 for dim, rank in _places(whole))


def _places(whole: Axis) -> list[tuple[int, int]]:
    return [(dim, source.rank) for source, dim in whole.sources if source.rank and not source.parameter]
