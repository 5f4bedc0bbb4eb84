# SPDX-License-Identifier: Apache-2.0
"""Grids given from outside: taken where the graph cannot know, and never against what it shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from models import randn
from one_attention import H, N, T, Video, W, flat, latents, match, packed, reason
from torch import Tensor, nn


def test_a_given_grid_is_taken_where_the_graph_cannot_know() -> None:
    x = randn(1, 2, N + 9, 16)
    assert reason(packed, x) == f"tokens: {N + 9} in one unstructured axis"
    found = match(packed, x, grid=(T, H, W), text=(0, 9))
    assert (found.reason, found.grid, found.text) == (None, (T, H, W), (0, 9))
    assert match(packed, x[:, :, :N], grid=(T, W, H)).grid == (T, W, H)


def test_a_given_grid_must_fit() -> None:
    x = randn(1, 2, N + 9, 16)
    assert reason(packed, x, grid=(T, H, W)) == f"{N + 9} tokens do not fit grid=(3, 5, 7), which makes {N}"
    assert reason(packed, x, grid=(T, H, W), text=(1, 2)).endswith("with text=(1, 2), which makes 108")
    # elsewhere in the model there may be other videos, whose grid is seen
    assert match(Video(), grid=(2, 2, 2)).grid == (T, H, W)


def test_a_given_grid_must_not_contradict_the_graph() -> None:
    text = nn.Parameter(randn(1, 9, 32))
    model = Video(lambda y: torch.cat([text.expand(len(y), -1, -1), flat(y)], 1))
    found = match(model, grid=(T, H, W))
    assert (found.reason, found.grid, found.text) == (None, (T, H, W), (9, 0))
    assert reason(model, grid=(T, W, H)).startswith("the graph shows grid=(3, 5, 7) with text=(9, 0)")
    assert reason(model, grid=(T, H, W), text=(0, 9)).startswith("the graph shows")
    turned = Video(lambda y: y.permute(0, 3, 4, 2, 1).flatten(1, 3))
    assert reason(turned, grid=(H, W, T)).startswith("token order is row, col, time")


def test_a_given_grid_is_believed_of_tokens_that_nobody_knows() -> None:
    attend = F.scaled_dot_product_attention
    q, k, v = (randn(1, 2, N, 16) for _ in range(3))
    assert match(attend, q, k, v, grid=(T, H, W)).grid == (T, H, W)
    assert match(attend, q, k, v, grid=(T, H, W - 1), text=(0, T * H)).text == (0, T * H)
    assert "do not fit" in reason(attend, q, k, v, grid=(T, H, W - 1))
    assert reason(attend, q, k, v)


def test_a_given_grid_makes_no_self_attention_of_what_is_known_to_be_none() -> None:
    class Two(Video):
        """Queries of one video, keys of another, or of something else that has as many tokens."""

        def forward(self, latents: Tensor, others: Tensor) -> Tensor:
            x = flat(self.patch(latents))
            y = flat(self.patch(others)) if others.dim() == 5 else others
            q, k, v = (layer(z).unflatten(-1, (2, 16)) for layer, z in ((self.q, x), (self.k, y), (self.v, y)))
            return F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))

    for others in (latents(), randn(1, N, 32)):
        assert reason(Two(), latents(), others, grid=(T, H, W))
    q, k, v = (randn(2, 2, N, 16) for _ in range(3))
    for attend in (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :9], v[:, :, :9]),
        lambda q, k, v: F.scaled_dot_product_attention(q, k.flip(2), v.flip(2)),
        lambda q, k, v: F.scaled_dot_product_attention(q, q.flip(2), v),
        lambda q, k, v: F.scaled_dot_product_attention(q[:1], q[1:], q[1:]),
    ):
        assert reason(attend, q, k, v, grid=(T, H, W))
