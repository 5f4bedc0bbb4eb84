# SPDX-License-Identifier: Apache-2.0
"""Tokens of others, which numbers put between a sample's own: another sample's, or the same that have moved.

A mask over rows may choose between two samples, or between samples and these in another order, or two frames, each of
them a tensor: all have the same rows in the same order, and what comes out has rows of both. A sum of them is of both
at all places, unless numbers told places apart in one of them before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rainfusion_compile.passes.provenance.axes import leaves, resolve
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, find, size_of
from rainfusion_compile.passes.provenance.lineage import Pick, lineage_of, single_indices

Told = frozenset[tuple[Axis, Axis | None]]
_Operand = tuple[Tensor, Dims]


def of_others(
    tensors: Sequence[Tensor], dims: Sequence[Dims], out: Sequence[Dim], *, weighs: bool, adds: bool
) -> tuple[list[Dim], Told]:
    """Dims of what pairs the elements of tensors, lost where numbers may choose between different tokens; and along
    what axes they told places apart, of which others.

    ``weighs``: whether an operator weighs its operands with each other; ``adds``: whether it adds them, weighed or not:
    a convolution may be added to its tokens, as much as numbers say.
    """
    found, told = list(out), set[tuple[Axis, Axis | None]]()
    reordered = any(find(axis).permuted for own in dims for dim in own for axis in dim)
    if len(tensors) < 3 and not reordered and not any(lineage_of(one).told or _single(one) for one in tensors):
        return found, frozenset()
    operands = [(one, ((),) * (len(out) - len(own)) + tuple(own)) for one, own in zip(tensors, dims, strict=True)]
    for number, dim in enumerate(out):
        wide = [operand for operand in operands if size_of(operand[1][number]) > 1]
        of_inputs = [operand for operand in wide if lineage_of(operand[0]).inputs]
        if size_of(dim) == 1 or not of_inputs:
            continue
        sizes = [one.numel() if lineage_of(one).inputs and one.dtype != torch.bool else 0 for one, _ in wide]
        chosen = weighs and len(wide) > 2  # by the first of three, say
        before = {whole for one, _ in of_inputs for axis, whole in lineage_of(one).told if _along(axis, dim)}
        apart = _apart(of_inputs, number) if chosen or before else set[Axis | None]()
        moved = chosen and not adds and min(sizes) < max(sizes) and _some_moved(of_inputs, number)
        if moved or (apart and chosen) or not apart.isdisjoint(before):
            found[number] = (Axis(size_of(dim), lost="numbers that choose between different tokens"),)
        elif weighs:
            by_numbers = (operand for operand in of_inputs if min(sizes) < operand[0].numel())
            wholes = {whole for operand in by_numbers for whole in _wholes(operand, number)}
            told |= {(axis, whole) for axis in resolve(dim) for whole in wholes}
    return found, frozenset(told)


def _along(axis: Axis, dim: Dim) -> bool:
    return not {*leaves(axis)}.isdisjoint(resolve(dim))


def _apart(operands: Sequence[_Operand], number: int) -> set[Axis | None]:
    """The axes of which operands are different indices, and None if their samples are in different orders."""
    singles, others = [_single(one) for one, _ in operands], (at for at in range(len(operands[0][1])) if at != number)
    wholes = {whole for each in singles for whole in each}
    apart = {whole for whole in wholes if len({each[whole] for each in singles if whole in each}) > 1}
    moved = any(_moved([one for one in operands if size_of(one[1][at]) > 1], at) for at in others)
    return {*apart, None} if moved else {*apart}


def _moved(operands: Sequence[_Operand], at: int) -> bool:
    """Whether operands have different orders along a dim, and something made these of what they are computed from."""
    orders = [_order(own[at]) for _, own in operands]
    picks = [{pick for pick in lineage_of(one).picks if not pick.is_slice} for one, _ in operands]
    return any(one != orders[0] for one in orders) and any(one != picks[0] for one in picks)


def _some_moved(operands: Sequence[_Operand], number: int) -> bool:
    """Whether some of those that may be chosen have moved along a dim, and others have not, or elsewhere."""
    most, moved = max(one.numel() for one, _ in operands), list[set[Pick]]()
    for one, own in operands:
        if one.numel() == most and one.dtype != torch.bool:
            moved.append({pick for pick in lineage_of(one).picks if pick.moved and _along(pick.whole, own[number])})
    return any(one != moved[0] for one in moved)


def _wholes(operand: _Operand, number: int) -> set[Axis | None]:
    """The axes of which an operand is an index, and None if it may have samples in another order."""
    tensor, own = operand
    moved = lineage_of(tensor).picks and any(_order(dim) for at, dim in enumerate(own) if at != number)
    return {*_single(tensor), *((None,) if moved else ())}


def _order(dim: Dim) -> set[Axis]:
    """The axes of a dim that are in another order."""
    return {axis for axis in resolve(dim) if axis.permuted and not axis.lost and axis.size > 1}


def _single(tensor: Tensor) -> dict[Axis, int]:
    """By axis of samples or frames, rows or columns, the one index of it that a tensor was computed from."""
    found = {whole: at for whole, at in single_indices(tensor).items() if len(at) == 1 and _of_samples(whole)}
    return {whole: index for whole, (index,) in found.items()}


def _of_samples(whole: Axis) -> bool:
    places = [(source, dim) for source, dim in whole.sources if source.rank and not source.parameter]
    return whole.role is not None or any(dim == 0 or source.rank == 5 for source, dim in places)
