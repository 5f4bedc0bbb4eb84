# SPDX-License-Identifier: Apache-2.0
"""What axes learn from each other.

An elementwise operator pairs the indices of its operands. When it meets ``(S,)`` and ``(T, H, W)``, then ``S`` *is*
``T * H * W``, in every tensor that carries it, before this operator and after. Axes found equal are joined; an axis
found to be a product is bound to it; and if it was itself a piece of something, that is known better now, too.

Contradictions are kept: axes that one operator lays out as ``45 x 80`` and another as ``80 x 45`` are in `conflict`,
and never make a grid.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from rainfusion_compile.passes.provenance.axes import (
    cut_axis,
    digit,
    is_of_data,
    join,
    leaves,
    made_of,
    origins,
    resolve,
    same,
    slice_of,
    take,
)
from rainfusion_compile.passes.provenance.axis import Axis, Cut, Dim, find, long, reordered, size_of
from rainfusion_compile.passes.provenance.ranks import own_part, take_part


def unify(one: Dim, two: Dim) -> Dim:
    """An operator pairs the indices of two dims of one size: both are the same axes. Returns what is known now."""
    if one == two:
        return one
    one, two = resolve(one), resolve(two)
    ours, theirs = long(one), long(two)
    fuller = one if len(one) >= len(two) else two
    if ours == theirs:
        return fuller
    if any(axis.conflict for axis in (*ours, *theirs)):
        poison(*ours, *theirs)
        return one
    ours_of, theirs_of = own_part(one), own_part(two)
    if ours_of is not None and theirs_of is not None and ours_of[1] == theirs_of[1]:  # so are the other ranks' parts
        whole, start = unify(ours_of[0], theirs_of[0]), ours_of[1]
        return take_part(whole, start, start + size_of(one)) or one
    if len(ours) == len(theirs) and any(map(_other_slices, ours, theirs)):
        return tuple(
            Axis(axis.size, lost="an operator that pairs different tokens") if _other_slices(axis, other) else axis
            for axis, other in zip(ours, theirs, strict=True)
        )
    if _digits_moved(ours, theirs) or _digits_moved(theirs, ours):
        return (Axis(size_of(one), lost="an operator that pairs different tokens"),)
    sides = (ours, theirs, one, two), (theirs, ours, two, one)
    for axes, others, dim, other in sides:
        if any(axis.permuted for axis in axes):
            return dim if same(dim, tuple(others)) else _mixed(dim, others)
        if len(set(axes)) < len(axes):
            return other  # one table of positions used along two axes says nothing about which is which
    for axes, others, dim, other in sides:
        if len(axes) == 1 and axes[0].parts:
            if len(others) == 1 and find(others[0]) in origins(axes[0]):
                # its pieces in another order, as rotary embeddings make of channels
                return dim if is_of_data(others[0]) and moves(axes[0], find(others[0])) else other
            if len(others) > 1 or others[0].parts:
                return _unify_parts(axes[0], tuple(others)) or dim
    left_knows = _unify_products(ours, theirs)
    return fuller if left_knows is None else one if left_knows else two


def _other_slices(one: Axis, other: Axis) -> bool:
    """Whether two axes are different slices of one axis of tokens."""
    if one.size != other.size or not (_taken(one) and _taken(other)):
        return False
    ours = {cut.whole: cut for cut in made_of(one)[1:]}
    pairs = ((ours[cut.whole], cut) for cut in made_of(other)[1:] if cut.whole in ours)
    return any(mine != theirs and is_of_data(mine.whole) for mine, theirs in pairs) or _other_crops(one, other)


def _other_crops(one: Axis, other: Axis) -> bool:
    """Whether two axes are slices of what two kernels made of the same tokens, and neither begin, end nor are in the
    middle of these alike: a crop of a longer padding may be the same tokens."""
    if one.cut is None or other.cut is None:
        return False
    ours, theirs = find(one.cut.whole), find(other.cut.whole)
    one_of, other_of = ours.resampled, theirs.resampled
    if ours is theirs or one_of is None or other_of is None:
        return False
    if find(one_of.whole) is not find(other_of.whole) or one_of[1:] != other_of[1:]:
        return False
    edges = ((cut.start, whole.size - cut.stop) for cut, whole in ((one.cut, ours), (other.cut, theirs)))
    (before, after), (other_before, other_after) = edges
    return before != other_before and after != other_after and before - after != other_before - other_after


def _taken(axis: Axis) -> bool:
    """Whether an axis is known as a slice, or as what was made of one."""
    return axis.resampled is not None if axis.cut is None else axis.is_piece


def _digits_moved(axes: list[Axis], others: list[Axis]) -> bool:
    """Whether the others are digits of one axis of tokens, but not in their places: there they would be that axis."""
    whole = find(axes[0])
    digits = (find(axis.digit[0]) for axis in others if axis.digit is not None and axis.is_piece)
    return len(axes) == 1 < len(others) and whole in digits and is_of_data(whole)


def _mixed(dim: Dim, others: list[Axis]) -> Dim:
    """A permuted dim whose indices an operator pairs with others: if these tell an order, it is turned back no more."""
    if len(others) == 1 and _tells_no_order(others[0]) and slice_of(dim) is not None:
        # a run of tokens in order, whose ends alone make no grid
        if all(others[0] not in origins(axis) for axis in dim):
            others[0].bound = tuple(long(dim))
        return dim
    if not any(axis.known or axis.permuted for axis in others if axis not in dim):
        return dim
    return tuple(reordered(axis) if axis.permuted and (axis.mirror or axis.digit or axis.cut) else axis for axis in dim)


def _tells_no_order(axis: Axis) -> bool:
    """Whether nothing is known of an axis but that it is a dim of some input: it may be whatever it meets."""
    told = axis.role or axis.parts or axis.permuted or axis.coordinate or axis.is_piece or axis.ranks
    return not told and all(source.rank != 5 for source, _ in axis.sources)


def _unify_products(ours: list[Axis], theirs: list[Axis]) -> bool | None:
    """Unify wherever borders meet. Returns whether the left side knows more than the right; None if both know all."""
    left_knows = None
    while ours:
        left, right = [ours.pop(0)], [theirs.pop(0)]
        while (difference := size_of(left) - size_of(right)) != 0:
            if difference < 0:
                left.append(ours.pop(0))
            else:
                right.append(theirs.pop(0))
        if len(left) > 1 and len(right) > 1:
            # [45, 80] meets [80, 45]
            left_knows = any(axis.known for axis in left)
            if left_knows and any(axis.known for axis in right):
                poison(*left, *right)
            continue
        (whole,), pieces = (left, right) if len(left) == 1 else (right, left)
        stride = whole.size
        for piece in pieces:
            stride //= piece.size
            union(digit(whole, stride, piece.size), piece)
    return left_knows


def moves(axis: Axis, whole: Axis) -> bool:
    """Whether a concatenation has slices of an axis elsewhere than that has them."""
    starts = accumulate(map(size_of, axis.parts), initial=0)
    cuts = [(find(part[0]).cut, start) for part, start in zip(axis.parts, starts, strict=False) if part]
    return any(cut is not None and find(cut.whole) is whole and cut.start != start for cut, start in cuts)


def _unify_parts(axis: Axis, other: Dim) -> Dim | None:
    """A concatenation meets another one, or a product: whatever lies between two borders is the same.

    Returns what is known now, if a part is permuted; else it is the same as before.
    """
    ours, theirs = (list(map(size_of, parts)) for parts in (axis.parts, other[0].parts if len(other) == 1 else ()))
    pieces: list[Dim] = []
    for start, stop in pairwise(sorted({0, *accumulate(ours), *accumulate(theirs)})):
        our_piece, their_piece = take((axis,), start, stop, exact=True), take(other, start, stop, exact=True)
        if our_piece is not None and their_piece is not None:
            pieces.append(unify(our_piece, their_piece))
        elif any(piece.known for piece in other):
            poison(axis, *other)
            return None
    if any(one.permuted for piece in pieces for one in resolve(piece)) and not same((axis,), other):
        return join(pieces) if sum(map(size_of, pieces)) == axis.size else None
    if ours == theirs:
        union(other[0], axis)
    return None


def union(one: Axis, two: Axis) -> None:
    """Two atomic axes are the same."""
    one, two = find(one), find(two)
    if one.bound is not None or two.bound is not None:
        unify((one,), (two,))
        return
    if one in origins(two) or two in origins(one):
        return
    if one.role and two.role and one.role != two.role:
        poison(one, two)
        return
    lessons = [(piece.digit, piece.cut) for piece, other in ((one, two), (two, one)) if other.known]
    kept, gone = sorted((one, two), key=lambda axis: (not axis.parts, not axis.role, not axis.sources))
    if _made_of(kept, gone):  # as a crop of what was padded is: it is that again
        kept.cut = kept.resampled = None
    elif kept.digit is None and kept.cut is None and not _made_of(gone, kept):
        kept.digit, kept.cut, kept.settled = gone.digit, gone.cut, gone.settled
        kept.resampled = kept.resampled or gone.resampled
    gone.bound = (kept,)
    kept.role = kept.role or gone.role
    kept.sources |= gone.sources
    kept.coordinate |= gone.coordinate
    kept.handed_over |= gone.handed_over
    kept.several |= gone.several
    kept.conflict |= gone.conflict
    kept.permuted |= gone.permuted
    kept.lost = kept.lost or gone.lost
    kept.run = kept.run or gone.run
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


def _made_of(axis: Axis, other: Axis) -> bool:
    return any(cut.whole is other for cut in made_of(axis)[1:])


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
        for piece in map(find, pieces):
            piece.settled |= piece.cut is None  # else it still is a slice of something else
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
