# SPDX-License-Identifier: Apache-2.0
"""Latents of a video as an input has them: which of its five dims may be frames, rows and columns.

``[B, C, T, H, W]``, ``[B, T, C, H, W]`` or ``[B, T, H, W, C]``. So an axis that was a dim of such an input has a place
there, which says what it may be, beside the role that a convolution may have given it.
"""

from __future__ import annotations

from collections.abc import Sequence

from rainfusion_compile.passes.provenance.axes import resolve
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Role, Source, find

ROLES: tuple[Role, ...] = ("time", "row", "col")
_LATENTS = ((2, 3, 4), (1, 3, 4), (1, 2, 3))
"""The dims of frames, rows and columns."""


def may_be(dims: Sequence[Dim], roles: Sequence[Role | None]) -> bool:
    """Whether dims of a convolution may be what it takes them for: one axis each, of these roles or of none yet."""
    axes = [[axis for axis in dim if axis.size > 1] for dim in dims]
    if any(len(found) > 1 or any(axis.permuted for axis in found) for found in axes):
        return False
    pairs = [(found[0], role) for found, role in zip(axes, roles, strict=True) if found and role]
    return all(axis.role in (None, role) for axis, role in pairs) and places_fit(pairs)


def places_fit(pairs: Sequence[tuple[Axis, Role]]) -> bool:
    """Whether axes of these roles may stand in an input where they do."""
    return all(_layouts(pairs, source) for source in _inputs(axis for axis, _ in pairs))


def shown_by_place(unknown: Axis, role: Role, pairs: Sequence[tuple[Axis, Role]]) -> bool:
    """Whether an input's dims show that an axis has this role, beside others of these roles.

    Where another dim of the input may be it as well, that one must be its channels.
    """
    unknown = find(unknown)
    for source in _inputs([unknown]):
        for layout in _layouts([*pairs, (unknown, role)], source):
            (channels,) = {1, 2, 3, 4} - {*layout}
            if channels == 1 or channels in source.channels or (channels == 4 and source.parameter):
                return True
    return False


def note_channels(dim: Dim) -> None:
    """An operator sums over a dim: what it holds of an input are no tokens."""
    for axis in resolve(dim):
        for source, place in axis.sources:
            source.channels.add(place)


def _inputs(axes: object) -> set[Source]:
    return {source for axis in axes for source, _ in find(axis).sources if source.rank == 5}  # type: ignore[attr-defined]


def _layouts(pairs: Sequence[tuple[Axis, Role]], source: Source) -> list[tuple[int, int, int]]:
    """How the dims of an input may be read, if axes of it have these roles."""
    places = [(ROLES.index(role), place) for axis, role in pairs for of, place in find(axis).sources if of == source]
    return [layout for layout in _LATENTS if all(layout[number] == place for number, place in places)]
