# SPDX-License-Identifier: Apache-2.0
"""The judge of token orders, given claims that are true and claims that are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from orders import disturbance
from orders.disturbance import Claim
from orders.video import H, Model, N, T, W, backwards, flat, look
from torch import Tensor

from rainfusion_compile.sparsity.layout import VideoLayout

TRUE = VideoLayout((T, H, W))
Tokens = Callable[[Model, Tensor], Tensor]


def verdict(monkeypatch: pytest.MonkeyPatch, tokens: Tokens, layout: VideoLayout) -> disturbance.Verdict:
    monkeypatch.setattr(disturbance, "claims", lambda graph: [Claim(layout)])
    return look(tokens)


@pytest.mark.parametrize(
    ("tokens", "truth"),
    [
        (lambda m, y: flat(y), TRUE),
        (lambda m, y: torch.cat([m.table[0, 0].expand(2, -1, -1), flat(y)], 1), VideoLayout((T, H, W), (W, 0))),
        (lambda m, y: flat(y[:, ::2, 1:]), VideoLayout((T // 2, H - 1, W))),
        (
            lambda m, y: flat(m.wide2d(y.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, (2, T))),
            TRUE,
        ),
        (lambda m, y: flat(y.transpose(1, 2)), None),
        (lambda m, y: flat(y).flip(1), None),
        (lambda m, y: torch.cat([flat(y)[:, :7], m.table[0, 0].expand(2, -1, -1), flat(y)[:, 7:]], 1), None),
        (lambda m, y: (flat(y), flat(y).flip(0)), None),
    ],
    ids=["plain", "text", "cropped", "blurred", "transposed", "backwards", "interrupted", "other sample"],
)
def test_what_is_measured(monkeypatch: pytest.MonkeyPatch, tokens: Tokens, truth: VideoLayout | None) -> None:
    found = verdict(monkeypatch, tokens, truth or TRUE)
    assert found.truth == truth
    assert (found.wrong is None) == (truth is not None)


@pytest.mark.parametrize(
    "claim", [(H, T, W), (T, W, H), (1, T * H, W), (T, 1, H * W), (T - 1, H, W), (N, 1, 1), (2, T * H // 2, W)]
)
def test_claims_that_are_not_so(monkeypatch: pytest.MonkeyPatch, claim: tuple[int, int, int]) -> None:
    rest = N - claim[0] * claim[1] * claim[2]
    assert verdict(monkeypatch, lambda m, y: flat(y), VideoLayout(claim, (rest, 0))).wrong
    assert verdict(monkeypatch, lambda m, y: flat(y[:, backwards(T)]), VideoLayout(claim, (0, rest))).wrong or rest
