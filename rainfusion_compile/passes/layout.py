# SPDX-License-Identifier: Apache-2.0
"""From the axes of a token dimension to a video grid and its text, or to why there is none."""

from __future__ import annotations

from dataclasses import dataclass

from rainfusion_compile.passes.axes import Axis, Dim, Role, coarsest, segments, size_of

Grid = tuple[int, int, int]
Text = tuple[int, int]

_ORDER: tuple[Role, ...] = ("time", "row", "col")


@dataclass
class Layout:
    """Grid and text of a token dimension; or `reason`, why they are not known.

    `permuted` tokens stand in an order of their own: a grid must not be assumed even if it would fit.
    """

    grid: Grid | None = None
    text: Text | None = None
    reason: str | None = None
    permuted: bool = False


def find_layout(dim: Dim) -> Layout:
    """The layout of tokens that run over `dim`."""
    parts = segments(dim)
    axes = [axis for part in parts for axis in part]
    if any(axis.permuted for axis in axes):
        return Layout(reason="tokens are reordered (flip, roll, sort or indexing)", permuted=True)
    if any(axis.conflict for axis in axes):
        return Layout(reason="token order: operators contradict each other about the grid", permuted=True)
    found = [_grid(part) for part in parts]
    videos = [number for number, grid in enumerate(found) if not isinstance(grid, str)]
    if len(videos) > 1:
        return Layout(reason=f"several video spans: {', '.join(str(found[number]) for number in videos)}")
    if not videos:
        longest = max(range(len(parts)), key=lambda number: size_of(parts[number]), default=0)
        return Layout(reason=str(found[longest]) if found else "no tokens")
    (video,) = videos
    grid = found[video]
    assert not isinstance(grid, str)
    before, after = (sum(map(size_of, side)) for side in (parts[:video], parts[video + 1 :]))
    return Layout(grid=grid, text=(before, after))


def _grid(part: Dim) -> Grid | str:
    """The grid of a product of axes, or why it is none."""
    axes = list(part)
    if len(axes) > 3:
        axes = list(coarsest(part))
    if any(axis.role for axis in axes):
        axes = [axis for axis in axes if axis.size > 1 or axis.role]
    # a view may have put the one index of a split dim anywhere, but not before the frames
    axes = [axis for number, axis in enumerate(axes) if axis.size > 1 or axis.role or not (number and axis.digit)]
    while len(axes) > 3 and any(axis.size == 1 for axis in axes):
        axes.remove(next(axis for axis in axes if axis.size == 1))
    sizes = " x ".join(str(axis.size) for axis in axes)
    if len(axes) < 2:
        along = f"along {axes[0].role} only" if axes and axes[0].role else "in one unstructured axis"
        return f"tokens: {size_of(axes)} {along}; give options grid=(T, H, W)"
    if len(axes) > 3 or len(set(axes)) < len(axes):
        return f"tokens: {sizes} are not the axes of one video; give options grid=(T, H, W)"
    if any(axis.role for axis in axes):
        return _by_role(axes, sizes)
    if len(axes) == 3 and _in_source_order(axes):
        return axes[0].size, axes[1].size, axes[2].size
    return f"order of the axes cannot be known: {sizes}; give options grid=(T, H, W)"


def _by_role(axes: list[Axis], sizes: str) -> Grid | str:
    roles = [axis.role for axis in axes]
    missing = [role for role in _ORDER if role not in roles]
    unknown = roles.count(None)
    if unknown == 1 and len(missing) == 1:
        roles[roles.index(None)] = missing[0]
    elif unknown:
        return f"order of the axes cannot be known: {sizes}; give options grid=(T, H, W)"
    found = {role: axis.size for role, axis in zip(roles, axes, strict=True)}
    if list(found) != [role for role in _ORDER if role in found] or len(found) < len(axes):
        return f"token order is {', '.join(map(str, roles))} ({sizes}), not time, row, col"
    if sum(axis.size > 1 for axis in axes) < 2:
        return f"tokens: {sizes} along one axis only"
    time, row, col = (found.get(role, 1) for role in _ORDER)
    return time, row, col


def _in_source_order(axes: list[Axis]) -> bool:
    """Whether the axes came side by side from one tensor or mesh, frames before rows before columns."""
    places: dict[object, list[int]] = {}
    for axis in axes:
        for source, dim in sorted(axis.sources, key=lambda item: item[1]):
            places.setdefault(source, []).append(dim)
    orders = []
    for source in places:
        dims = [[dim for tensor, dim in axis.sources if tensor == source] for axis in axes]
        if all(len(found) == 1 for found in dims):
            orders.append([found[0] for found in dims])
    return bool(orders) and all(order[0] < order[1] < order[2] for order in orders)
