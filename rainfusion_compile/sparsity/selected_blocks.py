# SPDX-License-Identifier: Apache-2.0
"""Key blocks that each query block of a head selects while the model runs, and samples of those that it does not.

Of the key blocks that not everybody reads, the *free* ones, a query block reads some whole: those of the highest
product of its mean query and their mean key. Of every other one it reads each ``stride``-th key, which counts for as
many, at the phase that the head draws (:mod:`sampled_keys`). Blocks are told apart one by one, so samples of a stratum
of blocks will not do: here each block has its own, a *granule* of ``block_k / stride`` keys for each phase.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rainfusion_compile.sparsity.blocks import Blocks

STRIDES = (2, 4, 8, 16)
"""Powers of two, so that granules fill key blocks."""
SHARES = (2.0, 4.0)
"""What part of the keys that are read samples take: a half, and a quarter. Heads differ in what serves them."""
MAX_BLOCKS = 1 << 15
"""Numbers of blocks are int16."""


class Selection(NamedTuple):
    """How many of the free key blocks a query block selects, and of how many keys of the others one is read."""

    selected: int
    stride: int


def selections(blocks: Blocks, target: float) -> list[Selection]:
    """Those that come to a density near the target; none where too few blocks are free, all are, or there are several
    videos.

    The granules of the blocks that are not selected fill up whole key blocks.
    """
    free, always = int((~blocks.full_columns).sum()), blocks.density(blocks.always)
    share = (target - always) / (1 - always) if always < 1 else 0.0
    found: dict[Selection, None] = {}
    one_video = len(blocks.layout.grids) == 1
    if share > 0 and one_video and 0 < free < blocks.n_b < MAX_BLOCKS:  # a row lists one block at least
        for part in SHARES:
            stride = _nearest_stride(part / share, 1 / share, blocks.block_k)
            if stride:
                count = free * max(share - 1 / stride, 0) / (1 - 1 / stride)
                others = stride * round((free - count) / stride)
                others -= stride * (others >= free)
                found |= dict.fromkeys([Selection(free - others, stride)] if others > 0 else [])
    return list(found)


def _nearest_stride(wanted: float, least: float, block_k: int) -> int | None:
    """The stride nearest to what is wanted, by ratio, of those at which samples alone are not too many already."""
    possible = [stride for stride in STRIDES if stride > least and block_k % (4 * stride) == 0]
    return min(possible, key=lambda stride: abs(math.log(stride / wanted)), default=None)


def granules(blocks: Blocks, stride: int) -> Tensor:
    """Positions int64 ``[nB * block_k]``: for each phase, for each block of `order`, its granule.

    Which key of each run of ``stride`` the first phase takes is random, the next phase takes the next of the run.
    Positions beyond the last token name it again; blocks that have such are not free.
    """
    each, generator = blocks.block_k // stride, torch.Generator().manual_seed(0)
    first = (torch.rand(blocks.n_b, each, generator=generator, dtype=torch.float32) * stride).long()
    place = (first + torch.arange(stride)[:, None, None]) % stride + torch.arange(each) * stride
    position = torch.arange(blocks.n_b)[:, None] * blocks.block_k + place
    return position.clamp_max(blocks.layout.tokens - 1).flatten()
