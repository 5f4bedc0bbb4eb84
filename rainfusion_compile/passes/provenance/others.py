# SPDX-License-Identifier: Apache-2.0
"""Tokens of others beside a sample's own: another sample's, or its own that have moved or were pooled.

They stand in the same places, so operators pair them, and what comes out is of both at all places. But where numbers
choose between them, as a mask over rows does, or told places apart in one of them before, some rows are of the one and
some of the other. Then their order is lost.

Except where numbers say how much of them is added to a sample's own tokens, which stand there as they are: residual
branches move tokens, by convolutions, or are one frame's for all. That does not hold for other samples.

Of what was pooled no numbers are needed: twice the mean of two tokens, less one of them, is the other.

What is put together is a choice, too: some places are of one tensor and some of another one. Where tensors stand side
by side in other dims, as in channels, a layer may add them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rainfusion_compile.passes.provenance.axes import is_of_data, leaves, origins, resolve, same
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, find, long, size_of
from rainfusion_compile.passes.provenance.lineage import Lineage, Pick, ToldApart, lineage_of, single_indices
from rainfusion_compile.passes.provenance.unify import moves
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

    @property
    def samples(self) -> dict[Axis, set[object]]:
        """By axis of samples which of it this was computed from, where not each is in its place."""
        found: dict[Axis, set[object]] = {one: {*at} for one, at in self.singles.items() if _is_of_samples(one)}
        for pick in self.picks:
            if _is_of_samples(whole := find(pick.whole)):
                found.setdefault(whole, set()).add(pick.by)
        return found

    def is_of(self, whole: Axis) -> bool:
        """Whether it was computed from an input that has an axis."""
        return any(source.name in self.lineage.inputs for source, _ in whole.sources)

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
    each = [one.told for one in members]
    told = each[0].intersection(*each) | _partly(each, chain(*(own for _, own in _numbers(operands, out))))
    return found, told | ({ToldApart(frozenset(apart), _LESS)} if apart else set())


def _partly(each: Sequence[frozenset[ToldApart]], numbers: Iterable[Dim] = ()) -> frozenset[ToldApart]:
    """What tells places apart in some of several that are added up, or numbers that are, too."""
    some = frozenset[ToldApart]().union(*each) - each[0].intersection(*each)
    along = frozenset(chain(*(one.along for one in some), *map(resolve, numbers)))
    return frozenset([ToldApart(along, object())] if along else [])


def of_others_beside(
    tensors: Sequence[Tensor], dims: Sequence[Dims], out: Sequence[Dim], number: int, lineage: Lineage
) -> tuple[Dims, Lineage]:
    """Dims of tensors that are put together along dim ``number``; and this lineage, with what tells places apart.

    Along that dim they are chosen between. Along others they meet, where a layer adds what stands side by side.
    """
    outer, wholes = _wholes(out[number])
    operands = [one for one in zip(tensors, dims, strict=True) if _of_inputs([one])]
    members = [_member([one], [], out, alone=len(tensors) == 1) for one in operands]
    if not members:
        return tuple(out), lineage
    # each has its own indices of what they are put together to
    members = [one._replace(singles={at: one.singles[at] for at in one.singles.keys() - wholes}) for one in members]
    found, each = list(out), [one.told for one in members]
    alike = not _differ([(one.picks, one.lineage.pooled, one.singles) for one in members])
    beside = members
    if not all(same(own[number], operands[0][1][number]) for _, own in operands):  # other features, as layers make them
        beside = [one._replace(lineage=one.lineage.in_layer()) for one in members]
    for at, dim in enumerate(() if alike else out):
        mixed = _chosen(members, wholes) if at == number else _mixed(beside, {*resolve(dim)}, adds=True)
        if size_of(dim) > 1 and mixed:
            found[at] = (Axis(size_of(dim), lost="tokens of others side by side"),)
    told = _partly(each).union(*each)
    if any(map(is_of_data, outer)):
        told |= {ToldApart(frozenset({*outer, *wholes}), object(), throughout=len(members) < max(len(tensors), 2))}
    reordered = (one for one in wholes if _is_of_samples(one) and any(moves(axis, one) for axis in outer if axis.parts))
    return tuple(found), lineage._replace(told=told).picked(reordered)


def _wholes(dim: Dim) -> tuple[list[Axis], set[Axis]]:
    """The outer axis of a dim that tensors are put together along; and what these are pieces of, if it is as long, or
    several are of one."""
    outer = long(resolve(dim))[:1]
    pieces = [find(axis) for one in outer for part in one.parts for axis in part[:1]]
    found = [find(axis.cut.whole) for axis in pieces if axis.cut is not None and axis.is_piece]
    found += [one for one in outer if not one.parts]
    return outer, {one for one in found if one.size == outer[0].size or found.count(one) > 1}


def _chosen(members: list[_Member], axes: set[Axis]) -> bool:
    """Whether members that are put together along axes are of different samples, or some moved or were pooled.

    Those that are pieces of no axis stay beside each other, as two videos in one sequence do.
    """
    if not axes:
        return False
    moved = [{one.by for one in member.picks if one.moved and _along(one.whole, axes)} for member in members]
    pooled = [{one for one in member.lineage.pooled if find(one) in axes} for member in members]
    return _of_other_samples(members, axes) or _differ(moved) or _differ(pooled)


def _of_other_samples(members: list[_Member], axes: set[Axis]) -> bool:
    """Whether members have other ones of some input's samples than others that are computed from it, along no axes."""
    each = [one.samples for one in members]
    found = (
        [own.get(axis) for one, own in zip(members, each, strict=True) if axis in own or one.is_of(axis)]
        for axis in {*chain(*each)} - axes
    )
    return any(map(_differ, found))


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
    told = lineage.told | (_tells(group, out, weights) if weights or more else frozenset())
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


