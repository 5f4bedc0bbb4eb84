# SPDX-License-Identifier: Apache-2.0
"""The temporal pattern: keys near the query's place, in every frame."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from rainfusion_compile.sparsity.blocks import Pattern, dilate, distinct_rows, nearest


class Temporal(Pattern):
    """Keeps keys with ``|h_q - h_k| <= radius[0]`` and ``|w_q - w_k| <= radius[1]``."""

    name = "temporal"

    @staticmethod
    def keeps(query: Tensor, key: Tensor, radius: tuple[int, int]) -> Tensor:
        distance = (query[..., 1:] - key[..., 1:]).abs()
        return (distance[..., 0] <= radius[0]) & (distance[..., 1] <= radius[1])

    def radius(self, target: float, *, fine: bool = True) -> tuple[int, int]:
        height, width = (max(sizes) for sizes in list(zip(*self.blocks.layout.grids, strict=True))[1:])
        steps = range(2 * max(height, width))
        square = sorted({(min(i // 2, height - 1), min((i + 1) // 2, width - 1)) for i in steps})
        best = nearest(square, self.density, target)
        if not fine:
            return best
        # Blocks are coarse: one more row can double the density. Lengthening one side alone fills the gap.
        h, w = square[max(square.index(best) - (self.density(best) > target), 0)]
        wide = nearest([(h, i) for i in range(w, width)], self.density, target)
        tall = nearest([(i, w) for i in range(h, height)], self.density, target)
        return min((best, wide, tall), key=lambda radius: abs(self.density(radius) - target))

    def cover(self, radius: tuple[int, int]) -> Tensor:
        (query, which_query), (key, which_key) = self._places
        sizes = [(height, width) for _, height, width in self.blocks.layout.grids]
        places = query.split([height * width for height, width in sizes], dim=1)
        reach = [dilate(p.view(-1, *size), radius).flatten(1) for p, size in zip(places, sizes, strict=True)]
        return (torch.cat(reach, 1) @ key.T > 0)[which_query][:, which_key] | self.blocks.always

    def block_order(self) -> Tensor:
        """By the place of the block's middle, on the walk through a frame."""
        key = torch.zeros(self.blocks.n_b, dtype=torch.int64)
        middle = torch.arange(self.blocks.n_b) * self.blocks.block_k + self.blocks.block_k // 2
        for span in self.blocks.layout.spans:
            _, height, width = span.grid
            inside = (span.start <= middle) & (middle < span.stop)
            key[inside] = (middle[inside] - span.start) % (height * width)
        return key

    @cached_property
    def _places(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Distinct occupancies (blocks of many frames stand in the same places), and which one each block has."""
        grids = self.blocks.layout.grids
        widths = torch.tensor([width for _, _, width in grids])
        cell = self.blocks.row * widths[self.blocks.video] + self.blocks.column
        query, key = self.blocks.occupancy(cell, [height * width for _, height, width in grids])
        return distinct_rows(query), distinct_rows(key)
