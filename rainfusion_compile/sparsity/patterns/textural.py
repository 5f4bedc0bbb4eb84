# SPDX-License-Identifier: Apache-2.0
"""The textural pattern: keys of a checkerboard of every frame."""

from __future__ import annotations

import torch
from torch import Tensor

from rainfusion_compile.sparsity.blocks import Cover, Pattern

MAX_CLASSES = 16


class Textural(Pattern):
    """Keeps keys with ``(t_k + h_k + w_k) % radius == 0``. They are scattered over all blocks, so gathered anew."""

    name = "textural"
    gathers_keys = True

    @staticmethod
    def keeps(query: Tensor, key: Tensor, radius: int) -> Tensor:
        return key.sum(-1) % radius == 0

    def radius(self, target: float) -> int:
        misses: dict[int, float] = {}
        for classes in range(1, MAX_CLASSES + 1):
            density = self.density(classes)
            misses[classes] = abs(density - target)
            if density <= target:
                break  # more classes only drop more
        return min(misses, key=misses.__getitem__)

    def cover(self, radius: int) -> Cover:
        """Each video has its own gathered blocks, filled up with other keys spread over it."""
        blocks = self.blocks
        free = ~blocks.full_columns[torch.arange(blocks.layout.tokens) // blocks.block_k]
        checks = (blocks.frame + blocks.row + blocks.column) % radius == 0
        mask, gathered = blocks.always, [torch.empty(0, dtype=torch.int64)]
        for video in range(len(blocks.layout.grids)):
            own = free & (blocks.video == video)
            wanted, rest = own & checks, (own & ~checks).nonzero().flatten()
            missing = -int(wanted.sum()) % blocks.block_k
            if len(rest) <= missing:  # everything is kept, or as good as
                mask = mask | ((blocks.video_q == video)[:, None] & (blocks.video_k == video)[None, :])
                continue
            wanted[rest[torch.arange(missing) * len(rest) // max(missing, 1)]] = True
            gathered.append(wanted.nonzero().flatten())
        return Cover(mask, torch.cat(gathered))
