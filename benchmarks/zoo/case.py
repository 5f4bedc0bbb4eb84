# SPDX-License-Identifier: Apache-2.0
"""What a builder of a shrunk model returns, and the register that builders enter themselves in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rainfusion_compile.sparsity.layout import Grid, Grids, VideoLayout

Text = tuple[int, ...]

GRID: Grid = (3, 5, 7)
"""The token grid of every model whose class takes it: three different sizes, none a multiple of another."""
BATCH = 1
TEXT = 9
WIDTH = 16
"""Text tokens, and their channels."""


@dataclass
class ModelCase:
    """A shrunk model, the inputs of one forward, and what is true of its attention over the video.

    Attributes:
        model: an unmodified class of diffusers.
        inputs: keyword arguments of forward.
        grid: tokens in time, height and width, of one video or of each.
        text: tokens before and after the grid, and between grids.
        video, dense: how many calls of ``scaled_dot_product_attention`` go over the video, and how many do not; of
            the models that tests use.
        tokens: queries of the attentions that go over the video, whatever stands beside it in the sequence included.
            By default, those of grid and text.
        otherwise: how many attentions over the video do not go through ``scaled_dot_product_attention``, and what
            computes them. Such cannot be rewritten.
        note: what to know when reading the row.
    """

    model: nn.Module
    inputs: dict[str, Any]
    grid: Grids = GRID
    text: Text = (0, 0)
    _: KW_ONLY
    video: int | None = None
    dense: int | None = None
    tokens: int = 0
    otherwise: tuple[int, str] = (0, "")
    note: str = ""

    def __post_init__(self) -> None:
        self.tokens = self.tokens or VideoLayout(self.grid, self.text).tokens
        self.inputs = {**self.inputs, "return_dict": False}
        self.model.eval()


Builder = Callable[..., ModelCase]
B = TypeVar("B", bound=Builder)
BUILDERS: dict[tuple[str, str], Builder] = {}
"""By class name and variant; the variant is "" where a class has one builder. Builders that tests use, too, take a
grid and a batch size."""


def builds(name: str, variant: str = "") -> Callable[[B], B]:
    """Enter a builder as that of the class ``name`` of diffusers."""

    def enter(builder: B) -> B:
        assert (name, variant) not in BUILDERS, (name, variant)
        BUILDERS[name, variant] = builder
        return builder

    return enter


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal float32 tensor of the given shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_of(grid: Grids = GRID) -> int:
    """The length of a sequence that holds one grid or several."""
    return VideoLayout(grid).tokens


def latents(channels: int, grid: Grid = GRID, batch: int = BATCH, *, seed: int = 0) -> Tensor:
    """``[B, C, T, H, W]`` latents of which patches of 1x2x2 make the grid."""
    t, h, w = grid
    return randn(batch, channels, t, 2 * h, 2 * w, seed=seed)


def text(batch: int = BATCH, *, tokens: int = TEXT, channels: int = WIDTH, seed: int = 1) -> Tensor:
    """``[B, tokens, channels]`` embeddings of a text."""
    return randn(batch, tokens, channels, seed=seed)


def timestep(value: float = 500, batch: int = BATCH) -> Tensor:
    """``[B]`` of the middle of the schedule; integer if ``value`` is."""
    return torch.full((batch,), value)
