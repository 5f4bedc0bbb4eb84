# SPDX-License-Identifier: Apache-2.0
"""The sparse patterns, as sets of (query token, key token) pairs: one file each. Three are RainFusion's (arXiv
2505.21036); the fourth, "adaptive", is what heads select while they run.

To add one, write its file and add its class to the list here.

Always kept, in every pattern: text keys for all queries and all keys for text queries; the keys of the first frame
for all queries (the first-frame sink) and all keys for the first frame's queries, except in an image, a video of one
frame, where that would be all there is; where a sequence holds several videos, the keys of the other videos.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from rainfusion_compile.sparsity.blocks import Pattern
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns.adaptive import Adaptive
from rainfusion_compile.sparsity.patterns.spatial import Spatial
from rainfusion_compile.sparsity.patterns.temporal import Temporal
from rainfusion_compile.sparsity.patterns.textural import Textural

PatternName: TypeAlias = str
Radii: TypeAlias = dict[PatternName, Any]
"""How far each pattern reaches; what that is, its class says."""

PATTERNS: tuple[PatternName, ...] = ("spatial", "temporal", "textural")
"""RainFusion's."""
BY_NAME: dict[PatternName, type[Pattern]] = {
    pattern.name: pattern for pattern in (Spatial, Temporal, Textural, Adaptive)
}
DENSE = "dense"


def in_pattern(name: PatternName, query: Tensor, key: Tensor, radii: Radii) -> Tensor:
    """Whether pattern ``name`` keeps each pair of video tokens; see :meth:`Pattern.keeps`."""
    if name not in BY_NAME:
        raise ValueError(f"unknown pattern {name!r}; expected one of {', '.join(BY_NAME)}")
    kept = BY_NAME[name].keeps(query, key, radii[name])
    return kept.expand(torch.broadcast_shapes(query.shape[:-1], key.shape[:-1]))


def pattern_mask(name: PatternName, layout: VideoLayout, radii: Radii) -> Tensor:
    """The whole pattern as a bool ``[tokens, tokens]`` mask in token order, what is always kept included; for tests."""
    video, *places = layout.coordinates()
    coordinates = torch.stack(places, dim=-1)
    kept = in_pattern(name, coordinates[:, None], coordinates[None, :], radii)
    always = (video < 0) | layout.first_frames()
    return kept | always[:, None] | always[None, :] | (video[:, None] != video[None, :])
