# SPDX-License-Identifier: Apache-2.0
"""From the axes of a token dimension to a video grid and its text, or to why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from rainfusion_compile.passes.provenance.axes import join_digits, resolve, segments
from rainfusion_compile.passes.provenance.axis import Axis, Dim, find, size_of
from rainfusion_compile.passes.provenance.latents import ROLES, places_fit, shown_by_place
from rainfusion_compile.passes.reasons import DenseReason, Reason
from rainfusion_compile.sparsity.layout import Grid, VideoLayout

_ADVICE = "give options grid=(T, H, W)"


def find_layout(dim: Dim) -> VideoLayout | Reason:
    """The layout of tokens that run over `dim`: one video or several, and text or the like around them.

    Or why it is not known; reasons of the kind ``NO_GRID`` say that none may be assumed even if it would fit.
    """
    parts = segments(dim)
    found = [_lay_out(part) for part in parts]
    if all(part.grid is None for part in found):
        longest = max(range(len(parts)), key=lambda number: size_of(parts[number]))
        kind = DenseReason.NO_GRID if any(part.certain for part in found) else DenseReason.GRID_UNKNOWN
        return Reason(kind, str(found[longest].reason))
    grids, text = list[Grid](), [0]
    for part, one in zip(parts, found, strict=True):
        if one.grid is None:
            text[-1] += size_of(part)
        else:
            grids.append(one.grid)
            text.append(0)
    return VideoLayout(tuple(grids), tuple(text))


@dataclass
class _Part:
    """What one product of axes is: a video's grid; or why it is none that is known."""

    grid: Grid | None = None
    reason: str | None = None
    certain: bool = False


def _lay_out(part: Dim) -> _Part:
    axes = list(part if len(part) <= 3 else _coarsest(part))
    if any(axis.conflict for axis in axes):
        return _Part(reason="token order: operators contradict each other about the grid", certain=True)
    lost = [axis.lost for axis in axes if axis.lost]
    if lost:
        return _Part(reason=f"the order of tokens is lost at {lost[0]}; {_ADVICE}")
    if not all(map(_in_order, axes)):
        return _Part(reason="tokens are reordered (flip, roll, sort or indexing)", certain=True)
    if any(axis.role for axis in axes):
        axes = [axis for axis in axes if axis.size > 1 or axis.role]
    # a view may have put the one index of a split dim anywhere, but not before the frames
    axes = [axis for number, axis in enumerate(axes) if axis.size > 1 or axis.role or not (number and axis.digit)]
    while len(axes) > 3 and any(axis.size == 1 for axis in axes):
        axes.remove(next(axis for axis in axes if axis.size == 1))
    sizes = " x ".join(str(axis.size) for axis in axes)
    if len(axes) < 2:
        if axes and axes[0].role:
            return _Part(reason=f"tokens: {sizes} along {axes[0].role} only")
        return _Part(reason=f"tokens: {size_of(axes)} in one unstructured axis; {_ADVICE}")
    if len(axes) > 3 or len(set(axes)) < len(axes):
        return _Part(reason=f"tokens: {sizes} are not the axes of one video; {_ADVICE}")
    if any(axis.role for axis in axes):
        return _by_role(axes, sizes)
    if len(axes) == 3 and _in_source_order(axes):
        return _Part(grid=(axes[0].size, axes[1].size, axes[2].size))
    return _Part(reason=f"order of the axes cannot be known: {sizes}; {_ADVICE}")


def _coarsest(dim: Dim) -> Dim:
    """Like `resolve`, with even those digits together that were found to be something by themselves."""
    out: list[Axis] = []
    for axis in resolve(dim):
        out.append(axis)
        while len(out) > 1 and (joined := join_digits(out[-2], out[-1], even_settled=True)) is not None:
            out[-2:] = [find(joined)]
    return tuple(out)


def _in_order(axis: Axis) -> bool:
    """Whether nothing contradicts that an axis counts upwards: it, and whatever it concatenates."""
    if axis.permuted or axis.conflict:
        return False
    ends: dict[Axis, int] = {}
    for piece in (find(piece) for part in axis.parts for piece in part):
        if not _in_order(piece):
            return False
        if piece.cut is not None:
            whole = find(piece.cut.whole)
            if piece.cut.start < ends.get(whole, 0):
                return False
            ends[whole] = piece.cut.stop
    return True


def _by_role(axes: list[Axis], sizes: str) -> _Part:
    unknown = [axis for axis in axes if axis.role is None]
    known = [(axis, axis.role) for axis in axes if axis.role]
    roles = [role for _, role in known]
    missing = [role for role in ROLES if role not in roles]
    if unknown and not (len(unknown) == len(missing) == 1 and shown_by_place(unknown[0], missing[0], known)):
        return _Part(reason=f"order of the axes cannot be known: {sizes}; {_ADVICE}")
    names = [axis.role or missing[0] for axis in axes]
    if names != [role for role in ROLES if role in names]:
        return _Part(reason=f"token order is {', '.join(names)} ({sizes}), not time, row, col", certain=True)
    if not places_fit(known):
        return _Part(reason="token order: the input has these axes in another order", certain=True)
    if sum(axis.size > 1 for axis in axes) < 2:
        return _Part(reason=f"tokens: {sizes} along one axis only")
    found = dict(zip(names, (axis.size for axis in axes), strict=True))
    time, row, col = (found.get(role, 1) for role in ROLES)
    return _Part(grid=(time, row, col))


def _in_source_order(axes: list[Axis]) -> bool:
    """Whether the axes came side by side from a video or a mesh, frames before rows before columns.

    A mesh of three coordinates names its axes by their order: nothing else tells frames from rows there.
    """
    orders = []
    for source in {source for axis in axes for source, _ in axis.sources}:
        dims = [[dim for place, dim in axis.sources if place == source] for axis in axes]
        if source.rank in (0, 5) and all(len(found) == 1 for found in dims):
            pairs = list(zip(axes, ROLES, strict=True))
            ascending = dims[0] < dims[1] < dims[2]
            orders.append(shown_by_place(axes[0], "time", pairs[1:]) if source.rank else ascending)
    return bool(orders) and all(orders)
