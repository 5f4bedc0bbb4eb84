# SPDX-License-Identifier: Apache-2.0
"""Grids that tables of positions show.

Blocks that are compiled by themselves are handed a rotary table, or the positions that one is made of: a row of numbers
for each token, each a function of the token's frame, row or column alone. That proves the grid, for 45x80 and 80x45
repeat in other places. Text may stand before and after, all at one place. Coordinates themselves, ``[tokens, 3]``, may
also have other text and several videos in one sequence.
All this is data, so it is read while the model runs: a few passes over a small tensor, some waits for the device.

Proved are three sizes, and that tokens are the raster of three axes, of which the first has the first columns, each
without a gap, a tile or a place in another order. Conventions, which no number can show, are that these are frames,
rows and columns; that positions count up from 0 or evenly around it; and that the slowest frequency stays within a
sixth of a turn, so that sines go up, cosines down, and an axis that is walked backwards is seen. One row or column in
each frame looks like an image, and is not read.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rainfusion_compile.sparsity.layout import Grid, VideoLayout, as_grid

LONGEST_ROW = 4096  # tokens in a row of a frame, at most
LONGEST_TEXT = 4096
_NEAR = 1e-5  # of a column's largest value is equal: vectorised functions differ in the last digit from scalar ones
_AT_ONCE = 2**24  # numbers that are compared at once, which bounds the memory that reading takes

Reading = tuple[int, VideoLayout] | None
"""The dimension that runs over tokens, and their layout; None if the tensor is no table of positions."""


def read_positions(tensor: Tensor, min_tokens: int = 0) -> Reading:
    """What a tensor says about the layout of the tokens that one of its dimensions runs over.

    Args:
        tensor: of any shape and dtype, anywhere. Other dimensions may be channels, samples or heads.
        min_tokens: dimensions of fewer are not looked at.

    Returns:
        The dimension and its layout, if the numbers along it prove one; else None. One video: each number depends on
        the frame, the row or the column of a raster alone, each of the three shows in some, in this order, and counts.
        Two coordinates that count, and nothing else but before them, make an image, T = 1. Equal rows at either end are
        text, and nothing is read where these may be so many or one less. Coordinates ``[tokens, 3]``:
        every video is a raster of its own, others are text. Parameters, subclasses and fake tensors are not read.
    """
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta or tensor.dtype == torch.bool:
        return None
    found = [(dim, _layout_along(tensor, dim)) for dim, size in enumerate(tensor.shape) if size >= max(min_tokens, 4)]
    readings = [(dim, layout) for dim, layout in found if layout is not None]
    return readings[0] if len(readings) == 1 else None


def _layout_along(tensor: Tensor, dim: int) -> VideoLayout | None:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    tensor = tensor.movedim(dim, 0)
    if tensor.dim() == 1:  # one number for each token is no position
        return None
    ends = _in_common(tensor[0], tensor[1], tensor[-1], tensor[-2])
    runs = [_of_one_place(tensor, end) if share == 1 else (0,) for end, share in enumerate(ends)]
    found = list[VideoLayout]()
    for before, after in itertools.product(*runs):
        rest = tensor[before : len(tensor) - after]
        if len(rest) < 4:  # two places, and no more
            continue
        share = _in_common(rest[0], rest[1])[0] if before else ends[0]
        # two neighbours in a row of a frame have much in common, and are not the same
        if 0.25 <= share < 1 and (grid := grid_of(rest.flatten(1))) is not None:
            found.append(VideoLayout(grid, (before, after)))
    if found:
        return found[0] if len(found) == 1 else None
    return rasters_of(tensor.flatten(1)) if tensor.shape[1:].numel() == 3 else None


def _in_common(*rows: Tensor) -> list[float]:
    """How many numbers are alike in each pair of these, one after the other; not a number if there are none."""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return torch.stack([(one == other).float().mean() for one, other in pairs]).tolist()


def _of_one_place(table: Tensor, end: int) -> tuple[int, ...]:
    """How many rows at the beginning, or at the end if that is 1, are text at one place, and one less.

    The last of them may be a video's first token.
    """
    rows = table[-LONGEST_TEXT - 2 :].flip(0) if end else table[: LONGEST_TEXT + 2]
    run = int((rows == rows[0]).flatten(1).all(1).int().cumprod(0).sum())
    return (run - 1, run) if run <= min(LONGEST_TEXT + 1, len(table) - 4) else (0,)


def grid_of(table: Tensor) -> Grid | None:
    """The grid of a table of positions ``[tokens, columns]``; None if it does not prove one."""
    chunks = table.split(max(1, _AT_ONCE // len(table)), 1)
    near = torch.cat([_NEAR * _numbers(chunk).abs().amax(0) for chunk in chunks])
    if not bool(near.isfinite().all()):
        return None
    for width in _first_changes(table, near, LONGEST_ROW):
        told = [_told(chunk, width, bound) for chunk, bound in zip(chunks, near.split(chunks[0].shape[1]), strict=True)]
        by_column, by_line = (torch.cat(flags) for flags in zip(*told, strict=True))
        if not bool((by_column | by_line).all()):
            continue
        inner = (~by_line).nonzero()[:, 0]
        # In 16 bits, the first column of an axis may be too coarse to vary, so the last ones are asked, too.
        ends = (0, -1) if table.dtype in (torch.bfloat16, torch.float16) else (0,)
        return _with_frames(_numbers(table[::width]), near, by_line, _numbers(table[:width])[:, inner], inner, ends)
    return None


def _told(table: Tensor, width: int, near: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns depend on the place in a line of this width alone, and which on the line alone."""
    lines = _numbers(table).unflatten(0, (-1, width))
    by_column, by_line = (((lines - first).abs() <= near).all(1).all(0) for first in (lines[:1], lines[:, :1]))
    return by_column, by_line


