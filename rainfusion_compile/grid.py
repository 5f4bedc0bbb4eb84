# SPDX-License-Identifier: Apache-2.0
"""The video grid: where each token stands, and the order in which tokens are computed.

A sequence of ``tokens`` entries is ``before`` text tokens, then ``T * H * W`` video tokens in raster order
(frame, row, column), then ``after`` text tokens. Block sparsity is only as good as its blocks, so tokens are computed
in another order, in which any run of consecutive video tokens is compact in space and time. The model's own tensors
are never reordered or padded; kernels follow the order in their loads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VideoLayout:
    """A video of ``grid = (T, H, W)`` tokens with ``text = (before, after)`` text tokens around it.

    Raises:
        ValueError: if a grid size is less than one, or a text length is negative.
    """

    grid: tuple[int, int, int]
    text: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", checked_ints("grid", self.grid, 3, minimum=1))
        object.__setattr__(self, "text", checked_ints("text", self.text, 2, minimum=0))

    @property
    def video_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.video_tokens + sum(self.text)

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Frame, row and column of every video token in raster order; three int64 tensors ``[T*H*W]``."""
        _, height, width = self.grid
        index = torch.arange(self.video_tokens)
        return index // (height * width), index // width % height, index % width


def checked_ints(name: str, value: object, count: int, *, minimum: int) -> tuple[int, ...]:
    """``value`` as a tuple of ``count`` ints of at least ``minimum``, or a ``ValueError`` naming it."""
    accepted = f"{count} integers, each at least {minimum}"
    if not isinstance(value, (tuple, list)) or len(value) != count:
        raise ValueError(f"{name} must be {accepted}; got {value!r}")
    if any(isinstance(item, bool) or not isinstance(item, int) or item < minimum for item in value):
        raise ValueError(f"{name} must be {accepted}; got {value!r}")
    return tuple(value)


def token_order(layout: VideoLayout, *, run: int) -> Tensor:
    """The computing order: ``order[position] = token``, an int64 permutation ``[tokens]``.

    Text stays where it is and frames stay in order. Inside a frame, tokens are walked in horizontal bands, column by
    column, turning round at the end of each band, so that *every* run of about ``run`` consecutive tokens covers a
    compact window of the frame. Unlike a raster of fixed windows this has no ragged edge to straddle: a run that
    starts anywhere is as compact as one that starts on a window's corner.

    Args:
        layout: the video and its text.
        run: tokens in the windows to optimise for, between the key block's and the query block's size.
    """
    _, height, width = layout.grid
    t, h, w = layout.coordinates()
    bands = min(max(round(height / math.sqrt(run)), 1), height)  # bands about as high as a square window of `run`
    band = h * bands // height
    column = torch.where(band % 2 == 0, w, width - 1 - w)
    before, after = layout.text
    video = (((t * height + band) * width + column) * height + h).argsort() + before
    end = before + layout.video_tokens
    return torch.cat([torch.arange(before), video, torch.arange(end, end + after)])
