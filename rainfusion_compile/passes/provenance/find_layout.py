# SPDX-License-Identifier: Apache-2.0
"""From the axes of a token dimension to a video grid and its text, or to why there is none.

Latents of a video are inputs ``[B, C, T, H, W]``, ``[B, T, C, H, W]`` or ``[B, T, H, W, C]``. So an axis that was a dim
of such an input has a place there, which says what it may be, beside the role that a convolution may have given it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rainfusion_compile.passes.attention_match import DenseReason, Reason
from rainfusion_compile.passes.provenance.axes import in_order, is_of_data, resolve, segments
from rainfusion_compile.passes.provenance.axis import ACROSS, Axis, Dim, Role, Source, find, long, size_of
from rainfusion_compile.sparsity.layout import Grid, VideoLayout

ROLES: tuple[Role, ...] = ("time", "row", "col")
_LATENTS = ((2, 3, 4), (1, 3, 4), (1, 2, 3))
"""The dims of frames, rows and columns."""
_REORDERED = "tokens are reordered (flip, roll, sort, indexing, or ranks that have one another's parts)"


def find_layout(dim: Dim) -> VideoLayout | Reason:
    """The layout of tokens that run over `dim`: one video or several, and text or the like around them.

    Or why it is not known; reasons of the kind ``NO_GRID`` say that none may be assumed even if it would fit.
    """
    grids, text, reasons = list[Grid](), [0], list[tuple[int, Reason]]()
    for part in segments(dim):
        grid = _lay_out(part)
        if isinstance(grid, Reason):
            text[-1] += size_of(part)
            reasons.append((size_of(part), grid))
        else:
            grids.append(grid)
            text.append(0)
    if grids:
        return VideoLayout(tuple(grids), tuple(text))
    certain = any(reason.kind is DenseReason.NO_GRID for _, reason in reasons)
    of_longest = str(max(reasons, key=lambda one: one[0])[1])
    return Reason(DenseReason.NO_GRID if certain else DenseReason.GRID_UNKNOWN, of_longest)


def _lay_out(part: Dim) -> Grid | Reason:
    """The grid of one product of axes; or why it is no video's that is known."""
    axes = list(part)
    if any(axis.conflict for axis in axes):
        return _none("token order: operators contradict each other about the grid")
    if any(axis.permuted and not axis.lost for axis in axes):
        return _none(_REORDERED)
    lost = [axis.lost for axis in axes if axis.lost]
    if lost and set(lost) != {ACROSS}:
        return _unknown(f"the order of tokens is lost at {lost[0]}")
    if lost:
        return _unknown(f"tokens: {size_of(axes)} in one unstructured axis")
    if not all(map(in_order, axes)):
        return _none(_REORDERED)
    if not _whole(axes):
        return _none("token order: pieces of one axis stand for axes of the video")
    if not all(any(map(is_of_data, dim)) for axis in axes for dim in axis.parts):
        return _unknown(f"tokens: {size_of(axes)}, with others than the video's among them")
    if any(axis.role for axis in axes):
        axes = [axis for axis in axes if axis.size > 1 or axis.role]
    # a view may have put the one index of a split dim anywhere, but not before the frames
    axes = [axis for number, axis in enumerate(axes) if axis.size > 1 or axis.role or not (number and axis.digit)]
    while len(axes) > 3 and any(axis.size == 1 for axis in axes):
        axes.remove(next(axis for axis in axes if axis.size == 1))
    sizes = " x ".join(str(axis.size) for axis in axes)
    if len(axes) < 2:
        if axes and axes[0].role:
            return _unknown(f"tokens: {sizes} along {axes[0].role} only")
        return _unknown(f"tokens: {size_of(axes)} in one unstructured axis")
    if len(axes) > 3 or len(set(axes)) < len(axes):
        return _unknown(f"tokens: {sizes} are not the axes of one video")
    if any(axis.role for axis in axes):
        return _by_role(axes, sizes)
    if len(axes) == 3 and _in_source_order(axes):
        return axes[0].size, axes[1].size, axes[2].size
    return _unknown(f"order of the axes cannot be known: {sizes}")


def _none(why: str) -> Reason:
    return Reason(DenseReason.NO_GRID, why)


def _unknown(why: str) -> Reason:
    return Reason(DenseReason.GRID_UNKNOWN, why)


def _whole(axes: Sequence[Axis]) -> bool:
    """Whether no axis is an inner piece of frames, rows or columns, and pieces of tokens stand in their order."""
    strides: dict[Axis, int] = {}
    for axis in axes:
        whole, stride, seen = axis, 1, set[Axis]()
        while whole.digit is not None and whole not in seen:
            seen.add(whole)
            stride *= whole.digit[1]
            whole = find(whole.digit[0])
            ranks = {source.rank for source, _ in whole.sources if not source.parameter}
            if (whole.role or 5 in ranks) and stride * axis.size < whole.size:
                return False
            if any(ranks) and stride >= strides.setdefault(whole, whole.size + 1):
                return False
            strides[whole] = stride
    return True