def _numbers(table: Tensor) -> Tensor:
    return table if table.dtype == torch.float64 else table.float()


def _first_changes(table: Tensor, near: Tensor, most: int) -> list[int]:
    """Where columns first differ from their first number and a row may end, for it divides the length; ascending."""
    first = _numbers(table[: most + 1])
    changed = (first - first[:1]).abs() > near
    places = torch.where(changed.any(0), changed.int().argmax(0), 0).unique().tolist()
    return [place for place in places if place > 1 and len(table) % place == 0]


def _with_frames(
    lines: Tensor, near: Tensor, by_line: Tensor, columns: Tensor, numbers: Tensor, ends: tuple[int, ...]
) -> Grid | None:
    """The grid, from one token of each row of each frame ``[T * H, columns]`` and one row ``[W, some columns]``."""
    width = len(columns)
    varying = by_line & ((lines - lines[:1]).abs() > near).any(0)
    places = varying.nonzero()[:, 0]
    lines, near = lines[:, varying], near[varying]
    if not _counts(columns):
        return None
    if _counts(lines):  # one frame; or one row or column in each, which leaves columns that say nothing after the first
        shows_all = places[0] > 0 or len(places) + len(numbers) == len(by_line)
        return (1, len(lines), width) if places[0] < numbers[0] and shows_all else None
    for height in _first_changes(lines, near, len(lines)):
        by_row, by_frame = _told(lines, height, near)
        inside = lines.unflatten(0, (-1, height))
        if not bool((by_row ^ by_frame).all()) or not by_row.any() or not by_frame.any():
            continue
        in_order = all(bool(places[by_frame][end] < places[by_row][end] < numbers[end]) for end in ends)
        if in_order and _counts(inside[:, 0, by_frame]) and _counts(inside[0, :, by_row]):
            return len(inside), height, width
        return None
    return None


def _counts(axis: Tensor) -> bool:
    """Whether the numbers along an axis ``[size, columns]`` count up: each step is one in some slow, monotone column.

    Sines and cosines that are slow enough to change little are monotone in the right order, and in no other; fast ones
    may happen to be in a wrong order. So those that change least are asked, up to the first that goes up and down. The
    slowest of all must go up, or down if it is a cosine, which never gets far from 1.
    """
    size = axis.abs().amax(0)
    reach = axis.amax(0) - axis.amin(0)
    axis = axis[:, reach > 10 * _NEAR * size]
    steps = axis.diff(dim=0)
    near = _NEAR * axis.abs().amax(0)
    monotone = (steps >= -near).all(0) | (steps <= near).all(0)
    slow = (axis.amax(0) - axis.amin(0)).argsort()
    slow = slow[monotone[slow].int().cumprod(0).bool()]
    if not len(slow):
        return False
    rises, span = axis[-1, slow] > axis[0, slow], (axis[-1, slow] - axis[0, slow]).abs()
    least, most = axis[:, slow].aminmax(dim=0)
    cosine = (least > 0.25) & (2 * least > 1.001 * most) & (most <= 2)  # some are scaled a little
    slowest = rises[span <= 1.001 * span[0]]
    mixed = bool(cosine[0] | (slowest.any() & ~slowest.all()))  # a sine may come with its negative, then cosines tell
    in_order = cosine.any() & ~rises[cosine][:1].any() if mixed else rises[0]
    return bool(in_order & (steps[:, slow].abs() > near[slow]).any(1).all())


