# SPDX-License-Identifier: Apache-2.0
"""Models that ask in every block whether their mask hides anything, and repeat it for every head.

The question depends on data, so the graph breaks between where the tokens are made and where they attend: patches
frame by frame in one graph, rotary positions in others, attention in one that all layers share. Cross-attention runs
through the same code with other sizes. Open-Sora-Plan v1.2 is such a model;
benchmarks/models/open_sora_plan.py runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import randn
from torch import Tensor, nn

import rainfusion_compile

HEADS, HEAD_DIM, LAYERS = 2, 24, 3
WIDTH = HEADS * HEAD_DIM
GRID = (5, 11, 13)
pytestmark = pytest.mark.usefixtures("fixed_phases")
OPTIONS = {"min_tokens": 0, "error": 1.0, "sparsity": 0.7}


class Attention(nn.Module):
    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.asks = asks
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        batch = x.shape[0]
        context = x if context is None else context
        if mask is not None:  # [B, 1, keys] as [B * H, 1, keys], then [B, H, 1, keys]
            mask = mask.repeat_interleave(HEADS, dim=0).view(batch, HEADS, -1, mask.shape[-1])
        q, k, v = (
            layer(tokens).view(batch, -1, HEADS, HEAD_DIM).transpose(1, 2)
            for layer, tokens in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        if self.asks and (mask is None or not torch.any(mask.bool())):
            mask = None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, -1, WIDTH))


class Block(nn.Module):
    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn1, self.attn2 = Attention(asks), Attention(asks)
        self.ff = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask=mask)
        x = x + self.attn2(x, text, text_mask)
        return x + self.ff(self.norm2(x))


class Patches(nn.Module):
    """Frame by frame; a frame of Dynamo's own, as it gives up `Video.forward`, which breaks inside a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(4, WIDTH, 2, stride=2)

    def forward(self, latents: Tensor) -> Tensor:
        frames = self.proj(latents.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        return frames.unflatten(0, (latents.shape[0], -1)).flatten(1, 2)


class Video(nn.Module):
    """`asks`: whether it looks into its masks; without that, it is one graph."""

    def __init__(self, asks: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = Patches()
        self.blocks = nn.ModuleList(Block(asks) for _ in range(LAYERS))
        self.out = nn.Linear(WIDTH, 16)

    def forward(self, latents: Tensor, seen: Tensor, text: Tensor, text_seen: Tensor) -> Tensor:
        x = self.patch(latents)
        seen = F.max_pool3d(seen[:, None], (1, 2, 2), (1, 2, 2)).flatten(1)[:, None]
        mask, text_mask = ((1 - valid.bool().float()) * -10000.0 for valid in (seen, text_seen))
        for block in self.blocks:
            x = block(x, mask, text, text_mask)
        return self.out(x)


def inputs(grid: tuple[int, int, int] = GRID, *, hidden: bool, batch: int = 2) -> tuple[Tensor, ...]:
    """The last sample's right half is hidden, if anything is."""
    frames, height, width = grid[0], 2 * grid[1], 2 * grid[2]
    seen, text_seen = torch.ones(batch, frames, height, width), torch.ones(batch, 1, 9)
    if hidden:
        seen[-1, :, :, width // 2 :] = 0
        text_seen[-1, :, -4:] = 0
    return randn(batch, 4, frames, height, width), seen, randn(batch, 9, WIDTH, seed=1), text_seen


def run(compiled: Any, *args: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The output, and the attentions of the graphs that ran."""
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = compiled(*args)
    return out, report.to_dict()["attentions"]


def check_all_sparse(attentions: list[dict[str, Any]], grid: tuple[int, int, int]) -> None:
    """All layers went through sparse attention over this grid, and only cross-attention is dense."""
    sparse = [entry for entry in attentions if entry["status"] == "sparse"]
    assert {tuple(entry["grid"]) for entry in sparse} == {grid}
    assert sum(entry["calls"] for entry in sparse) == LAYERS
    for entry in attentions:
        assert entry["status"] == "sparse" or entry["reason"].endswith(" queries, 9 keys")


def plain_graphs_of(model: nn.Module, args: tuple[Tensor, ...]) -> int:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        torch.compile(model, backend="eager")(*args)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    # what other processes found to be dynamic must not decide what is tested here
    with torch._dynamo.config.patch(automatic_dynamic_local_pgo=False):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("hidden", [False, True])
def test_sparsity_zero_is_dense_in_as_many_graphs(hidden: bool):
    model, args = Video(), inputs(hidden=hidden)
    with torch.no_grad():
        dense = model(*args)
    torch._dynamo.utils.counters.clear()
    function = torch.compile(model, backend="rainfusion", options={**OPTIONS, "sparsity": 0.0})
    out, attentions = run(function, *args)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    check_all_sparse(attentions, GRID)
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)
    plain = plain_graphs_of(model, args)
    assert plain > 4  # it breaks in both attentions of a block; layers share their graphs
    assert graphs == plain


@pytest.mark.parametrize("hidden", [False, True])
def test_sparse_across_breaks_is_sparse_in_one_graph(hidden: bool):
    args = inputs(hidden=hidden)
    out, attentions = run(torch.compile(Video(), backend="rainfusion", options=OPTIONS), *args)
    check_all_sparse(attentions, GRID)
    assert all(density < 0.9 for entry in attentions for row in entry["density"] or () for density in row)
    torch._dynamo.reset()
    whole = torch.compile(Video(asks=False), backend="rainfusion", fullgraph=True, options=OPTIONS)
    expected, attentions = run(whole, *args)
    assert [entry["status"] for entry in attentions] == ["sparse", "dense"] * LAYERS
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [None, True])
def test_other_resolutions_of_the_same_model(dynamic: bool | None):
    """After the first resolution Dynamo makes sizes symbolic; what graphs pass on holds for those of the call."""
    model = Video()
    compiled = torch.compile(model, backend="rainfusion", dynamic=dynamic, options={**OPTIONS, "sparsity": 0.0})
    for grid in (GRID, (5, 13, 11), GRID):
        args = inputs(grid, hidden=True)
        with torch.no_grad():
            dense = model(*args)
        out, attentions = run(compiled, *args)
        check_all_sparse(attentions, grid)
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)
