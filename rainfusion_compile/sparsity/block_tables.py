# SPDX-License-Identifier: Apache-2.0
"""Block tables: which key blocks each query block reads, for every pattern, for one grid.

They depend on grid, text position and options only, so they are built once, on the CPU, from block occupancies: no
tensor of ``tokens * tokens`` elements is ever made. A block pair is kept when any of its token pairs is, so the block
mask covers the token pattern, and every density here is the realised one: kept token pairs over all token pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rainfusion_compile.sparsity.layout import VideoLayout, token_order
from rainfusion_compile.sparsity.patterns import PatternName, Radii

BLOCK_Q = 128
BLOCK_K = 64
LONG = 1 << 15  # tokens from which on the ARM can afford twice the sample
MAX_CLASSES = 16
_GOLDEN = 0.6180339887498949

Radius = TypeVar("Radius")


class AttentionTables(NamedTuple):
    """What ``torch.ops.rainfusion.block_sparse_attention`` takes between key mask and scale: see `BlockTables`."""

    order: Tensor
    key_order: Tensor
    rows: Tensor
    row_ptr: Tensor
    indices: Tensor
    block_q: int
    block_k: int


class ProbeTables(NamedTuple):
    """What ``torch.ops.rainfusion.arm_probe`` takes between key mask and scale: see `BlockTables`; P patterns."""

    order: Tensor
    samples: Tensor
    sample_keep: Tensor
    key_weight: Tensor
    key_pattern: int
    patterns: int
    block_k: int


@dataclass(frozen=True, eq=False)
class BlockTables:
    """What the operators need to know of one grid. P patterns, sparsest first; pattern number P is dense attention.

    Query blocks are ``block_q`` positions of ``order``, one after the other. Key blocks are ``block_k`` entries of
    ``key_order`` each: whole blocks that gather the textural pattern's keys (a checkerboard is scattered over all other
    blocks, so it gets compact ones of its own), then those of ``order`` again, then *runs*: all tokens as they lie in
    memory. Rows that keep whole frames (spatial) or everything read runs, where nothing needs gathering; all others
    read none. A row names a token at most once.

    Attributes:
        layout: grid and text.
        patterns: names, by ascending realised density. Without "spatial" for a single frame, of which it keeps all.
        densities: realised density of each, in (0, 1].
        radii: the reach that `sparsity` came to.
        block_q, block_k: tokens in a query block and in a key block.
        order: int32 ``[tokens]``, ``order[position] = token``.
        key_order: int32 ``[nK * block_k]``. The part of ``order`` and the runs are both filled up to whole blocks with
            their last token, which does not count there. The runs are the last ``ceil(tokens / block_k)`` blocks.
        rows: int32 ``[P + 1, nQ]``, the row of each pattern and query block. Equal rows are stored once.
        row_ptr: int32 ``[R + 1]``, row ``r`` keeps the key blocks ``indices[row_ptr[r]:row_ptr[r + 1]]``.
        indices: int32 ``[nnz]``, key block numbers, ascending in each row.
        samples: int32 ``[n]``, the tokens whose attention the ARM probe looks at.
        sample_keep: uint8 ``[n, ceil(tokens / block_k)]``, over the blocks of ``order``: bit p set where pattern p
            keeps the whole block for that sample.
        key_weight: float32 ``[tokens]`` by position, 1 where pattern ``key_pattern`` keeps the key for every query,
            else 0.
    """

    layout: VideoLayout
    patterns: tuple[PatternName, ...]
    densities: tuple[float, ...]
    radii: Radii
    block_q: int
    block_k: int
    order: Tensor
    key_order: Tensor
    rows: Tensor
    row_ptr: Tensor
    indices: Tensor
    samples: Tensor
    sample_keep: Tensor
    key_weight: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("order", "key_order", "rows", "row_ptr", "indices", "samples", "sample_keep", "key_weight")
        return {name: getattr(self, name) for name in names}

    @property
    def key_pattern(self) -> int:
        """The number of the pattern that keeps single keys besides whole blocks (textural), or -1."""
        return self.patterns.index("textural") if "textural" in self.patterns else -1

    @property
    def probe_arguments(self) -> ProbeTables:
        sampled = (self.order, self.samples, self.sample_keep, self.key_weight)
        return ProbeTables(*sampled, self.key_pattern, len(self.patterns), self.block_k)

    @property
    def attention_arguments(self) -> AttentionTables:
        kept = (self.order, self.key_order, self.rows, self.row_ptr, self.indices)
        return AttentionTables(*kept, self.block_q, self.block_k)

    @functools.cached_property
    def key_blocks(self) -> tuple[Tensor, ...]:
        """The tokens of every key block, int64, by its number."""
        return key_blocks(self.key_order, self.layout.tokens, self.block_k)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device) -> BlockTables:
        """The same tables on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, **moved)

    def block_mask(self, pattern: int) -> Tensor:
        """Block mask of pattern number ``pattern`` (P: dense), bool ``[nQ, nK]``; for reports and tests."""
        blocks = len(self.key_order) // self.block_k
        lengths = self.row_ptr.diff().long()
        rows = torch.zeros(len(lengths), blocks, dtype=torch.bool, device=self.rows.device)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=self.rows.device), lengths)
        rows[owner, self.indices.long()] = True
        return rows[self.rows[pattern].long()]


