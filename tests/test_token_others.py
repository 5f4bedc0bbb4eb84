# SPDX-License-Identifier: Apache-2.0
"""Tokens beside a sample's own, in some places or weighed: another sample's, those that moved, or were pooled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from orders.video import GRID, D, H, Model, T, conv, flat, not_wrong, shifted, sparse, spatial
from torch import Tensor

Tokens = Callable[[Model, Tensor], Tensor]
EVEN = (torch.arange(T) % 2 == 0).view(T, 1, 1, 1)
EVEN_ROWS = (torch.arange(H) % 2 == 0).view(H, 1, 1)


def numbered() -> Tensor:
    return torch.arange(T).view(T, 1, 1, 1)


def up(z: Tensor) -> Tensor:
    return F.interpolate(z, scale_factor=(2, 1, 1))


def smooth(y: Tensor) -> Tensor:
    """The mean of each two frames, in the place of both."""
    return spatial(y, lambda z: up(F.avg_pool3d(z, (2, 1, 1))))


def written(y: Tensor) -> Tensor:
    """The first frame for the third, too, by a mask that is written into after a view of it was made."""
    number = torch.arange(T)
    seen = number.view(T, 1, 1, 1)
    number[2] = 0
    return torch.where(seen == 0, y[:, :1], y)


CASES: dict[str, Tokens] = {
    "a shift by a convolution in some places, by a sum": lambda m, y: EVEN * shifted(y, 2) + ~EVEN * y,
    "one sample for all, in some places": lambda m, y: torch.where(EVEN, y[:1], y),
    "another sample in all places, a sample's own in some": lambda m, y: EVEN * y + y.flip(0),
    "twice the smoothed less one": lambda m, y: 2 * smooth(y) - y,
    "moved tokens in all places, own ones in some": lambda m, y: EVEN * y + shifted(y, 2),
    "what moved tokens differ by, in some places": lambda m, y: y.addcmul(EVEN.to(y), shifted(y, 2) - y),
    "a crop in some places, as data says": lambda m, y: (
        lambda gate: gate * conv(y, padding=(1, 0, 0))[:, 2:] + (1 - gate) * y
    )(EVEN.to(y) + 0 * y.mean((2, 3, 4), keepdim=True)),
    "running sums in some places": lambda m, y: EVEN * y.cumsum(1) + ~EVEN * y,
    "layers of tokens that moved or not": lambda m, y: (
        m.linear((EVEN * shifted(y, 2))[..., :4]) + m.linear((~EVEN * y)[..., :4])
    ),
    "the first frame in some rows": lambda m, y: torch.where(EVEN_ROWS, y[:, :1], y),
    "the first frame in another's place": lambda m, y: torch.where(numbered() == 1, y[:, :1], y),
    "the first frame in places that were written": lambda m, y: written(y),
    "another sample by lerp": lambda m, y: torch.lerp(y, y[1:].expand_as(y), EVEN.to(y)),
    "one sample where data says so": lambda m, y: torch.where(EVEN.to(y) + 0 * y > 0.5, y[0], y),
    "the mean of samples in some places": lambda m, y: torch.where(EVEN, y.mean(0, keepdim=True), y),
    "samples by a matrix": lambda m, y: EVEN * y + (torch.eye(2).flip(0).to(y) @ y.flatten(1)).view(y.shape),
    "all samples less one in some places": lambda m, y: y.sum(0) - EVEN * y,
    "samples by a product with a diagonal": lambda m, y: (
        torch.diag_embed(EVEN.expand(*GRID, 1).flatten().to(y)) @ flat(y) + flat(y).flip(0)
    ),
    "away from the smoothed": lambda m, y: torch.lerp(y, smooth(y), 2.0),
    "less twice what smoothing takes": lambda m, y: y - 2 * (y - smooth(y)),
    "smoothed by sizes, less one": lambda m, y: (
        2 * spatial(y, lambda z: up(F.interpolate(z, (2, *GRID[1:]), mode="trilinear"))) - y
    ),
    "two ends less one": lambda m, y: (
        spatial(y, lambda z: up(F.max_pool3d(z, (2, 1, 1)))) - spatial(y, lambda z: up(F.max_pool3d(-z, (2, 1, 1)))) - y
    ),
}


@pytest.mark.parametrize("start", ["conv", "linear"])
@pytest.mark.parametrize("name", CASES)
def test_others(name: str, start: str) -> None:
    not_wrong(lambda m, y: (lambda z: flat(z) if z.dim() == 5 else z)(CASES[name](m, y)), start)


STAYS: dict[str, Tokens] = {
    "the first frame in its place": lambda m, y: torch.where(numbered() == 0, y[:, :1], y),
    "the last frame in its place": lambda m, y: torch.where(numbered() / T < 0.7, y, y[:, -1:]),
    "a layer of what was smoothed": lambda m, y: y + 0.01 * conv(smooth(y)),
}


@pytest.mark.parametrize("start", ["conv", "linear"])
@pytest.mark.parametrize("name", STAYS)
def test_what_stays_in_order(name: str, start: str) -> None:
    sparse(lambda m, y: flat(STAYS[name](m, y)), start)


KNOWN: dict[str, Tokens] = {
    "another sample's frames beside one's own": lambda m, y: torch.cat([y[:, :2], y[:1].expand_as(y)[:, 2:]], 1),
    "nothing beside a sample's own frames, and another sample": lambda m, y: (
        torch.cat([y[:, :2], torch.zeros_like(y[:, 2:])], 1) + y.flip(0)
    ),
    "the larger of two samples, far less in some places": lambda m, y: torch.maximum(y - 99 * EVEN, y[:1] - 99 * ~EVEN),
    "weights that are data of all places": lambda m, y: (
        (EVEN.to(y) + 0 * y) * shifted(y, 2) + (1 - EVEN.to(y) + 0 * y) * y
    ),
    "twice the smoothed less one, by a layer of both": lambda m, y: F.linear(
        torch.cat([smooth(y), y], -1), torch.cat([2 * torch.eye(D), -torch.eye(D)], 1).to(y)
    ),
}
"""What still comes out over a grid that is not the video's: no model is known to do it."""


@pytest.mark.xfail(strict=True, raises=AssertionError)
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_to_be_wrong(name: str) -> None:
    not_wrong(lambda m, y: flat(KNOWN[name](m, y)))
