# SPDX-License-Identifier: Apache-2.0
"""What axes learn from each other.

An elementwise operator pairs the indices of its operands. When it meets ``(S,)`` and ``(T, H, W)``, then ``S`` *is*
``T * H * W``, in every tensor that carries it, before this operator and after. Axes found equal are joined; an axis
found to be a product is bound to it; and if it was itself a piece of something, that is known better now, too.

Contradictions are kept: axes that one operator lays out as ``45 x 80`` and another as ``80 x 45`` are in `conflict`,
and never make a grid.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from rainfusion_compile.passes.provenance.axes import cut_axis, derives, digit, join, leaves, resolve, same, take
from rainfusion_compile.passes.provenance.axis import Axis, Cut, Dim, find, size_of
from rainfusion_compile.passes.provenance.permuted import is_permuted, mixed


def unify(one: Dim, two: Dim) -> Dim:
    """An operator pairs the indices of two dims of one size: both are the same axes. Returns what is known now."""
    if one == two:
        return one
    one, two = resolve(one), resolve(two)
    ours, theirs = ([axis for axis in dim if axis.size > 1] for dim in (one, two))
    fuller = one if len(one) >= len(two) else two
    if ours == theirs:
        return fuller
    if any(axis.conflict for axis in (*ours, *theirs)):
        poison(*ours, *theirs)
        return one
    for axes, dim, other in ((ours, one, two), (theirs, two, one)):
        if any(axis.permuted for axis in axes):
            return mixed(dim, theirs if axes is ours else ours)
        if len(set(axes)) < len(axes):
            return other  # one table of positions used along two axes says nothing about which is which
    for axes, others, dim, other in ((ours, theirs, one, two), (theirs, ours, two, one)):
        if len(axes) == 1 and axes[0].parts and len(others) == 1 and derives(axes[0], others[0]):
            return other  # its pieces in another order, as rotary embeddings make of channels
        if len(axes) == 1 and axes[0].parts and not (len(others) == 1 and not others[0].parts):
            return _unify_parts(axes[0], tuple(others)) or dim
    return {"both": fuller, "left": one, "right": two}[_unify_products(ours, theirs)]


def _unify_products(ours: list[Axis], theirs: list[Axis]) -> Literal["both", "left", "right"]:
    """Unify wherever borders meet. Returns the side that knows more."""
    knows: Literal["both", "left", "right"] = "both"
    while ours:
        left, right = [ours.pop(0)], [theirs.pop(0)]
        while (difference := size_of(left) - size_of(right)) != 0:
            if difference < 0:
                left.append(ours.pop(0))
            else:
                right.append(theirs.pop(0))
        if len(left) > 1 and len(right) > 1:
            # [45, 80] meets [80, 45]
            told = [any(axis.known for axis in axes) for axes in (left, right)]
            if all(told):
                poison(*left, *right)
            knows = "left" if told[0] else "right"
            continue
        (whole,), pieces = (left, right) if len(left) == 1 else (right, left)
        stride = whole.size
        for piece in pieces:
            stride //= piece.size
            union(digit(whole, stride, piece.size), piece)
    return knows


def _unify_parts(axis: Axis, other: Dim) -> Dim | None:
    """A concatenation meets another one, or a product: whatever lies between two borders is the same.

    Returns what is known now, if a part is permuted; else it is the same as before.
    """
    borders = {0, axis.size}
    for parts in (axis.parts, other[0].parts if len(other) == 1 else ()):
        end = 0
        for part in parts:
            end += size_of(part)
            borders.add(end)
    ordered = sorted(borders)
    pieces: list[Dim] = []
    for start, stop in pairwise(ordered):
        ours, theirs = (take(dim, start, stop, exact=True) for dim in ((axis,), other))
        if ours is not None and theirs is not None:
            pieces.append(unify(ours, theirs))
        elif any(piece.known for piece in other):
            poison(axis, *other)
            return None
    if any(map(is_permuted, pieces)) and not same((axis,), other):
        return join(pieces) if sum(map(size_of, pieces)) == axis.size else None
    if len(other) == 1 and list(map(size_of, other[0].parts)) == list(map(size_of, axis.parts)):
        union(other[0], axis)
    return None


def union(one: Axis, two: Axis) -> None:
    """Two atomic axes are the same."""
    one, two = find(one), find(two)
    if one is two:
        return
    if one.bound is not None or two.bound is not None:
        unify((one,), (two,))
        return
    if derives(one, two) or derives(two, one):
        return
    if one.role and two.role and one.role != two.role:
        poison(one, two)
        return
    lessons = [(piece.digit, piece.cut) for piece, other in ((one, two), (two, one)) if other.known]
    kept, gone = sorted((one, two), key=lambda axis: (not axis.parts, not axis.role, not axis.sources))
    gone.bound = (kept,)
    kept.role = kept.role or gone.role
    kept.sources |= gone.sources
    kept.coordinate |= gone.coordinate
    kept.conflict |= gone.conflict
    kept.permuted |= gone.permuted
    kept.lost = kept.lost or gone.lost
    if kept.digit is None and kept.cut is None:
        kept.digit, kept.cut, kept.settled = gone.digit, gone.cut, gone.settled
    for key, piece in gone.digits.items():
        if key in kept.digits:
            union(kept.digits[key], piece)
        else:
            kept.digits[key] = piece
    for taken, cut in lessons:
        if taken is not None:
            _teach_digit(kept, *taken)
        elif cut is not None and kept.parts:
            _teach_cut(kept, cut)


def _teach_digit(axis: Axis, whole: Axis, stride: int) -> None:
    """A digit of an axis was found to be something: so the axis is a product with this digit in it."""
    whole = find(whole)
    if whole.role or whole.parts or whole.permuted or find(axis) is whole:
        return
    low = whole.size
    for leaf in leaves(whole):
        high, low = low, low // leaf.size
        if leaf is find(axis):
            return
        if high <= stride or low >= stride * axis.size:
            continue
        if leaf.role or leaf.parts:
            return
        outer, inner = high // (stride * axis.size), stride // low
        if outer * stride * axis.size != high or inner * low != stride:
            poison(leaf, axis)
            return
        pieces = [digit(whole, stride * axis.size, outer), axis, digit(whole, low, inner)]
        for piece in pieces:
            find(piece).settled = True
        leaf.bound = tuple(find(piece) for piece in pieces if piece.size > 1)
        if leaf is whole and leaf.cut is not None and not leaf.settled:
            _teach_cut(leaf, leaf.cut)
        return


def _teach_cut(axis: Axis, cut: Cut) -> None:
    """A slice of an axis was found to be something: so the axis is a concatenation with this slice in it."""
    whole = find(cut.whole)
    if cut.step != 1 or whole.role or whole.parts or whole.permuted or whole.bound is not None:
        return
    before, after = cut_axis(whole, 0, cut.start, 1), cut_axis(whole, cut.stop, whole.size, 1)
    parts = [piece for piece in (before, axis, after) if piece.size]
    for piece in parts:
        piece.settled = True
    joined = Axis(whole.size, parts=tuple((piece,) for piece in parts), sources=whole.sources)
    joined.digit, joined.cut, joined.settled = whole.digit, whole.cut, whole.settled
    whole.bound = (joined,)


def poison(*axes: Axis) -> None:
    """Operators contradict each other about these axes, and whatever they are made of or were taken from."""
    for axis in map(find, axes):
        if axis.conflict:
            continue
        axis.conflict = True
        poison(*(axis.bound or ()), *(piece for part in axis.parts for piece in part))
        if axis.digit is not None and not axis.settled:
            poison(axis.digit[0])
