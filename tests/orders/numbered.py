# SPDX-License-Identifier: Apache-2.0
"""Tokens that come flat, in a grid that a parameter alone tells; then moved over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from found_grids import OPTIONS, call
from torch import Tensor, nn

from orders.video import GRID, D, H, T, W, flat


class Numbered(nn.Module):
    """Tokens ``[2, T * H * W, D]``, moved by a function of them as ``[2, T, H, W, D]``, and attention."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.move = move
        self.positions, self.qkv = nn.Parameter(torch.randn(1, T, H, W, D)), nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        y = (x + self.positions.flatten(1, 3)).unflatten(1, GRID)
        y = flat(self.move(y))
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


def grids_of_numbered(move: Callable[[Tensor], Tensor]) -> set[Any]:
    torch._dynamo.reset()
    compiled = torch.compile(Numbered(move).eval(), backend="rainfusion", options=OPTIONS, fullgraph=True)
    return call(compiled, torch.randn(2, T * H * W, D))[1]
