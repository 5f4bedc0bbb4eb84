# SPDX-License-Identifier: Apache-2.0
"""A video transformer of our own, small and plain."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, mask=None, **kwargs):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **kwargs)
        return self.out(x.transpose(1, 2).flatten(2))


class Video(nn.Module):
    """A video transformer in a few lines."""

    def __init__(self, layers: int = 2, dim: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, dim, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))

    def forward(self, video, mask=None, **kwargs):
        x = self.patch(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x, mask, **kwargs)
        return x
