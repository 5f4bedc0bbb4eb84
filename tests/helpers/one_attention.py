# SPDX-License-Identifier: Apache-2.0
"""A model with one attention over the tokens of a convolution, and what is found in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import Grid, capture, randn
from torch import Tensor, nn

from rainfusion_compile.passes.attention_match import AttentionMatch
from rainfusion_compile.passes.match.find import find_attentions

T, H, W = 3, 5, 7
N = T * H * W
TEXT = 9


class Video(nn.Module):
    """Latents, a 3-D convolution, `tokens` of its output, one attention that `attend` calls."""

    def __init__(
        self,
        tokens: Callable[[Tensor], Tensor] = lambda y: y.flatten(2).transpose(1, 2),
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
        heads: int = 2,
        kv_heads: int = 2,
        head_dim: int = 16,
    ) -> None:
        super().__init__()
        self.tokens, self.attend = tokens, attend
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.q = nn.Linear(32, heads * head_dim)
        self.k = nn.Linear(32, kv_heads * head_dim)
        self.v = nn.Linear(32, kv_heads * head_dim)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.tokens(self.patch(latents))
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        return self.attend(q, k, v)


def latents(grid: Grid = (T, H, W), batch: int = 2) -> Tensor:
    return randn(batch, 4, grid[0], 2 * grid[1], 2 * grid[2])


def match(model: Callable[..., Any], *args: Any, grad: bool = False, **options: Any) -> AttentionMatch:
    (graph,) = capture(model, *(args or (latents(),)), grad=grad)
    with torch.set_grad_enabled(grad):
        (found,) = find_attentions(graph, **options)
    return found


def reason(model: Callable[..., Any], *args: Any, **options: Any) -> str:
    found = match(model, *args, **options)
    assert found.reason is not None, found
    return found.reason


def flat(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def packed(x: Tensor) -> Tensor:
    """Attention over tokens of which the graph shows nothing."""
    return F.scaled_dot_product_attention(x * 2, x, x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    """Attention in heads of 16: of ``[B, S, C]`` to ``[B, C / 16, S, 16]``."""
    q, k, v = (x.unflatten(-1, (-1, 16)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, **more)
