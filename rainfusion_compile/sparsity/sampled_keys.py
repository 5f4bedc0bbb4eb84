# SPDX-License-Identifier: Apache-2.0
"""Keys outside a window are not left out: a sample of them is read, and each counts for as many as it stands for.

What is dropped altogether biases the output, the same way at every denoising step; an even sample does not, and if
another one is drawn in every call, its errors average out over the steps. The rest of a row is cut into strata of
consecutive key blocks, and of each run of n keys in a stratum one is read. Which one is the *phase*: for each phase
there is a key block with the keys that it takes, so that drawing a phase only moves the number of the block.

With weights p of attention, values v and output o, the squared error of a row is expected to be

    (n - 1) * sum over the keys of the rest of p^2 |v - o|^2

(Horvitz and Thompson's estimator of a ratio under sampling, to first order), which needs no sample to be known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rainfusion_compile.sparsity.blocks import Blocks
from rainfusion_compile.sparsity.selected_blocks import Selection, granules

STRIDES = (2, 3, 4, 5, 6, 8, 10, 12, 16)


class SampledRows(NamedTuple):
    """Rows of one candidate over the blocks of `order` and the blocks of its samples.

    Attributes:
        mask: bool ``[nQ, nB]``: the blocks of `order` that are read.
        strata: bool ``[nQ, G]``: the strata that are sampled.
        keys: int64 positions ``[G * phases * block_k]``: of each stratum, a key block for each phase. The strata of all
            videos have as many phases.
        phases: how many, 0 without strata.
        weight: float64 ``[nQ]``: how many keys each sampled one stands for, 1 where none is.
        selected: how many blocks a query block of a head selects, in rows that do not see everything; ``keys`` are then
            granules of all blocks, and there are no strata.
    """

    mask: Tensor
    strata: Tensor
    keys: Tensor
    phases: int
    weight: Tensor
    selected: int = 0

    @property
    def beside(self) -> Tensor:
        """How many blocks each row reads beside those of its mask, int64 ``[nQ]``."""
        if not self.selected:
            return self.strata.sum(1)
        free = (~self.mask).sum(1)
        return torch.where(free > 0, self.selected + (free - self.selected) // self.phases, 0)


def without_samples(mask: Tensor) -> SampledRows:
    """Rows that read a mask's blocks alone."""
    nothing = torch.empty(len(mask), 0, dtype=torch.bool), torch.empty(0, dtype=torch.int64)
    return SampledRows(mask, *nothing, 0, torch.ones(len(mask), dtype=torch.float64))


def with_samples(blocks: Blocks, window: Tensor, block_order: Tensor, stride: int) -> SampledRows:
    """Read ``window``, bool ``[nQ, nB]``, filled up to whole strata, and sample the others, one of ``stride`` keys.

    ``block_order``, int64 ``[nB]``: by what to sort the key blocks before strata are cut.
    """
    members, sizes = _strata(blocks, block_order, stride)
    if not len(sizes):
        return without_samples(window)
    member = torch.zeros(len(sizes), blocks.n_b, dtype=torch.float32)
    member[torch.arange(len(sizes)).repeat_interleave(sizes), members] = 1.0
    touched = window.float() @ member.T > 0
    own_video = blocks.video_q[:, None] == blocks.video_k[members[sizes.cumsum(0) - 1]][None, :]
    strata = ~touched & own_video & ~blocks.full_rows[:, None]
    phases = int(sizes.min())
    keys = _phases(members, sizes, blocks.block_k, phases)
    count = strata.sum(1)
    weight = torch.where(count > 0, (strata.double() @ sizes.double()) / count.clamp_min(1), 1.0)
    return SampledRows(window | (touched.float() @ member > 0), strata, keys, phases, weight)


def with_selection(blocks: Blocks, selection: Selection) -> SampledRows:
    """Read what everybody reads and what heads select, and sample all other blocks."""
    weight = torch.where(blocks.full_rows, 1.0, float(selection.stride)).double()
    strata = torch.empty(blocks.n_q, 0, dtype=torch.bool)
    return SampledRows(
        blocks.always, strata, granules(blocks, selection.stride), selection.stride, weight, selection.selected
    )


def sampled_densities(blocks: Blocks, window: Tensor, block_order: Tensor) -> dict[int, float]:
    """The realised density of :func:`with_samples` by stride, without making any."""
    free, _ = _strata(blocks, block_order, 1)
    touched = pad(window[:, free].int().cumsum(1), (1, 0))
    found = {1: blocks.density(torch.ones_like(window))}
    for stride in STRIDES:
        _, sizes = _strata(blocks, block_order, stride)
        ends = sizes.cumsum(0)
        whole = touched[:, ends] > touched[:, ends - sizes]
        read = torch.where(whole, sizes, 1).sum(1)
        found[stride] = blocks.density(blocks.full_columns.expand_as(window), read)
    return found


def _strata(blocks: Blocks, block_order: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """The blocks that not everybody reads, stratum by stratum, and how many each has: ``stride`` or a few more."""
    free = (~blocks.full_columns).nonzero().flatten()
    free = free[block_order[free].argsort(stable=True)]
    members, sizes = [free[:0]], [free[:0]]
    for video in range(len(blocks.layout.grids)):
        own = free[blocks.video_k[free] == video]
        count = max(len(own) // stride, 1)
        members.append(own)
        if len(own):
            sizes.append(len(own) // count + (torch.arange(count) < len(own) % count).long())
    return torch.cat(members), torch.cat(sizes)


def _phases(members: Tensor, sizes: Tensor, block_k: int, phases: int) -> Tensor:
    """Positions of the strata's keys: for each phase one of every run of as many keys as a stratum has blocks.

    The first is random, the next phase takes the next of the run. ``members``: the blocks of all strata of these sizes.
    """
    size = sizes[:, None, None]
    generator = torch.Generator().manual_seed(0)
    first = (torch.rand(len(sizes), 1, block_k, generator=generator, dtype=torch.float32) * size).long()
    taken = torch.arange(block_k) * size + (first + torch.arange(phases)[:, None]) % size
    block = members[(sizes.cumsum(0) - sizes)[:, None, None] + taken // block_k]
    return (block * block_k + taken % block_k).flatten()
