# SPDX-License-Identifier: Apache-2.0
"""The blocks of one layout (which places each stands in, what is always kept), and what a pattern over them is."""

from __future__ import annotations

import bisect
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

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
            the first frame or several videos in them, and the last key block if it is not full).
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
        self.full_rows, self.full_columns = self._full(always, block_q), self._full(always, block_k)
        if layout.tokens % block_k:
            self.full_columns[-1] = True  # all others are whole blocks
        self.video_q, self.video_k = self.video[::block_q], self.video[::block_k]
        other = self.video_q[:, None] != self.video_k[None, :]
        self.always = other | self.full_rows[:, None] | self.full_columns[None, :]
        self._weights = [(torch.arange(layout.tokens) // size).bincount().double() for size in (block_q, block_k)]

    def occupancy(self, cell: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """Which cells (frames, or places in the frame) the video tokens of each block stand in.

        ``cell``, int64 ``[tokens]`` by position, is numbered in each video; ``sizes``: how many each has. Returns float
        0/1 ``[nQ, cells]`` and ``[nB, cells]``, over the cells of all videos.
        """
        starts = torch.tensor([0, *sizes]).cumsum(0)
        position = self.is_video.nonzero().flatten()
        cell = (cell + starts[self.video])[position]
        hits = []
        for block, count in ((self.block_q, self.n_q), (self.block_k, self.n_b)):
            hits.append(torch.zeros(count, int(starts[-1]), dtype=torch.float32))
            hits[-1][position // block, cell] = 1.0
        return hits[0], hits[1]

    def density(self, mask: Tensor, sampled: Tensor | None = None) -> float:
        """Kept token pairs over all, of a block mask ``[nQ, nB]``; ``sampled``, ``[nQ]``: so many whole blocks more."""
        weight_q, weight_k = self._weights
        kept = (mask.float() @ weight_k.float()).double()  # whole numbers that float32 holds
        kept = kept if sampled is None else kept + sampled.double() * self.block_k
        return float(weight_q @ kept) / self.layout.tokens**2

    def _full(self, always: Tensor, block: int) -> Tensor:
        """Which blocks hold one of these tokens, or reach from one video into the next."""
        first = torch.arange(0, self.layout.tokens, block)
        full = torch.zeros(len(first), dtype=torch.bool).index_fill(0, always.nonzero().flatten() // block, True)
        last = (first + block).clamp_max(self.layout.tokens) - 1
        return full | (self.video[first] != self.video[last])


class Pattern(ABC):
    """A pattern over the blocks of one layout: the window of keys that each query reads one by one.

    Attributes:
        name: as in options and reports.
        needs_frames: keeps everything in a video of one frame, so it is no choice there.
        reads_runs: keeps whole frames, so rows that are windows alone read keys as they lie in memory.
        samples_only: has no window: see `WithoutWindow`.
        selects: heads select key blocks while the model runs.
    """

    name: ClassVar[str]
    needs_frames: ClassVar[bool] = False
    reads_runs: ClassVar[bool] = False
    samples_only: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._densities: dict[Any, float] = {}

    @staticmethod
    @abstractmethod
    def keeps(query: Tensor, key: Tensor, radius: Any) -> Tensor:
        """Whether the window of this radius has each pair of video tokens, bool ``[...]``: coordinates (frame, row,
        column) ``query`` and ``key``, int64 ``[..., 3]``, are broadcast against each other.
        """

    @abstractmethod
    def radius(self, target: float, *, fine: bool = True) -> Any:
        """The radius at which the realised density of the windows comes nearest to ``target``, or near, if not fine."""

    @abstractmethod
    def cover(self, radius: Any) -> Tensor:
        """The blocks of `order` that hold all pairs of the windows, and what is always kept: bool ``[nQ, nB]``."""

    def block_order(self) -> Tensor:
        """Numbers to sort the key blocks by, int64 ``[nB]``, so that those of a window come one after the other."""
        return torch.arange(self.blocks.n_b)

    def density(self, radius: Any) -> float:
        """Realised density of the windows."""
        if radius not in self._densities:
            self._densities[radius] = self.blocks.density(self.cover(radius))
        return self._densities[radius]


class WithoutWindow(Pattern):
    """A pattern whose keys no distance tells: beside what is always kept, it lists nothing."""

    samples_only = True

    @staticmethod
    def keeps(query: Tensor, key: Tensor, radius: None) -> Tensor:
        return torch.zeros_like(query[..., 0] - key[..., 0], dtype=torch.bool)

    def radius(self, target: float, *, fine: bool = True) -> None:
        return None

    def cover(self, radius: None) -> Tensor:
        return self.blocks.always


def nearest(radii: Sequence[Radius], density_of: Callable[[Radius], float], target: float) -> Radius:
    """The radius whose density is nearest to the target; densities grow along ``radii``, so bisect."""
    density = functools.cache(density_of)
    step = bisect.bisect_left(radii, target, hi=len(radii) - 1, key=density)  # nearest: this one or the one before
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
    """Different rows of a 0/1 matrix ``[n, m]`` and, for each row, which of them it is: int64 ``[n]``."""
    # Told apart by random sums of 40-bit integers, exact in float64 up to 8192 terms; much faster than sorting.
    weights = torch.randint(1 << 40, (rows.shape[1], 2), generator=torch.Generator().manual_seed(0))
    sums = torch.cat([some.double() @ weights.double() for some in rows.split(512)])
    _, first = torch.unique(sums, dim=0, return_inverse=True)
    chosen = torch.zeros(int(first.max()) + 1, dtype=torch.int64)
    chosen[first] = torch.arange(len(rows))
    distinct = rows[chosen]
    if not torch.equal(distinct[first], rows):  # a collision or an inexact sum: as good as impossible, still checked
        return rows, torch.arange(len(rows))
    return distinct, first
