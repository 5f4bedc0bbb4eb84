# SPDX-License-Identifier: Apache-2.0
"""Layouts as rows of numbers, for graphs that learn them at run time.

A row has `SEGMENTS` segments of four numbers, one for each run of tokens in the sequence, in order:
``(VIDEO, T, H, W)`` or ``(TEXT, tokens, 0, 0)``, then zeros. One text segment may have `REST` for its length: all
tokens that the others leave. A row of zeros has no video. All rows are equally long, so a graph that takes them is
compiled once.
"""

from __future__ import annotations

from collections.abc import Sequence

from rainfusion_compile.grid import VideoLayout

SEGMENTS = 16
WIDTH = 4 * SEGMENTS
TEXT, VIDEO = 1, 2
REST = -1
NO_VIDEO = (0,) * WIDTH


def encode(layout: VideoLayout, rest: int | None = None) -> tuple[int, ...]:
    """The row of a layout. With `rest`, the text before (0) or after (1) the video is as long as the call has it."""
    before, after = (REST if side == rest else length for side, length in enumerate(layout.text))
    segments = [(TEXT, before, 0, 0), (VIDEO, *layout.grid), (TEXT, after, 0, 0)]
    row = [number for segment in segments if segment[1] for number in segment]
    return (*row, *NO_VIDEO[len(row) :])


def decode(row: Sequence[int], tokens: int | None = None) -> VideoLayout | None:
    """The layout of a row, for a sequence of so many tokens; None if it has no video.

    Without `tokens`, the row must have no rest.

    Raises:
        ValueError: if the row is none, or another number of tokens.
    """
    if len(row) != WIDTH:
        raise ValueError(f"a row has {WIDTH} numbers, not {len(row)}")
    segments = [tuple(row[start : start + 4]) for start in range(0, len(row), 4)]
    kinds = [segment[0] for segment in segments if segment[0]]
    if not kinds:
        return None
    if kinds not in ([VIDEO], [TEXT, VIDEO], [VIDEO, TEXT], [TEXT, VIDEO, TEXT]):
        raise ValueError(f"no layout of one video: {segments[: len(kinds)]}")
    video = kinds.index(VIDEO)
    before, after = (segments[0][1] if video else 0), (segments[video + 1][1] if kinds[-1] == TEXT else 0)
    grid = segments[video][1:]
    if tokens is not None:
        around = tokens - VideoLayout(grid).video_tokens  # type: ignore[arg-type]
        before, after = (around - after if before == REST else before), (around - before if after == REST else after)
    layout = VideoLayout(grid, (before, after))  # type: ignore[arg-type]
    if tokens not in (None, layout.tokens):
        raise ValueError(f"{layout} for {tokens} tokens")
    return layout