def _tells(operands: Sequence[_Operand], out: Sequence[Dim], weights: Sequence[_Operand] = ()) -> frozenset[ToldApart]:
    """What tells places apart in a product, with these weights: numbers, or data by data, which may be such numbers;
    but not all of it where weights are data in which no numbers told places apart."""
    throughout, partly = set[Axis](), set[Axis]()
    factors = [*weights, *operands]
    data, numbers = [one for one in factors if _of_inputs([one])], _numbers(factors, out)
    by_numbers = [told for one, _ in weights for told in lineage_of(one).told]
    for number, dim in enumerate(out):
        axes = {*resolve(dim)}
        if any(size_of(one[1][number]) > 1 and any(one is not other for other in data) for one in numbers):
            throughout |= axes
        elif sum(size_of(one[1][number]) > 1 for one in data) > 1:
            some = weights and not any(_tells_along(told, axes) for told in by_numbers)
            (partly if some else throughout).update(axes)
    told = (ToldApart(frozenset(throughout), object(), throughout=True), ToldApart(frozenset(partly), object()))
    return frozenset(one for one in told if one.along)


def _numbers(operands: Iterable[_Operand], out: Sequence[Dim]) -> list[_Operand]:
    """The operands that are computed from no input, or broadcast, as masks are."""
    most = size_of(chain(*out))
    return [one for one in operands if not _of_inputs([one]) or one[0].dtype == torch.bool or one[0].numel() < most]


def _mixed(members: list[_Member], axes: set[Axis], *, adds: bool) -> bool:
    """Whether what comes out may be of different tokens in different places along axes."""
    if adds and _differ([{one for one in member.lineage.pooled if _pooled_along(one, axes)} for member in members]):
        return True
    told = [{one for one in member.told if _tells_along(one, axes)} for member in members]
    by = [{one.by for one in each} for each in told]
    if not _differ(by):
        return False
    samples = [{one: at for one, at in member.samples.items() if one not in axes} for member in members]
    if _differ(samples) or _clash(members):
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
        put = {find(one.whole) for one in member.lineage.placed}  # along what numbers are of, which may be all of it
        frames = {
            one for one in member.frames.items() - member.at_home if one[0] in put or not member.runs_over(one[0])
        }
        others = {one for one in frames if any(other.runs_over(one[0]) for other in members)}
        found.append(frozenset[object]({*moved, *others}))
    return found


def _is_of_samples(whole: Axis) -> bool:
    return whole.role is None and any(dim == 0 for dim, _ in _places(whole))


def _is_of_tokens(whole: Axis) -> bool:
    return whole.role is not None or any(dim == 0 or rank == 5 for dim, rank in _places(whole))


def _places(whole: Axis) -> list[tuple[int, int]]:
    return [(dim, source.rank) for source, dim in whole.sources if source.rank and not source.parameter]
