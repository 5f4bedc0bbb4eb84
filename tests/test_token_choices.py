# SPDX-License-Identifier: Apache-2.0
"""Masks that choose between a sample's tokens and others of the same places: another sample's, or some that moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from orders.video import D, H, Model, T, conv, flat, not_wrong, shifted, sparse, spatial
from torch import Tensor

Tokens = Callable[[Model, Tensor], Tensor]
Choice = Callable[[Tensor, Tensor, Tensor], Tensor]
EVEN = (torch.arange(T) % 2 == 0).view(T, 1, 1, 1)
EVEN_ROWS = (torch.arange(H) % 2 == 0).view(H, 1, 1)
CHOICES: dict[str, Choice] = {
    "where": torch.where,
    "where data says so": lambda mask, a, b: torch.where(mask + 0 * a > 0.5, a, b),
    "lerp": lambda mask, a, b: b.lerp(a, mask.to(a)),
    "sums": lambda mask, a, b: mask * a + ~mask * b,
    "addcmul": lambda mask, a, b: (~mask * b).addcmul(mask.to(a), a),
}
OTHERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "samples turned": lambda y: (y, y.flip(0)),
    "samples rolled": lambda y: (y, y.roll(1, 0)),
    "samples by index": lambda y: (y, y[torch.tensor([1, 0])]),
    "samples": lambda y: (y[:1], y[1:]),
    "single samples": lambda y: (y[0][None], y[1][None]),
    "crops": lambda y: (conv(y, padding=(1, 0, 0))[:, 2:], conv(y, padding=(1, 0, 0))[:, :T]),
    "crops of one": lambda y: (lambda z: (z[:, 2:], z[:, :T]))(conv(y, padding=(1, 0, 0))),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("others", OTHERS)
def test_others(others: str, choice: str) -> None:
    not_wrong(lambda m, y: flat(CHOICES[choice](EVEN, *OTHERS[others](y))))


MOVED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "a shift by a convolution": lambda y: (shifted(y, 2), y),
    "two shifts, and one": lambda y: (shifted(shifted(y, 2), 2), shifted(y, 2)),
    "a crop": lambda y: (conv(y, padding=(1, 0, 0))[:, 2:], y),
}


@pytest.mark.parametrize("choice", ["where", "where data says so", "lerp"])
@pytest.mark.parametrize("moved", MOVED)
def test_moved(moved: str, choice: str) -> None:
    """A sum may be what a convolution adds to its tokens."""
    not_wrong(lambda m, y: flat(CHOICES[choice](EVEN, *MOVED[moved](y))))


@pytest.mark.parametrize("choice", CHOICES)
def test_rows_of_two_frames(choice: str) -> None:
    not_wrong(lambda m, y: CHOICES[choice](EVEN_ROWS, y[:, 0], y[:, 1]).flatten(1, 2))


def by_sample(m: Model, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([change(y[i : i + 1]) for i in range(len(y))])


def causal(y: Tensor, size: int) -> Tensor:
    """What stands still, by a convolution over frames before, of which the end is cropped."""
    kernel = torch.eye(size)[-1].view(1, 1, size, 1, 1).expand(D, 1, size, 1, 1).to(y)
    return spatial(y, lambda z: F.conv3d(z, kernel, groups=D, padding=(size - 1, 0, 0)))[:, :T]


STAYS: dict[str, Tokens] = {
    "samples one by one": lambda m, y: flat(by_sample(m, y, lambda z: z * m.places)),
    "samples stacked": lambda m, y: flat(torch.stack([z * m.places[0] for z in y.unbind(0)])),
    "samples added up": lambda m, y: flat(y + y.flip(0)),
    "guidance": lambda m, y: flat(y[:1] + 3 * (y[1:] - y[:1])),
    "guidance of what numbers told apart": lambda m, y: (lambda a, b: flat(a + 3 * (b - a)))(*(y * m.places).split(1)),
    "some of a convolution": lambda m, y: flat(y.addcmul(EVEN.to(y), shifted(y, 1))),
    "a convolution, as much as data says": lambda m, y: flat(y.lerp(shifted(y, 1), 0.5 + 0 * y)),
    "convolutions over what was before": lambda m, y: flat(y + causal(y, 2) + causal(y, 3)),
    "nothing in some places": lambda m, y: flat(torch.where(EVEN, y, 0.01 * y)),
    "a linear layer of one feature": lambda m, y: flat(
        torch.cat([F.linear(y[:, i : i + 1, ..., :1], torch.ones(D, 1).to(y)) for i in range(T)], 1)
    ),
    "some tokens changed": lambda m, y: (
        flat(y) + 0.01 * torch.zeros_like(flat(y)).index_copy(1, torch.arange(60), flat(y)[:, torch.arange(60)])
    ),
}


@pytest.mark.parametrize("start", ["conv", "linear"])
@pytest.mark.parametrize("name", STAYS)
def test_what_stays_in_order(name: str, start: str) -> None:
    sparse(STAYS[name], start)
