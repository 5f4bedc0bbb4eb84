# SPDX-License-Identifier: Apache-2.0
"""One video of a fixed size, its tokens in some order, one attention: what the explicit cases of token orders share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orders import operators
from orders.disturbance import Source, Verdict, judge
from rainfusion_compile.sparsity.layout import Grid, VideoLayout

T, H, W, D = 4, 6, 5, 32
N = T * H * W
GRID = (T, H, W)


class Model(nn.Module):
    """``x [2, 4, T, H, W]`` as ``[2, T, H, W, D]`` by a convolution or a linear layer, tokens of it, attention."""

    def __init__(self, tokens: Callable[..., Tensor], start: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = tokens
        self.conv3d, self.conv2d, self.linear = nn.Conv3d(4, D, 1), nn.Conv2d(4, D, 1), nn.Linear(4, D)
        self.point1d, self.point2d, self.point3d = nn.Conv1d(D, D, 1), nn.Conv2d(D, D, 1), nn.Conv3d(D, D, 1)
        self.wide2d = operators.near(nn.Conv2d(D, D, (1, 3), padding="same"))
        self.frames, self.table = nn.Linear(T, D), nn.Parameter(torch.randn(T, H, W, D))
        self.qkv = nn.Linear(D, 3 * D)
        self.places = nn.Parameter(torch.randn(1, T, H, W, D))
        self.frame_table = nn.Parameter(torch.randn(1, D, T, 1, 1))
        self.start = start

    def patches(self, x: Tensor) -> Tensor:
        if self.start == "conv":
            return self.conv3d(x).permute(0, 2, 3, 4, 1)
        return self.linear(x.permute(0, 2, 3, 4, 1)) if self.start == "linear" else x

    def heads(self, y: Tensor) -> Sequence[Tensor]:
        return self.qkv(y).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, *videos: Tensor) -> Tensor:
        tokens = self.tokens(self, *map(self.patches, videos))
        keys = tokens if isinstance(tokens, Tensor) else tokens[1]
        query, _, _ = self.heads(tokens if isinstance(tokens, Tensor) else tokens[0])
        _, key, value = self.heads(keys)
        return F.scaled_dot_product_attention(query, key, value)


VIDEO = Source((("sample", 2), ("", 4), ("frame", T), ("row", H), ("col", W)))
IMAGE = Source((("sample", 2), ("", 4), ("row", H), ("col", W)))


def look(tokens: Callable[..., Tensor], start: str = "conv", sources: Sequence[Source] = (VIDEO,)) -> Verdict:
    noise = torch.Generator().manual_seed(0)
    inputs = [torch.randn([size for _, size in source.dims], generator=noise) for source in sources]
    inputs = [x.flatten(1, 3) if source.dims[-1] == ("", 4) else x for x, source in zip(inputs, sources, strict=True)]
    (verdict,) = judge(Model(tokens, start).eval(), inputs, sources)
    return verdict


def not_wrong(tokens: Callable[..., Tensor], start: str = "conv", sources: Sequence[Source] = (VIDEO,)) -> None:
    verdict = look(tokens, start, sources)
    assert verdict.wrong is None, (verdict.claim, verdict.wrong)
    assert verdict.claim.layout is not None or verdict.claim.reason


def sparse(
    tokens: Callable[..., Tensor], start: str = "conv", grid: Grid = GRID, sources: Sequence[Source] = (VIDEO,)
) -> None:
    verdict = look(tokens, start, sources)
    assert (verdict.wrong, verdict.truth) == (None, VideoLayout(grid))
    assert verdict.claim.layout == VideoLayout(grid), verdict.claim.reason


def flat(y: Tensor) -> Tensor:
    return y.flatten(1, 3)


def conv(z: Tensor, **given: Any) -> Tensor:
    return F.conv3d(z.movedim(-1, 1), torch.eye(D)[..., None, None, None].to(z), **given).movedim(1, -1)


def spatial(z: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(z.movedim(-1, 1)).movedim(1, -1)


def shifted(y: Tensor, tap: int, mode: str = "constant") -> Tensor:
    """Frames moved by one, by a convolution of each channel."""
    kernel = torch.eye(3)[tap].view(1, 1, 3, 1, 1).expand(D, 1, 3, 1, 1).to(y)
    return spatial(y, lambda z: F.conv3d(F.pad(z, (0, 0, 0, 0, 1, 1), mode=mode), kernel, groups=D))


def backwards(count: int) -> list[int]:
    return list(range(count))[::-1]
