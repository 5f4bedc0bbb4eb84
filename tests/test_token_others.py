# SPDX-License-Identifier: Apache-2.0
"""Tokens beside a sample's own, in some places or weighed: another sample's, those that moved, or were pooled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from orders.video import GRID, D, H, Model, T, conv, flat, look, not_wrong, shifted, sparse, spatial
from torch import Tensor

from rainfusion_compile.sparsity.layout import VideoLayout

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


def up_layer(m: Model, y: Tensor) -> Tensor:
    return spatial(y, lambda z: up(m.point3d(F.avg_pool3d(z, (2, 1, 1)))))


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
    "the larger of two samples, far less in some places": lambda m, y: torch.maximum(y - 99 * EVEN, y[:1] - 99 * ~EVEN),
    "what is positive in some places, and another sample": lambda m, y: F.relu(y - 99 * EVEN) + y.flip(0),
    "weights that are data of all places": lambda m, y: (
        (EVEN.to(y) + 0 * y) * shifted(y, 2) + (1 - EVEN.to(y) + 0 * y) * y
    ),
    "a mixture by data in which numbers tell places apart": lambda m, y: y.lerp(shifted(y, 2), EVEN.to(y) + 0 * y),
    "the last frame in some places, by a sum": lambda m, y: EVEN * y[:, -1:] + ~EVEN * y,
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


def expanded(y: Tensor) -> Tensor:
    """The first sample for all."""
    return y[:1].expand_as(y)


def write(y: Tensor, at: slice, values: Tensor | float) -> Tensor:
    written = y.clone()
    written[:, at] = values
    return written


def zeroed(y: Tensor, *at: slice) -> Tensor:
    written = y.clone()
    written[(slice(None), *at)].zero_()
    return written


def halves(y: Tensor) -> tuple[Tensor, Tensor]:
    """Two samples, the first of which is nothing in some places."""
    one, other = y.clone().chunk(2)
    one.mul_(EVEN)
    return one, other


BESIDE: dict[str, Tokens] = {
    "another sample's frames": lambda m, y: torch.cat([y[:, :2], expanded(y)[:, 2:]], 1),
    "another sample's tokens": lambda m, y: torch.cat([flat(y)[:, :60], flat(expanded(y))[:, 60:]], 1),
    "another sample's last frame": lambda m, y: torch.cat([y[:, :2], expanded(y)[:, 3:]], 1),
    "another sample's frames in turn": lambda m, y: torch.stack(
        [(expanded(y) if at % 2 else y)[:, at] for at in range(T)], 1
    ),
    "another sample's frames, written": lambda m, y: write(y, slice(2), expanded(y)[:, :2]),
    "another sample's frames, written in turn": lambda m, y: write(y, slice(0, None, 2), y[:1, ::2]),
    "frames that moved": lambda m, y: torch.cat([y[:, :2], shifted(y, 2)[:, 2:]], 1),
    "frames that moved, written": lambda m, y: write(y, slice(2), shifted(y, 2)[:, :2]),
    "frames that were smoothed": lambda m, y: torch.cat([smooth(y)[:, :2], y[:, 2:]], 1),
    "nothing, and another sample": lambda m, y: torch.cat([y[:, :2], torch.zeros_like(y[:, 2:])], 1) + y.flip(0),
    "as good as nothing, and another sample": lambda m, y: torch.cat([y[:, :2], 0 * y[:, 2:]], 1) + y.flip(0),
    "nothing, by padding, and another sample": lambda m, y: F.pad(y[:, :2], (0,) * 7 + (2,)) + y.flip(0),
    "nothing, written, and another sample": lambda m, y: zeroed(y, slice(2)) + y.flip(0),
    "nothing, written in turn, and another sample": lambda m, y: zeroed(y, slice(0, None, 2)) + y.flip(0),
    "nothing, and what moved beside nothing": lambda m, y: (
        torch.cat([y[:, :2], torch.zeros_like(y[:, 2:])], 1)
        + torch.cat([torch.zeros_like(y[:, :2]), shifted(y, 2)[:, 2:]], 1)
    ),
    "nothing, written into some rows in turn, and another sample": lambda m, y: (
        zeroed(y, slice(0, None, 2), slice(1, None)) + y.flip(0)
    ),
    "nothing, by a view, and another sample": lambda m, y: (
        lambda z: (z.flatten(2, 3).mul_(EVEN[:, 0]), z + y.flip(0))[1]
    )(y.clone()),
    "halves, one of which was written into": lambda m, y: sum(halves(y)),
    "samples in another order, in some places": lambda m, y: EVEN * y + torch.cat([y[1:], y[:1]]),
    "samples in another order, stacked, in some places": lambda m, y: EVEN * y + torch.stack([y[1], y[0]]),
    "samples in another order, written, in some places": lambda m, y: (
        lambda z: (z[0].copy_(y[1]), z[1].copy_(y[0]), torch.where(EVEN, z, y))[2]
    )(torch.empty_like(y)),
    "chunks of samples, chosen": lambda m, y: torch.where(EVEN, torch.cat(y.chunk(2)[::-1]), y),
}
"""What is put together of tokens and of others that stand in the same places."""

LAYERS: dict[str, Tokens] = {
    "moved in some places, in a sum": lambda m, y: torch.stack([EVEN * shifted(y, 2), ~EVEN * y]).sum(0),
    "the smoothed, in a sum": lambda m, y: torch.stack([2 * smooth(y), -y]).sum(0),
    "the smoothed, by numbers": lambda m, y: torch.einsum(
        "s,sbthwd->bthwd", torch.tensor([2.0, -1.0]).to(y), torch.stack([smooth(y), y])
    ),
    "the smoothed, by a layer": lambda m, y: F.linear(
        torch.cat([smooth(y), y], -1), torch.cat([2 * torch.eye(D), -torch.eye(D)], 1).to(y)
    ),
    "another sample in some places, by a layer": lambda m, y: F.linear(
        torch.cat([EVEN * y, y.flip(0)], -1), torch.eye(D).repeat(1, 2).to(y)
    ),
}
"""What layers and sums make of what stands side by side."""

SMOOTHED: dict[str, Tokens] = {
    "by a convolution of each channel": lambda m, y: spatial(
        y,
        lambda z: F.conv_transpose3d(
            F.avg_pool3d(z, (2, 1, 1)), torch.ones(D, 1, 2, 1, 1).to(z), None, (2, 1, 1), groups=D
        ),
    ),
    "from the mean of pairs": lambda m, y: spatial(y.unflatten(1, (2, 2)).mean(2), up),
    "frame by frame": lambda m, y: torch.stack([y[:, at - at % 2 :][:, :2].mean(1) for at in range(T)], 1),
}
"""The mean of each two frames, in the place of both."""


def test_another_samples_video_behind_ones_own() -> None:
    verdict = look(lambda m, y: torch.cat([flat(y), flat(y).flip(0)], 1))
    assert verdict.claim.layout == VideoLayout((GRID, GRID)), verdict.claim.reason


@pytest.mark.parametrize("start", ["conv", "linear"])
@pytest.mark.parametrize("name", [*BESIDE, *LAYERS])
def test_others_side_by_side(name: str, start: str) -> None:
    tokens = (BESIDE | LAYERS)[name]
    not_wrong(lambda m, y: (lambda z: flat(z) if z.dim() == 5 else z)(tokens(m, y)), start)


@pytest.mark.parametrize("start", ["conv", "linear"])
@pytest.mark.parametrize("name", SMOOTHED)
def test_twice_the_smoothed_less_one(name: str, start: str) -> None:
    not_wrong(lambda m, y: flat(2 * SMOOTHED[name](m, y) - y), start)


@pytest.mark.parametrize("start", ["conv", "linear"])
def test_frames_each_less_than_the_mean_of_two(start: str) -> None:
    def frame(y: Tensor, at: int) -> Tensor:
        return 2 * y[:, at - at % 2 :][:, :2].mean(1) - y[:, at]

    def written(m: Model, y: Tensor) -> Tensor:
        frames = torch.empty_like(y)
        for at in range(T):
            frames[:, at] = frame(y, at)
        return flat(frames)

    not_wrong(lambda m, y: flat(torch.stack([frame(y, at) for at in range(T)], 1)), start)
    not_wrong(written, start)
    not_wrong(lambda m, y: flat(torch.where(EVEN, spatial(y[:, 1::2], up), spatial(y[:, ::2], up))), start)


STAYS: dict[str, Tokens] = {
    "the first frame in its place": lambda m, y: torch.where(numbered() == 0, y[:, :1], y),
    "the last frame in its place": lambda m, y: torch.where(numbered() / T < 0.7, y, y[:, -1:]),
    "a layer of what was smoothed": lambda m, y: y + 0.01 * conv(smooth(y)),
    "the first frame beside nothing, in channels": lambda m, y: F.linear(
        torch.cat([torch.cat([y[:, :1], 0 * y[:, 1:]], 1), y], -1),
        torch.cat([0.01 * torch.eye(D), torch.eye(D)], 1).to(y),
    ),
    "samples twice": lambda m, y: torch.cat([y, y])[:2] + 0.01 * torch.cat([y, y])[2:],
    "a layer of what was smoothed by layers, beside": lambda m, y: F.linear(
        torch.cat([up_layer(m, y), y], -1), torch.cat([0.01 * torch.eye(D), torch.eye(D)], 1).to(y)
    ),
    "a convolution, as much as data says": lambda m, y: y.lerp(shifted(y, 1), m.linear(y[..., :4]).sigmoid()),
    "both halves": lambda m, y: torch.cat([2 * y[:, :2], y[:, 2:]], 1),
    "rows written as they were": lambda m, y: (lambda z: (z[:, :, 2:].mul_(0.5), z)[1])(y.clone()),
}


@pytest.mark.parametrize("start", ["conv", "linear"])
@pytest.mark.parametrize("name", STAYS)
def test_what_stays_in_order(name: str, start: str) -> None:
    sparse(lambda m, y: flat(STAYS[name](m, y)), start)


KNOWN: dict[str, Tokens] = {
    "sums of all before less those of all after": lambda m, y: 2 * (y.cumsum(1) - y.flip(1).cumsum(1).flip(1)) - y,
}
"""What still comes out over a grid that is not the video's: no model is known to do it."""


@pytest.mark.xfail(strict=True, raises=AssertionError)
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_to_be_wrong(name: str) -> None:
    not_wrong(lambda m, y: flat(KNOWN[name](m, y)))
