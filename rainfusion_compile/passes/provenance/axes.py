# SPDX-License-Identifier: Apache-2.0
"""Axis algebra: what the dimensions of a tensor are made of.

An `Axis` is one index space, such as the frames of a video. A `Dim` is a product of axes, outer to inner, and stands
for one dimension of a tensor: flattening ``[T, H, W]`` gives the `Dim` ``(T, H, W)``. A concatenation is a single axis
with `parts`, which keeps it whole while views merge it with the batch and split it off again.

A piece of an axis remembers what it was taken from, so that taking apart and putting together again is the identity:

- a *digit* of an axis is ``(index // stride) % size``: what views make when they split a dimension;
- a *cut* of an axis is ``index[start:stop:step]``: what slices make.

Axes learn what they are from operators that pair them: see `unify`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from rainfusion_compile.passes.provenance.axis import ACROSS, Axis, Cut, Dim, Source, find, long, reordered, size_of


def is_of_data(axis: Axis, *, even_last: bool = False) -> bool:
    """Whether an axis may run over something that the caller brought: not over parameters, channels or what is new.

    What was summed over is channels. As long as nothing was, so is the last dim of all inputs but latents, or may be.
    """
    found = origins(axis)
    places = [place for one in found for place in one.sources if place[0].rank and not place[0].parameter]
    channels = (dim in of.channels if of.channels else dim == of.rank - 1 != 4 and not even_last for of, dim in places)
    return any(one.role or one.handed_over or one.ranks for one in found) or not all(channels)


def was_of_data(dim: Dim) -> bool:
    """Whether a dim may run over something that the caller brought, or did before it was put in another order."""
    return any(is_of_data(axis) or any(one.permuted for one in origins(axis)) for axis in resolve(dim))


def in_order(axis: Axis) -> bool:
    """Whether nothing contradicts that an axis counts upwards: it, and whatever it concatenates."""
    if axis.permuted or axis.conflict:
        return False
    ends: dict[Axis, int] = {}
    for pieces in (list(map(find, part)) for part in axis.parts if part):
        cuts = made_of(pieces[0])
        start, end = next(((cut.start, ends[cut.whole]) for cut in cuts if cut.whole in ends), (0, 0))
        if start < end or not all(map(in_order, pieces)):
            return False
        ends |= {cut.whole: cut.stop for cut in cuts}
    return True


def made_of(axis: Axis) -> list[Cut]:
    """What an axis is a slice of, or was resampled from, and what that is, and so on; first the axis itself."""
    axis = find(axis)
    found = [Cut(axis, 0, axis.size, 1)]
    while (cut := axis.cut or axis.resampled) is not None and find(cut.whole) not in (one.whole for one in found):
        _, start, stop, step = found[-1] if axis.cut else Cut(axis, 0, len(range(*cut[1:])), 1)
        axis, first, each = find(cut.whole), cut.start, cut.step
        found.append(Cut(axis, first + start * each, first + (stop - 1) * each + 1, step * each))
    return found


def reach_of(dim: Dim) -> Cut | None:
    """From where to where a dim is of one axis, whatever is put around it; None if that is not known of any."""
    for axis in map(find, dim):
        inner = [cut for part in axis.parts if (cut := reach_of(part)) is not None]
        if inner:
            same_axis = [cut for cut in inner if find(cut.whole) is find(inner[0].whole)]
            return inner[0]._replace(start=min(cut.start for cut in same_axis), stop=max(cut.stop for cut in same_axis))
        if axis.cut is not None:
            return axis.cut
        if axis.known and axis.size > 1:
            return Cut(axis, 0, axis.size, 1)
    return None


def origins(axis: Axis) -> list[Axis]:
    """An axis, and all that it is made of or is a piece of."""
    todo, seen = [axis], dict[Axis, None]()
    while todo:
        one = find(todo.pop())
        if one not in seen:
            seen[one] = None
            todo += [*(one.bound or ()), *(piece for part in one.parts for piece in part)]
            if not one.settled:
                todo += [origin[0] for origin in (one.digit, one.cut) if origin is not None]
    return list(seen)


def resolve(dim: Dim) -> Dim:
    """A dim as the product of its atomic axes, as far as known now."""
    if len(dim) == 1 and dim[0].bound is None and dim[0].digit is None and dim[0].cut is None:
        return dim
    found = (leaf for axis in dim for leaf in leaves(axis))
    return collapse(one for one in found if one.size != 1 or one.known or one.permuted or one.handed_over)


def leaves(axis: Axis) -> list[Axis]:
    """The atomic axes that an axis is the product of, as far as known now."""
    axis = find(axis)
    if axis.bound is None and axis.is_piece:
        axis.resolving = True
        found = _from_whole(axis)
        axis.resolving = False
        if found is not None and axis not in found:
            axis.bound = tuple(found)
    return [axis] if axis.bound is None else [leaf for part in axis.bound for leaf in leaves(part)]


def _from_whole(axis: Axis) -> Sequence[Axis] | None:
    """What a digit or a cut is, if by now something is known about what it was taken from, and borders fit."""
    if axis.digit is not None:
        whole, stride = find(axis.digit[0]), axis.digit[1]
        outer = whole.size // (stride * axis.size)
        pieces = None if whole.bound is None else spread(leaves(whole), (outer, axis.size, stride))
        return None if pieces is None else pieces[1]
    assert axis.cut is not None
    whole = find(axis.cut.whole)
    if axis.cut.step != 1 or (whole.bound is None and not whole.parts):
        return None
    return take(tuple(leaves(whole)), *axis.cut[1:], exact=True)


def collapse(axes: Iterable[Axis]) -> Dim:
    """Put neighbouring digits of one axis together again, if they are known as nothing else."""
    out: list[Axis] = []
    for axis in axes:
        out.append(axis)
        while len(out) > 1 and (whole := joined(*out[-2:])) is not None:
            out[-2:] = leaves(whole)
    return tuple(out)


def joined(outer: Axis, inner: Axis) -> Axis | None:
    """The axis of which these are neighbouring digits, if they are."""
    if outer.digit is None or not (outer.is_piece and (inner.is_piece or inner.digit is None)):
        return None
    whole, stride = find(outer.digit[0]), outer.digit[1]
    if whole is inner and outer.size == 1:
        return whole
    if inner.digit is None or whole is not find(inner.digit[0]) or stride != inner.digit[1] * inner.size:
        return None
    return digit(whole, inner.digit[1], outer.size * inner.size)


def digit(axis: Axis, stride: int, size: int) -> Axis:
    """The axis ``(index // stride) % size`` of an axis; the outermost one inherits what the axis is."""
    axis = find(axis)
    if axis.digit is not None and axis.is_piece:
        whole, offset = axis.digit
        return digit(whole, offset * stride, size)
    if stride == 1 and size == axis.size:
        return axis
    if (stride, size) not in axis.digits:
        piece = Axis(size, permuted=axis.permuted, lost=axis.lost, conflict=axis.conflict, digit=(axis, stride))
        if stride * size == axis.size:
            piece.sources = axis.sources
            piece.role = axis.role if size > 1 else None
        axis.digits[stride, size] = piece
    return axis.digits[stride, size]


def product(axes: Dim) -> Axis:
    """One axis for a product of several; the same again for the same."""
    if len(axes) == 1:
        return axes[0]
    if axes not in axes[0].products:
        axes[0].products[axes] = Axis(size_of(axes), bound=axes)
    return axes[0].products[axes]


def spread(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Dim] | None:
    """Deal a product of axes out to dims of these sizes, splitting axes where needed; None if borders do not fit."""
    left = list(reversed(axes))
    out: list[Dim] = []
    for number, size in enumerate(sizes):
        taken: list[Axis] = []
        need = size
        if size == 1 and left:
            if left[-1].size == 1:
                taken.append(left.pop())
            elif left[-1].sources and number + 1 < len(sizes):
                # an axis split as (1, n): the outer digit is the axis' own, with one index
                taken.append(digit(left[-1], left[-1].size, 1))
        while need > 1:
            axis = left.pop()
            if need % axis.size == 0:
                taken.append(axis)
                need //= axis.size
            elif axis.size % need == 0:
                stride = axis.size // need
                taken.append(digit(axis, stride, need))
                left.append(digit(axis, 1, stride))
                need = 1
            else:
                return None
        out.append(tuple(taken))
    out[-1] += tuple(reversed(left))
    return out


def take(dim: Dim, start: int, stop: int, step: int = 1, *, exact: bool = False) -> Dim | None:
    """The dim ``index[start:stop:step]`` of a dim. With `exact`, None where a border cuts through a product."""
    if stop <= start:
        return (Axis(0),)
    if stop - start <= step:
        stop, step = start + 1, 1
    axes = resolve(dim)
    if len(range(start, stop, step)) == size_of(axes):
        return axes
    outer, *more = [number for number, axis in enumerate(axes) if axis.size > 1]
    if step == 1 and not more and axes[outer].parts:
        return _take_parts(axes[outer].parts, start, stop, exact)
    if not more:
        return tuple(cut_axis(axis, start, stop, step) if axis.size > 1 else axis for axis in axes)
    for number in range(outer + 1, len(axes)):
        stride = size_of(axes[number:])
        if step == 1 and start % stride == 0 and stop % stride == 0:
            piece = take(axes[:number], start // stride, stop // stride, exact=exact)
            return None if piece is None else (*piece, *axes[number:])
    return None if exact else (_across(axes, start, stop, step),)


def _across(axes: Dim, start: int, stop: int, step: int) -> Axis:
    """A slice across the borders of what axes make: nothing that tells more of it later makes a grid of it."""
    piece = cut_axis(product(axes), start, stop, step)
    if any(axis.permuted or is_of_data(axis) for axis in axes):
        piece.permuted, piece.lost = True, next((axis.lost for axis in axes if axis.lost), ACROSS)
    return piece


def _take_parts(parts: Sequence[Dim], start: int, stop: int, exact: bool) -> Dim | None:
    pieces: list[Dim] = []
    for part, end in zip(parts, accumulate(map(size_of, parts)), strict=True):
        begin = end - size_of(part)
        if begin < stop and start < end:
            piece = take(part, max(start - begin, 0), min(stop, end) - begin, exact=exact)
            if piece is None:
                return None
            pieces.append(piece)
    return join(pieces)


def cut_axis(axis: Axis, start: int, stop: int, step: int) -> Axis:
    """The axis ``index[start:stop:step]`` of an axis."""
    axis = find(axis)
    cut = axis.cut
    if cut is not None and axis.is_piece and axis.bound is None and cut.step == step == 1:
        axis, start, stop = find(cut.whole), cut.start + start, cut.start + stop
    if (start, stop, step) == (0, axis.size, 1):
        return axis
    piece = Axis(len(range(start, stop, step)), role=axis.role, sources=axis.sources, cut=Cut(axis, start, stop, step))
    piece.permuted = axis.permuted or (step > 1 and bool(axis.parts))  # their order is not followed
    piece.lost, piece.conflict, piece.handed_over = axis.lost, axis.conflict, axis.handed_over
    return piece


def slice_of(dim: Dim) -> tuple[Dim, int, int] | None:
    """What a dim is one run of, in its order, and where that begins and ends; None if it is not known to be any."""
    outer, *inner = resolve(dim) or (Axis(0),)
    if outer.run is not None and not inner and not outer.permuted and not outer.conflict:
        return resolve((outer.run.whole,)), outer.run.start, outer.run.stop
    if outer.cut is None or outer.cut.step != 1 or not outer.is_piece or outer.conflict:
        return None
    if outer.permuted and outer.lost != ACROSS:
        return None
    each = size_of(inner)
    return resolve((outer.cut.whole, *inner)), outer.cut.start * each, outer.cut.stop * each


def join(dims: Iterable[Dim]) -> Dim:
    """The dim that concatenates `dims`; neighbouring cuts of one axis grow together again.

    It is what all of them are: registers beside columns make no longer rows of a video.
    """
    parts = _grown(dims)
    if not parts:
        return (Axis(0),)
    if len(parts) == 1:
        return parts[0]
    singles = [part[0] if len(part) == 1 else Axis(0) for part in parts]
    roles = {axis.role for axis in singles}
    role = roles.pop() if len(roles) == 1 else None
    sources = frozenset[tuple[Source, int]].intersection(*(axis.sources for axis in singles))
    return (Axis(sum(map(size_of, parts)), role=role, sources=sources, parts=parts),)


def _grown(dims: Iterable[Dim]) -> tuple[Dim, ...]:
    parts: list[Dim] = []
    for dim in dims:
        axes = resolve(dim)
        for part in axes[0].parts if len(axes) == 1 and axes[0].parts else (axes,):
            grown = _grow(parts[-1], part) if parts else None
            if grown is not None:
                parts[-1] = grown
            elif size_of(part):
                parts.append(part)
    return tuple(parts)


def _grow(before: Dim, after: Dim) -> Dim | None:
    before, after = resolve(before), resolve(after)
    if not before or not after or not _same_product(before[1:], after[1:]):
        return None
    one, two = before[0].cut, after[0].cut
    if one is None or two is None or one.stop != two.start or not one.step == two.step == 1:
        return None
    whole = find(one.whole)
    if whole is not find(two.whole) or (whole.parts and (one.start, two.stop) != (0, whole.size)):
        return None
    return (cut_axis(whole, one.start, two.stop, 1), *before[1:])


def segments(dim: Dim) -> list[Dim]:
    """The concatenated pieces of a dim, each as a product of atomic axes; one piece if nothing was concatenated."""
    axes = resolve(dim)
    real = long(axes)
    if len(real) != 1 or not real[0].parts:
        return [axes]
    return list(map(resolve, _grown(piece for part in real[0].parts for piece in segments(part))))


def same(one: Dim, two: Dim) -> bool:
    """Whether two dims run over the same indices in the same order, as far as that can be proved."""
    if size_of(one) != size_of(two):  # of most that are asked about
        return False
    ours, theirs = segments(one), segments(two)
    return len(ours) == len(theirs) and all(map(_same_product, ours, theirs))


def _same_product(one: Dim, two: Dim) -> bool:
    ours, theirs = long(one), long(two)
    return len(ours) == len(theirs) and all(map(_same_axis, ours, theirs))


def _same_axis(one: Axis, two: Axis) -> bool:
    one, two = find(one), find(two)
    if one is two:
        return True
    if one.cut is not None and two.cut is not None:
        if one.cut[1:] != two.cut[1:] or not (one.is_piece and two.is_piece):
            return one.cut[1:] == two.cut[1:] and find(one.cut.whole) is find(two.cut.whole)
        return same((one.cut.whole,), (two.cut.whole,))
    return bool(one.parts) and len(one.parts) == len(two.parts) and all(map(same, one.parts, two.parts))


def permuted(dim: Dim) -> Dim:
    """A dim in an unknown order; the same one again for the same dim."""
    axes = resolve(dim)
    return dim if size_of(dim) == 1 or any(axis.permuted for axis in axes) else (reordered(product(axes)),)


def flipped(dim: Dim) -> Dim:
    """A dim turned round: known again once it is turned back, unless paired with another order meanwhile (`unify`)."""
    if size_of(dim) == 1:
        return dim
    whole = product(resolve(dim))
    whole.mirror = whole.mirror or Axis(whole.size, permuted=True, mirror=whole)
    return (whole.mirror,)