def key_blocks(key_order: Tensor, tokens: int, block_k: int) -> tuple[Tensor, ...]:
    """The tokens of every key block, int64, by its number: see :class:`BlockTables`."""
    filling = -tokens % block_k
    listed, runs = key_order.long().split([len(key_order) - tokens - filling, tokens + filling])
    parts = (part[: len(part) - filling] for part in (listed, runs) if len(part))
    return tuple(block for part in parts for block in part.split(block_k))


@functools.lru_cache(maxsize=64)
def block_tables(
    layout: VideoLayout,
    *,
    sparsity: float,
    patterns: tuple[PatternName, ...],
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    device: torch.device | None = None,
) -> BlockTables:
    """Tables of ``patterns`` whose realised densities come as near to ``1 - sparsity`` as the grid lets them.

    Cached by value: equal arguments give the same tables, different grids never share any. Vectorised; well
    under a second for 118,800 tokens on two CPU cores.

    Args:
        layout: grid and text.
        sparsity: wanted share of dropped token pairs, in [0, 1).
        patterns: which patterns, at least one.
        block_q, block_k: tokens in a query block and in a key block.
        device: where the tables are wanted (default: CPU).
    """
    if device is not None and device.type != "cpu":
        on_cpu = block_tables(layout, sparsity=sparsity, patterns=patterns, block_q=block_q, block_k=block_k)
        return on_cpu.to(device)
    with torch.device("cpu"):  # whatever the process's default device is
        return _Builder(layout, 1.0 - sparsity, patterns, block_q, block_k).build()


