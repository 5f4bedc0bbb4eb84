# SPDX-License-Identifier: Apache-2.0
"""The spatial pattern: keys of the frames near the query's."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from rainfusion_compile.sparsity.blocks import Pattern, dilate, nearest


class Spatial(Pattern):
    """Keeps keys with ``|t_q - t_k| <= radius``."""

    name = "spatial"
    needs_frames = True
    reads_runs = True

    @staticmethod
    def keeps(query: Tensor, key: Tensor, radius: int) -> Tensor:
        return (query[..., 0] - key[..., 0]).abs() <= radius

    def radius(self, target: float, *, fine: bool = True) -> int:
        return nearest(range(max(frames for frames, _, _ in self.blocks.layout.grids)), self.density, target)

    def cover(self, radius: int) -> Tensor:
        # Frames of all videos in one row: beyond the end of a video are those of others, which are kept anyway.
        query, key = self._frames
        reach = dilate(query[:, :, None], (radius, 0))[:, :, 0]
        return (reach @ key.T > 0) | self.blocks.always

    @cached_property
    def _frames(self) -> tuple[Tensor, Tensor]:
        return self.blocks.occupancy(self.blocks.frame, [frames for frames, _, _ in self.blocks.layout.grids])