def rasters_of(places: Tensor) -> VideoLayout | None:
    """The layout of tokens whose frames, rows and columns are ``places`` ``[tokens, 3]``; None if no video is there."""
    if len(places) < 4 or not bool(places.isfinite().all()):
        return None
    step = places.diff(dim=0)
    same_line = (step[:, 0] == 0) & (step[:, 1] == 0) & (step[:, 2] > 0)
    line = torch.cat([same_line.new_zeros(1), ~same_line]).cumsum(0)
    frame = _joined(places, line, axis=1, fixed=(0, 2))
    # frames that follow each other at later times, with the same rows and columns, are one video
    video = _joined(places, frame, axis=0, fixed=(1, 2))
    begins = torch.cat([video.new_zeros(1), video.bincount()[:-1].cumsum(0)])
    lengths = (pieces.bincount()[pieces[begins]] for pieces in (video, frame, line))
    grids, text = list[Grid](), [0]
    for tokens, in_frame, width in torch.stack(list(lengths), 1).tolist():
        if 1 < width < in_frame:
            grids.append((tokens // in_frame, in_frame // width, width))
            text.append(0)
        else:
            text[-1] += tokens
    if not grids:
        return None
    layout = VideoLayout(as_grid(grids), tuple(text))
    pieces = [places[span.start : span.stop] for span in layout.spans]
    # the least and the largest frame, row and column of each video, [videos, 3]
    low, high = torch.stack([piece.amin(0) for piece in pieces]), torch.stack([piece.amax(0) for piece in pieces])
    broken = _is_one_video_in_pieces(layout, low, high) or _leaves_some_out(places, same_line, layout, low, high)
    return None if broken else layout


def _is_one_video_in_pieces(layout: VideoLayout, low: Tensor, high: Tensor) -> bool:
    """Whether rasters belong together: parts of the same frames, or frames in another order than that of time."""
    parts = (low[:, None, 0] <= high[None, :, 0]) & (low[:, None, 1:] != low[None, :, 1:]).any(-1)
    parts = parts & parts.T  # at the same time, from another row or column on
    follows = torch.tensor(layout.text[1:-1], device=low.device) == 0
    alike = ((low[1:] == low[:-1]) & (high[1:] == high[:-1]))[:, 1:].all(1)
    backwards = follows & alike & (low[1:, 0] <= high[:-1, 0])
    return bool(parts.any() | backwards.any())


def _leaves_some_out(places: Tensor, same_line: Tensor, layout: VideoLayout, low: Tensor, high: Tensor) -> bool:
    """Whether tokens in no raster belong to one: other rows or whole columns of the same frames, lines of frames in
    between, or whole frames in another order."""
    left = torch.ones_like(places[:, 0], dtype=torch.bool)
    for span in layout.spans:
        left[span.start : span.stop] = False
    in_line = torch.cat([same_line.new_zeros(1), same_line])[left]
    others = places[left]
    within = (others[:, None] >= low) & (others[:, None] <= high)  # [tokens, videos, 3]
    frames = ((others >= low.amin(0)) & (others <= high.amax(0)))[:, 1:].all(1) & ~within[..., 0].any(1)
    missed = [in_line & frames]
    _, counts = others[frames].unique(dim=0)[:, 0].unique(return_counts=True)
    smallest = min(height * width for _, height, width in (span.grid for span in layout.spans))
    for number, span in enumerate(layout.spans):
        _, height, width = span.grid
        rows = places[span.start : span.start + height * width : width, 1]
        of_rows = torch.isin(others[:, 1], rows)
        missed.append(within[:, number, 0] & within[:, number, 2] & ~of_rows)
        beside = within[:, number, 0] & of_rows & ~within[:, number, 2]
        missed.append(beside & (len(others[beside, 1].unique()) == height))
    return bool(torch.stack(missed).any() | (counts >= smallest).any())


def _joined(places: Tensor, piece: Tensor, axis: int, fixed: tuple[int, int]) -> Tensor:
    """Numbers of the pieces ``[tokens]``, joined with the one before if alike but for one coordinate that is larger."""
    counts = piece.bincount()
    before = (torch.arange(len(piece), device=piece.device) - counts[piece]).clamp(min=0)
    alike = (places[:, fixed] == places[before][:, fixed]).all(1) & (places[:, axis] > places[before, axis])
    unlike = torch.zeros_like(counts).index_add_(0, piece, (~alike).to(counts.dtype))
    joins = (unlike[1:] == 0) & (counts[1:] == counts[:-1]) & (counts[1:] > 1)
    return torch.cat([joins.new_zeros(1), ~joins]).cumsum(0)[piece]