class _Builder:
    """Block masks here are bool ``[nQ, extra + nB]``: the textural blocks, then the nB blocks of `order`."""

    def __init__(
        self, layout: VideoLayout, target: float, patterns: tuple[PatternName, ...], block_q: int, block_k: int
    ) -> None:
        if all(frames == 1 for frames, _, _ in layout.grids):  # every key is in the query's frame
            patterns = tuple(name for name in patterns if name != "spatial") or patterns
        self.layout, self.target, self.patterns = layout, target, patterns
        self.block_q, self.block_k = block_q, block_k
        self.n_q, self.n_b = (math.ceil(layout.tokens / size) for size in (block_q, block_k))
        self.weight_q, self.weight_k = (_block_sizes(layout.tokens, size) for size in (block_q, block_k))

        self.order = token_order(layout, run=math.isqrt(block_q * block_k))
        video, t, h, w = layout.coordinates()
        self.video, self.frame, self.row, self.column = (place[self.order] for place in (video, t, h, w))
        self.is_video = self.video >= 0
        always = ~self.is_video | layout.first_frames()[self.order]
        self.full_rows = self._any_in_block(always, block_q, self.n_q) | self._of_several(block_q, self.n_q)
        self.full_columns = self._any_in_block(always, block_k, self.n_b) | self._of_several(block_k, self.n_b)
        self.video_q, self.video_k = self.video[::block_q], self.video[::block_k]  # where blocks are not full
        other = self.video_q[:, None] != self.video_k[None, :]
        self.always = other | self.full_rows[:, None] | self.full_columns[None, :]

    def build(self) -> BlockTables:
        frames, window, classes = self._frame_radius(), self._window_radius(), self._class_count()
        textural, extra = self._textural(classes)
        blocks = {"spatial": self._spatial(frames), "temporal": self._temporal(window), "textural": textural}
        masks = {name: self._with_extra(blocks[name], extra if name == "textural" else None) for name in self.patterns}
        width = max(mask.shape[1] for mask in masks.values())
        masks = {name: _widen(mask, width) for name, mask in masks.items()}
        names = sorted(self.patterns, key=lambda name: self._density(masks[name]))
        listed = [self._as_runs(masks[name]) if name == "spatial" else self._before_runs(masks[name]) for name in names]
        dense = self._as_runs(_widen(torch.ones_like(self.always), width))
        rows, row_ptr, indices = _compress(torch.stack([*listed, dense]))
        if "textural" not in self.patterns:
            extra = extra[:0]
        in_memory = torch.arange(self.layout.tokens)
        positions = self._sample_positions()
        sample_keep = torch.zeros(len(positions), self.n_b, dtype=torch.uint8)
        key_weight = torch.zeros(self.layout.tokens, dtype=torch.float32)
        key_weight[extra] = 1.0
        for number, name in enumerate(names):
            sample_keep |= blocks[name][positions // self.block_q].to(torch.uint8) << number
        return BlockTables(
            layout=self.layout,
            patterns=tuple(names),
            densities=tuple(self._density(masks[name]) for name in names),
            radii=Radii(frames, window, classes),
            block_q=self.block_q,
            block_k=self.block_k,
            order=self.order.int(),
            key_order=torch.cat([self.order[extra], self._filled_up(self.order), self._filled_up(in_memory)]).int(),
            rows=rows.int(),
            row_ptr=row_ptr.int(),
            indices=indices.int(),
            samples=self.order[positions].int(),
            sample_keep=sample_keep,
            key_weight=key_weight,
        )

    def _any_in_block(self, flag: Tensor, block: int, count: int) -> Tensor:
        hit = torch.zeros(count, dtype=torch.bool)
        hit[flag.nonzero().flatten() // block] = True
        return hit

    def _of_several(self, block: int, count: int) -> Tensor:
        """Which blocks reach from one video into the next."""
        first = torch.arange(count) * block
        last = (first + block).clamp_max(self.layout.tokens) - 1
        return self.video[first] != self.video[last]

    def _occupancy(self, cell: Tensor, cells: int, block: int, count: int) -> Tensor:
        """Which cells (frames, or places in the frame) the video tokens of each block stand in: float 0/1."""
        hit = torch.zeros(count, cells, dtype=torch.float32)
        position = self.is_video.nonzero().flatten()
        hit[position // block, cell[position]] = 1.0
        return hit

    # The patterns, over the blocks of `order` --------------------------------------------------------------------

    def _spatial(self, radius: int) -> Tensor:
        # Frames of all videos in one row: beyond the end of a video are those of others, which are kept anyway.
        query, key = self._frame_occupancy
        reach = _box_dilate(query[:, :, None], (radius, 0))[:, :, 0]
        return (reach @ key.T > 0) | self.always

    def _temporal(self, radius: tuple[int, int]) -> Tensor:
        (query, which_query), (key, which_key) = self._place_occupancy
        sizes = [(height, width) for _, height, width in self.layout.grids]
        places = query.split([height * width for height, width in sizes], dim=1)
        reach = [_box_dilate(p.view(-1, *size), radius).flatten(1) for p, size in zip(places, sizes, strict=True)]
        return (torch.cat(reach, 1) @ key.T > 0)[which_query][:, which_key] | self.always

    def _textural(self, classes: int) -> tuple[Tensor, Tensor]:
        """Block mask over `order`, and the positions to gather into extra blocks for the checkerboard's other keys.

        Each video has its own extra blocks, filled up with other keys spread over it.
        """
        free = ~self.full_columns[torch.arange(self.layout.tokens) // self.block_k]
        checks = (self.frame + self.row + self.column) % classes == 0
        mask, extra = self.always, []
        for video in range(len(self.layout.grids)):
            own = free & (self.video == video)
            wanted, rest = own & checks, (own & ~checks).nonzero().flatten()
            missing = -int(wanted.sum()) % self.block_k
            if len(rest) <= missing:  # everything is kept, or as good as
                mask = mask | ((self.video_q == video)[:, None] & (self.video_k == video)[None, :])
                continue
            wanted[rest[torch.arange(missing) * len(rest) // max(missing, 1)]] = True
            extra.append(wanted.nonzero().flatten())
        return mask, torch.cat([torch.empty(0, dtype=torch.int64), *extra])

    def _with_extra(self, mask: Tensor, extra: Tensor | None) -> Tensor:
        """Put the extra blocks before those of `order`, for the rows of their video that do not see everything."""
        if extra is None:
            return mask
        seen = ~self.full_rows[:, None] & (self.video_q[:, None] == self.video[extra[:: self.block_k]][None, :])
        return torch.cat([seen, mask], dim=1)

    def _filled_up(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens, tokens[-1:].expand(-len(tokens) % self.block_k)])

    def _before_runs(self, mask: Tensor) -> Tensor:
        """The same, before runs; rows that keep everything read these."""
        everything = mask[:, -self.n_b :].all(1, keepdim=True)
        return torch.where(everything, self._as_runs(mask), torch.nn.functional.pad(mask, (0, self.n_b)))

    def _as_runs(self, mask: Tensor) -> Tensor:
        """The same, read as it lies in memory: `order` keeps frames and text in place, so it is the same frames."""
        blocks = mask[:, -self.n_b :]
        return torch.cat([torch.zeros_like(mask), blocks], dim=1)

    @functools.cached_property
    def _frame_occupancy(self) -> tuple[Tensor, Tensor]:
        cell, cells = self._numbered(self.frame, [frames for frames, _, _ in self.layout.grids])
        return (
            self._occupancy(cell, cells, self.block_q, self.n_q),
            self._occupancy(cell, cells, self.block_k, self.n_b),
        )

    @functools.cached_property
    def _place_occupancy(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Distinct occupancies (blocks of many frames stand in the same places), and which one each block has."""
        widths = torch.tensor([width for _, _, width in self.layout.grids])
        sizes = [height * width for _, height, width in self.layout.grids]
        cell, cells = self._numbered(self.row * widths[self.video] + self.column, sizes)
        return (
            _distinct_rows(self._occupancy(cell, cells, self.block_q, self.n_q)),
            _distinct_rows(self._occupancy(cell, cells, self.block_k, self.n_b)),
        )

    def _numbered(self, cell: Tensor, sizes: list[int]) -> tuple[Tensor, int]:
        """Cells that are numbered in each video, of these sizes, numbered over all videos; and how many these are."""
        starts = torch.tensor([0, *sizes]).cumsum(0)
        return cell + starts[self.video], int(starts[-1])

    # How far they reach ----------------------------------------------------------------------------------------

    def _density(self, mask: Tensor) -> float:
        extra = mask.shape[1] - self.n_b  # whole blocks
        weight_k = torch.cat([torch.full((extra,), float(self.block_k), dtype=torch.float64), self.weight_k])
        kept = self.weight_q @ mask.double() @ weight_k
        return float(kept) / self.layout.tokens**2

    def _frame_radius(self) -> int:
        frames = max(frames for frames, _, _ in self.layout.grids)
        return self._nearest(range(frames), self._spatial) if "spatial" in self.patterns else frames - 1

    def _window_radius(self) -> tuple[int, int]:
        height, width = (max(sizes) for sizes in list(zip(*self.layout.grids, strict=True))[1:])
        if "temporal" not in self.patterns:
            return height - 1, width - 1
        density = functools.cache(lambda radius: self._density(self._temporal(radius)))
        steps = range(2 * max(height, width))
        square = sorted({(min(i // 2, height - 1), min((i + 1) // 2, width - 1)) for i in steps})
        nearest = self._nearest(square, self._temporal)
        # Blocks are coarse: one more row can double the density. Lengthening one side alone fills the gap.
        below = square.index(nearest) - (density(nearest) > self.target)
        h, w = square[max(below, 0)]
        wide = self._nearest([(h, i) for i in range(w, width)], self._temporal)
        tall = self._nearest([(i, w) for i in range(h, height)], self._temporal)
        return min((nearest, wide, tall), key=lambda radius: abs(density(radius) - self.target))

    def _nearest(self, radii: Sequence[Radius], mask_of: Callable[[Radius], Tensor]) -> Radius:
        """The radius whose density is nearest to the target; densities grow along ``radii``, so bisect."""
        density = functools.cache(lambda step: self._density(mask_of(radii[step])))
        low, high = 0, len(radii) - 1  # the answer is in [low - 1, high]
        while low < high:
            middle = (low + high) // 2
            if density(middle) >= self.target:
                high = middle
            else:
                low = middle + 1
        return radii[min((max(low - 1, 0), low), key=lambda step: abs(density(step) - self.target))]

    def _class_count(self) -> int:
        misses: dict[int, float] = {}
        for classes in range(1, MAX_CLASSES + 1) if "textural" in self.patterns else ():
            mask = self._with_extra(*self._textural(classes))
            density = self._density(mask)
            misses[classes] = abs(density - self.target)
            if density <= self.target:
                break  # more classes only drop more
        return min(misses, key=misses.__getitem__, default=1)

    def _sample_positions(self) -> Tensor:
        """Positions of the ARM's sample: one in each of n equal strata of the queries that do not see everything.

        A golden-ratio jitter inside the strata spreads them over places even where strata and frames are in step.
        """
        candidates = (~self.always.all(1))[torch.arange(self.layout.tokens) // self.block_q] & self.is_video
        positions = candidates.nonzero().flatten()
        if len(positions) == 0:  # every block sees everything; any query tells that
            positions = self.is_video.nonzero().flatten()
        count = min(128 if self.layout.tokens >= LONG else 64, len(positions))
        edges = torch.arange(count + 1) * len(positions) // count
        jitter = (torch.arange(count, dtype=torch.float32) * _GOLDEN).frac()
        return positions[edges[:-1] + (jitter * edges.diff()).long()]


def _widen(mask: Tensor, width: int) -> Tensor:
    """Put unread blocks before those of a mask, up to ``width`` of them."""
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))


def _block_sizes(tokens: int, block: int) -> Tensor:
    """Tokens in each block, float64."""
    starts = torch.arange(0, tokens, block)
    return (starts + block).clamp_max(tokens).sub(starts).double()


def _box_dilate(cells: Tensor, radius: tuple[int, int]) -> Tensor:
    """Cells of ``[n, height, width]`` within ``radius`` of an occupied one, as float 0/1: sums over boxes by cumsum."""
    for dim, reach in ((1, radius[0]), (2, radius[1])):
        size = cells.shape[dim]
        total = torch.nn.functional.pad(cells.cumsum(dim), (0, 0, 1, 0) if dim == 1 else (1, 0))
        place = torch.arange(size)
        upper, lower = (place + reach + 1).clamp_max(size), (place - reach).clamp_min(0)
        cells = total.index_select(dim, upper) - total.index_select(dim, lower)
    return (cells > 0.5).float()


def _distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
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


def _compress(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of bool ``[P, nQ, nK]`` masks, each different one stored once: ``(rows [P, nQ], row_ptr, indices)``."""
    distinct, which = _distinct_rows(masks.flatten(0, 1))
    row, index = distinct.nonzero(as_tuple=True)
    row_ptr = torch.zeros(len(distinct) + 1, dtype=torch.int64)
    row_ptr[1:] = torch.bincount(row, minlength=len(distinct)).cumsum(0)
    return which.view(masks.shape[:2]), row_ptr, index
