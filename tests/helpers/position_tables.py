# SPDX-License-Identifier: Apache-2.0
"""Tables of positions: the places of a grid's tokens, and their rotary angles."""

from __future__ import annotations

import torch
from models import Grid
from torch import Tensor

GRIDS: tuple[Grid, ...] = ((4, 6, 10), (4, 10, 6))  # as many tokens


def mesh(grid: Grid) -> Tensor:
    """Frame, row and column of every token, ``[T, H, W, 3]``."""
    return torch.stack(torch.meshgrid(*(torch.arange(float(size)) for size in grid), indexing="ij"), -1)


def rotary(places: Tensor, freqs: int = 4, theta: float = 1e4) -> Tensor:
    """Angles ``[tokens, 3 * freqs]`` of coordinates ``[tokens, 3]``."""
    steps = theta ** -(torch.arange(freqs) / freqs)
    return (places[:, :, None] * steps).flatten(1)
