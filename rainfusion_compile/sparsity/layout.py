# SPDX-License-Identifier: Apache-2.0
"""The video grid: where each token stands.

A sequence is ``before`` text tokens, then ``T * H * W`` video tokens in raster order (frame, row, column), then
``after`` text tokens; or several videos with text before, between and after them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Grid: TypeAlias = tuple[int, int, int]
Grids: TypeAlias = Grid | tuple[Grid, ...]
"""``(T, H, W)``; or one for each video of a sequence that has several."""


class Span(NamedTuple):
    """One video in a sequence: ``(T, H, W)``, and the number of its first token."""

    grid: Grid
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.grid)


@dataclass(frozen=True)
class VideoLayout:
    """A video of ``grid = (T, H, W)`` tokens with ``text = (before, after)`` text tokens around it, none by default.

    Several videos in one sequence have a tuple of grids, and text before, between and after them: one number more.

    Raises:
        ValueError: if a grid size is less than one, a text length is negative, or there are too many or too few.
    """

    grid: Grids
    text: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", checked_grids("grid", self.grid))
        count = len(self.grids) + 1
        object.__setattr__(self, "text", checked_ints("text", self.text or (0,) * count, count, minimum=0))

    @property
    def grids(self) -> tuple[Grid, ...]:
        return as_grids(self.grid)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The videos, in the order of their tokens."""
        spans: list[Span] = []
        for grid, before in zip(self.grids, self.text, strict=False):
            spans.append(Span(grid, before + (spans[-1].stop if spans else 0)))
        return tuple(spans)

    @property
    def tokens(self) -> int:
        return sum(map(math.prod, self.grids)) + sum(self.text)

    def coordinates(self) -> tuple[Tensor, ...]:
        """Video (by number), frame, row and column of every token; four int64 tensors ``[tokens]``, -1 for text."""
        places = torch.full((4, self.tokens), -1)
        for number, span in enumerate(self.spans):
            places[0, span.start : span.stop] = number
            index = torch.arange(span.stop - span.start)
            places[1:, span.start : span.stop] = torch.stack(torch.unravel_index(index, span.grid))
        return places.unbind()

    def first_frames(self) -> Tensor:
        """Which tokens are of the first frame of a video that has more than one; bool ``[tokens]``."""
        video, frame, _, _ = self.coordinates()
        return (frame == 0) & torch.tensor([frames > 1 for frames, _, _ in self.grids])[video]


def as_grids(grid: Grids) -> tuple[Grid, ...]:
    """The grids of one video or several."""
    return grid if isinstance(grid[0], tuple) else (grid,)


def grid_text(grid: Sequence[Any]) -> str:
    """``TxHxW``, of one video or several; of lists too, as reports have them."""
    grids = [grid] if isinstance(grid[0], int) else grid
    return " and ".join("x".join(map(str, one)) for one in grids)


def as_grid(grids: Sequence[Grid]) -> Grids:
    """One grid by itself, several as a tuple."""
    return grids[0] if len(grids) == 1 else tuple(grids)


def checked_grids(name: str, value: object) -> Grids:
    """``value`` as ``(T, H, W)``, or as a tuple of such if it is several; or a ``ValueError`` naming it."""
    if isinstance(value, (tuple, list)) and value and all(isinstance(item, (tuple, list)) for item in value):
        return as_grid([_checked_grid(name, item) for item in value])
    return _checked_grid(name, value)


def _checked_grid(name: str, value: object) -> Grid:
    return checked_ints(name, value, 3, minimum=1, of=" (frames, rows, columns)")  # type: ignore[return-value]


def checked_ints(name: str, value: object, count: int, *, minimum: int, of: str = "") -> tuple[int, ...]:
    """``value`` as a tuple of ``count`` ints of at least ``minimum``, or a ``ValueError`` naming it and ``of`` what."""
    items = value if isinstance(value, (tuple, list)) and len(value) == count else (None,)
    if any(isinstance(item, bool) or not isinstance(item, int) or item < minimum for item in items):
        raise ValueError(f"{name} must be {count} integers, each at least {minimum}{of}; got {value!r}")
    return tuple(items)