def _by_role(axes: list[Axis], sizes: str) -> Grid | Reason:
    unknown = [axis for axis in axes if axis.role is None]
    known = [(axis, axis.role) for axis in axes if axis.role]
    missing = [role for role in ROLES if role not in (axis.role for axis in axes)]
    if unknown and not (len(unknown) == len(missing) == 1 and _shown_by_place(unknown[0], missing[0], known)):
        return _unknown(f"order of the axes cannot be known: {sizes}")
    names = [axis.role or missing[0] for axis in axes]
    if names != [role for role in ROLES if role in names]:
        return _none(f"token order is {', '.join(names)} ({sizes}), not time, row, col")
    if not _places_fit(known):
        return _none("token order: the input has these axes in another order")
    if len(long(axes)) < 2:
        return _unknown(f"tokens: {sizes} along one axis only")
    found = dict(zip(names, (axis.size for axis in axes), strict=True))
    time, row, col = (found.get(role, 1) for role in ROLES)
    return time, row, col


def _in_source_order(axes: list[Axis]) -> bool:
    """Whether the axes came side by side from a video or a mesh, frames before rows before columns.

    A mesh of three coordinates names its axes by their order: nothing else tells frames from rows there.
    """
    orders = []
    pairs = list(zip(axes, ROLES, strict=True))
    for source in {source for axis in axes for source, _ in axis.sources}:
        if source.rank == 5 and not source.parameter and not _layouts(pairs, source):
            return False
        dims = [[dim for place, dim in axis.sources if place == source] for axis in axes]
        if source.rank in (0, 5) and all(len(found) == 1 for found in dims):
            ascending = dims[0] < dims[1] < dims[2]
            orders.append(_shown_by_place(axes[0], "time", pairs[1:]) if source.rank else ascending)
    return bool(orders) and all(orders)


# --- the places that an input has for frames, rows and columns -------------------------------------------------------


def may_be(dims: Sequence[Dim], roles: Sequence[Role | None]) -> bool:
    """Whether dims of a convolution may be what it takes them for: one axis each, of these roles or of none yet."""
    axes = list(map(long, dims))
    if any(len(found) > 1 or any(axis.permuted for axis in found) for found in axes):
        return False
    pairs = [(found[0], role) for found, role in zip(axes, roles, strict=True) if found and role]
    return all(axis.role in (None, role) for axis, role in pairs) and _places_fit(pairs)


def mixes_tokens(dim: Dim) -> bool:
    """Whether an operator that sums over a dim mixes tokens; else, what it holds of an input are channels from now on.

    Who has summed over channels of an input before sums over tokens where it sums over another dim of it.
    """
    axes = long(resolve(dim)) or resolve(dim)
    parts = [mixes_tokens(part) for axis in axes for part in axis.parts]
    places = [place for axis in axes for place in axis.sources]
    beside = [place not in source.channels for source, place in places if source.channels]
    if any(parts) or (beside and all(beside)) or any(axis.role or axis.permuted or axis.conflict for axis in axes):
        return True
    for source, place in places:
        source.channels.add(place)
    return False


def _places_fit(pairs: Sequence[tuple[Axis, Role]]) -> bool:
    """Whether axes of these roles may stand in an input where they do."""
    return all(_layouts(pairs, source) for source in _inputs(axis for axis, _ in pairs))


def _shown_by_place(unknown: Axis, role: Role, pairs: Sequence[tuple[Axis, Role]]) -> bool:
    """Whether an input's dims show that an axis has this role, beside others of these roles.

    Where another dim of the input may be it as well, that one must be its channels. A parameter, a table of positions,
    has them last.
    """
    for source in _inputs([unknown]):
        for layout in _layouts([*pairs, (unknown, role)], source):
            channels = _channels(layout)
            if channels in source.channels or (channels == 1 and not source.parameter):
                return True
    return False


def _inputs(axes: Iterable[Axis]) -> set[Source]:
    return {source for axis in axes for source, _ in find(axis).sources if source.rank == 5}


def _layouts(pairs: Sequence[tuple[Axis, Role]], source: Source) -> list[tuple[int, int, int]]:
    """How the dims of an input may be read, if axes of it have these roles."""
    places = [(ROLES.index(role), place) for axis, role in pairs for of, place in find(axis).sources if of == source]
    fitting = [layout for layout in _LATENTS if all(layout[number] == place for number, place in places)]
    return [one for one in fitting if not source.channels - {0} or _channels(one) in source.channels]


def _channels(layout: tuple[int, int, int]) -> int:
    (place,) = {1, 2, 3, 4} - {*layout}
    return place
