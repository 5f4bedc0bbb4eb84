# SPDX-License-Identifier: Apache-2.0
"""Layouts as rows of numbers, for graphs that learn them at run time.

A row has `SEGMENTS` segments of four numbers, one for each run of tokens, in order: ``(VIDEO, T, H, W)`` or ``(TEXT,
tokens, 0, 0)``, then zeros. One text segment may have `REST` for its length: all tokens that the others leave. A row of
zeros has no video. All rows are equally long, so a graph that takes them is compiled once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rainfusion_compile.sparsity.layout import Grid, VideoLayout, as_grid

SEGMENTS = 16
WIDTH = 4 * SEGMENTS
TEXT, VIDEO = 1, 2
REST = -1
NO_VIDEO = (0,) * WIDTH


def encode(layout: VideoLayout, rest: int | None = None) -> tuple[int, ...]:
    """The row of a layout. With `rest`, the text of that number is as long as the call has it.

    Raises:
        ValueError: if the layout has more segments than a row.
    """
    text = [REST if number == rest else length for number, length in enumerate(layout.text)]
    segments = [(TEXT, text[0], 0, 0)]
    for grid, after in zip(layout.grids, text[1:], strict=True):
        segments += [(VIDEO, *grid), (TEXT, after, 0, 0)]
    row = [number for segment in segments if segment[1] for number in segment]
    if len(row) > WIDTH:
        raise ValueError(f"{len(row) // 4} runs of tokens; a row has {SEGMENTS}")
    return (*row, *NO_VIDEO[len(row) :])


def decode(row: Sequence[int], tokens: int | None = None) -> VideoLayout | None:
    """The layout of a row, for a sequence of so many tokens (if not told, without a rest); None if it has no video.

    Raises:
        ValueError: if the row is none, or another number of tokens.
    """
    if len(row) != WIDTH:
        raise ValueError(f"a row has {WIDTH} numbers, not {len(row)}")
    segments = list(itertools.takewhile(any, (row[start : start + 4] for start in range(0, WIDTH, 4))))
    grids, text = list[Grid](), [0]
    for kind, *sizes in segments:
        if kind == VIDEO:
            grids.append(tuple(sizes))  # type: ignore[arg-type]
            text.append(0)
        elif kind == TEXT and not text[-1]:
            text[-1] = sizes[0]
        else:
            raise ValueError(f"no layout of videos and text: {segments}")
    if any(row[4 * len(segments) :]) or bool(segments) != bool(grids) or text.count(REST) > (tokens is not None):
        raise ValueError(f"no layout of videos and text: {row}")
    if not grids:
        return None
    if tokens is not None and REST in text:
        text[text.index(REST)] = tokens - sum(map(math.prod, grids)) - (sum(text) - REST)
    layout = VideoLayout(as_grid(grids), tuple(text))
    if tokens not in (None, layout.tokens):
        raise ValueError(f"{layout} for {tokens} tokens")
    return layout
