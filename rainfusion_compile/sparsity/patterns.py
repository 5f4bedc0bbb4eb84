# SPDX-License-Identifier: Apache-2.0
"""The three sparse patterns of RainFusion (arXiv 2505.21036), as sets of (query token, key token) pairs.

Each pattern is a few lines on coordinates; ``pattern_mask`` shows it for one grid. Tables of blocks that cover a
pattern are made in :mod:`rainfusion_compile.sparsity.block_tables`.

Always kept, in every pattern: text keys for all queries and all keys for text queries; the keys of the first frame
for all queries (the first-frame sink) and all keys for the first frame's queries, except in an image, a video of one
frame, where that would be all there is; where a sequence holds several videos, the keys of the other videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rainfusion_compile.sparsity.layout import VideoLayout

PatternName = Literal["spatial", "temporal", "textural"]
PATTERNS: tuple[PatternName, ...] = get_args(PatternName)
DENSE = "dense"


@dataclass(frozen=True)
class Radii:
    """How far each pattern reaches.

    Attributes:
        frames: the spatial pattern keeps keys with ``|t_q - t_k| <= frames``.
        window: the temporal pattern keeps keys with ``|h_q - h_k| <= window[0]`` and ``|w_q - w_k| <= window[1]``.
        classes: the textural pattern keeps keys with ``(t_k + h_k + w_k) % classes == 0``.
    """

    frames: int
    window: tuple[int, int]
    classes: int


def in_pattern(name: PatternName, query: Tensor, key: Tensor, radii: Radii) -> Tensor:
    """Whether pattern ``name`` keeps each pair of video tokens.

    Args:
        name: which pattern.
        query, key: int64 ``[..., 3]`` coordinates (frame, row, column), broadcast against each other.
        radii: the pattern's reach.

    Returns:
        bool ``[...]``.
    """
    if name == "spatial":
        return (query[..., 0] - key[..., 0]).abs() <= radii.frames
    if name == "temporal":
        rows, columns = radii.window
        distance = (query[..., 1:] - key[..., 1:]).abs()
        return (distance[..., 0] <= rows) & (distance[..., 1] <= columns)
    if name == "textural":
        kept = key.sum(-1) % radii.classes == 0
        return kept.expand(torch.broadcast_shapes(query.shape[:-1], key.shape[:-1]))
    raise ValueError(f"unknown pattern {name!r}; expected one of {', '.join(PATTERNS)}")


def pattern_mask(name: PatternName, layout: VideoLayout, radii: Radii) -> Tensor:
    """The whole pattern as a bool ``[tokens, tokens]`` mask in token order, what is always kept included.

    For looking at and for tests of small grids only: nothing in the package makes a tensor of this size.
    """
    video, *places = layout.coordinates()
    coordinates = torch.stack(places, dim=-1)
    kept = in_pattern(name, coordinates[:, None], coordinates[None, :], radii)
    always = (video < 0) | layout.first_frames()
    return kept | always[:, None] | always[None, :] | (video[:, None] != video[None, :])
