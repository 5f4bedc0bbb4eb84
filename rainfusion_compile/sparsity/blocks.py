# SPDX-License-Identifier: Apache-2.0
"""The blocks of one layout: which places each stands in, what is always kept, and how dense a block mask is."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.token_order import token_order

Radius = TypeVar("Radius")


class Blocks:
    """``nQ`` query blocks and ``nB`` key blocks of consecutive positions of ``order``, the token order.

    Attributes:
        video, frame, row, column: int64 ``[tokens]`` by position, -1 for text.
        full_rows, full_columns: bool ``[nQ]``, ``[nB]``: blocks that see everything, that everything sees (with text,
            the first frame or several videos in them).
        video_q, video_k: the video of each other block.
        always: bool ``[nQ, nB]``, what every pattern keeps.
    """

    def __init__(self, layout: VideoLayout, block_q: int, block_k: int) -> None:
        self.layout, self.block_q, self.block_k = layout, block_q, block_k
        self.n_q, self.n_b = (math.ceil(layout.tokens / size) for size in (block_q, block_k))
        self.order = token_order(layout, run=math.isqrt(block_q * block_k))
        video, t, h, w = layout.coordinates()
        self.video, self.frame, self.row, self.column = (place[self.order] for place in (video, t, h, w))
        self.is_video = self.video >= 0
        always = ~self.is_video | layout.first_frames()[self.order]
        self.full_rows, self.full_columns = self._full(always, block_q, self.n_q), self._full(always, block_k, self.n_b)
        self.video_q, self.video_k = self.video[::block_q], self.video[::block_k]
        other = self.video_q[:, None] != self.video_k[None, :]
        self.always = other | self.full_rows[:, None] | self.full_columns[None, :]
        self._weights = [(torch.arange(layout.tokens) // size).bincount().double() for size in (block_q, block_k)]

    def occupancy(self, cell: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """Which cells (frames, or places in the frame) the video tokens of each block stand in.

        Args:
            cell: int64 ``[tokens]`` by position, numbered in each video.
            sizes: how many cells each video has.

        Returns:
            float 0/1 ``[nQ, cells]`` and ``[nB, cells]``, over the cells of all videos.
        """
        starts = torch.tensor([0, *sizes]).cumsum(0)
        position = self.is_video.nonzero().flatten()
        cell = (cell + starts[self.video])[position]
        hits = []
        for block, count in ((self.block_q, self.n_q), (self.block_k, self.n_b)):
            hits.append(torch.zeros(count, int(starts[-1]), dtype=torch.float32))
            hits[-1][position // block, cell] = 1.0
        return hits[0], hits[1]

    def with_gathered(self, mask: Tensor, gathered: Tensor | None) -> Tensor:
        """Put gathered blocks before those of `order`, for the rows of their video that do not see everything."""
        if gathered is None:
            return mask
        seen = ~self.full_rows[:, None] & (self.video_q[:, None] == self.video[gathered[:: self.block_k]][None, :])
        return torch.cat([seen, mask], dim=1)

    def density(self, mask: Tensor) -> float:
        """Kept token pairs over all, of a block mask ``[nQ, any + nB]``."""
        weight_q, weight_k = self._weights
        whole = torch.full((mask.shape[1] - self.n_b,), float(self.block_k), dtype=torch.float64)
        return float(weight_q @ mask.double() @ torch.cat([whole, weight_k])) / self.layout.tokens**2

    def _full(self, always: Tensor, block: int, count: int) -> Tensor:
        """Which blocks hold one of these tokens, or reach from one video into the next."""
        full = torch.zeros(count, dtype=torch.bool)
        full[always.nonzero().flatten() // block] = True
        first = torch.arange(count) * block
        last = (first + block).clamp_max(self.layout.tokens) - 1
        return full | (self.video[first] != self.video[last])


def nearest(radii: Sequence[Radius], density_of: Callable[[Radius], float], target: float) -> Radius:
    """The radius whose density is nearest to the target; densities grow along ``radii``, so bisect."""
    density = functools.cache(density_of)
    step = bisect.bisect_left(
        radii, target, hi=len(radii) - 1, key=density
    )  # the nearest is this one or the one before
    return min(radii[max(step - 1, 0)], radii[step], key=lambda radius: abs(density(radius) - target))


def dilate(cells: Tensor, radius: tuple[int, int]) -> Tensor:
    """Cells of ``[n, height, width]`` within ``radius`` of an occupied one, as float 0/1: sums over boxes by cumsum."""
    for dim, reach in ((1, radius[0]), (2, radius[1])):
        size = cells.shape[dim]
        total = torch.nn.functional.pad(cells.cumsum(dim), (0, 0, 1, 0) if dim == 1 else (1, 0))
        place = torch.arange(size)
        upper, lower = (place + reach + 1).clamp_max(size), (place - reach).clamp_min(0)
        cells = total.index_select(dim, upper) - total.index_select(dim, lower)
    return (cells > 0.5).float()


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Different rows of a 0/1 matrix ``[n, m]`` and, for each row, which of them it is: int64 ``[n]``.

    Rows are told apart by random sums of 40-bit integers, exact in float64 up to 8192 terms; much faster than sorting.
    """
    weights = torch.randint(1 << 40, (rows.shape[1], 2), generator=torch.Generator().manual_seed(0))
    sums = rows.double() @ weights.double()
    _, first = torch.unique(sums, dim=0, return_inverse=True)
    chosen = torch.zeros(int(first.max()) + 1, dtype=torch.int64)
    chosen[first] = torch.arange(len(rows))
    distinct = rows[chosen]
    if not torch.equal(distinct[first], rows):  # a collision or an inexact sum: as good as impossible, still checked
        return rows, torch.arange(len(rows))
    return distinct, first
