# SPDX-License-Identifier: Apache-2.0
"""Models that break into several graphs, and blocks compiled by themselves: the right grid on every call, or dense."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import randn
from torch import Tensor, nn

import rainfusion_compile
from rainfusion_compile.report import Report

GRIDS = ((4, 6, 10), (4, 10, 6))  # as many tokens
pytestmark = pytest.mark.usefixtures("fixed_phases", "fresh_dynamo")
OPTIONS = {"min_tokens": 0, "error": 1.0, "sparsity": 0.7}


class Block(nn.Module):
    def __init__(self, breaks: str = "") -> None:
        super().__init__()
        self.breaks = breaks
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        if "block" in self.breaks:
            torch._dynamo.graph_break()
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        if "attention" in self.breaks:
            torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y)


class Video(nn.Module):
    """Breaks where it is told to; `text` tokens before the video."""

    def __init__(self, breaks: str = "", *, text: int = 0, eager: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text, self.eager = text, eager
        self.patch = nn.Conv3d(4, 32, 1)
        self.blocks = nn.ModuleList(Block(breaks) for _ in range(2))

    def forward(self, latents: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.patch(latents).flatten(2).transpose(1, 2)
        if text is not None:
            x = torch.cat([text, x], 1)
        if self.eager:
            torch._dynamo.graph_break()
            x = remade(x)
        # No loop: Dynamo gives up a whole frame that breaks inside one, and then no graph sees the convolution.
        return self.blocks[1](self.blocks[0](x))


@torch._dynamo.disable
def remade(x: Tensor) -> Tensor:
    return x.flip(1).clone()


def latents(grid: tuple[int, int, int], batch: int = 1, seed: int = 0) -> Tensor:
    return randn(batch, 4, *grid, seed=seed)


@contextmanager
def watched() -> Iterator[Report]:
    with torch.no_grad(), rainfusion_compile.observe() as report:
        yield report


def grids(report: Report) -> set[Any]:
    """The grids that attention was sparse over, None where it was dense; blocks share their graphs."""
    entries = report.to_dict()["attentions"]
    assert entries
    return {tuple(entry["grid"]) if entry["status"] == "sparse" else None for entry in entries}


def whole(model: nn.Module, *args: Tensor) -> Tensor:
    """The same model in one graph, which shows its grid."""
    for block in model.blocks:  # type: ignore[union-attr]
        block.breaks = ""  # type: ignore[union-attr]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, options=OPTIONS)
    with torch.no_grad():
        return compiled(*args)


@pytest.mark.parametrize("breaks", ["block", "attention", pytest.param("block attention", marks=pytest.mark.inductor)])
def test_the_grid_crosses_graph_breaks(breaks: str):
    model = Video(breaks)
    compiled = torch.compile(model, backend="rainfusion", options=OPTIONS)
    outs = []
    for grid in (*GRIDS, *GRIDS):
        with watched() as report:
            outs.append(compiled(latents(grid)))
        assert grids(report) == {grid}
    for grid, first, second in zip(GRIDS, outs[:2], outs[2:], strict=True):
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, whole(model, latents(grid)))


def test_text_crosses_too():
    model = Video("block")
    compiled = torch.compile(model, backend="rainfusion", options=OPTIONS)
    with watched() as report:
        compiled(latents(GRIDS[0]), randn(1, 7, 32))
    assert grids(report) == {GRIDS[0]}
    assert {tuple(entry["text"]) for entry in report.to_dict()["attentions"]} == {(7, 0)}


def test_other_frame_counts_and_classifier_free_guidance():
    compiled = torch.compile(Video("block"), backend="rainfusion", options=OPTIONS)
    for grid, batch in (((4, 6, 10), 1), ((7, 6, 10), 1), ((4, 10, 6), 2), ((4, 6, 10), 2)):
        with watched() as report:
            compiled(latents(grid, batch))
        assert grids(report) == {grid}


def test_tensors_that_others_made_carry_nothing():
    model = Video("block", eager=True)
    compiled = torch.compile(model, backend="rainfusion", options=OPTIONS)
    with watched() as report:
        out = compiled(latents(GRIDS[0]))
    assert grids(report) == {None}
    assert "grid" in report.to_dict()["attentions"][0]["remedy"]
    with torch.no_grad():
        torch.testing.assert_close(out, model(latents(GRIDS[0])))


def test_what_is_written_into_carries_nothing():
    patch = torch.compile(lambda x: model.patch(x).flatten(2).transpose(1, 2), backend="rainfusion", options=OPTIONS)
    model = Video()
    block = torch.compile(model.blocks[0], backend="rainfusion", options=OPTIONS)
    for write in (None, lambda x: x.copy_(x.flip(1)), lambda x: setattr(x, "data", x.flip(1)), Tensor.exp_):
        with watched() as report:
            x = patch(latents(GRIDS[0]))
            if write is not None:
                write(x)
            block(x)
        assert grids(report) == {GRIDS[0] if write is None else None}


def test_two_models_of_the_same_code_interleaved():
    one, two = (torch.compile(Video("block"), backend="rainfusion", options=OPTIONS) for _ in range(2))
    for _ in range(2):
        for model, grid in ((one, GRIDS[0]), (two, GRIDS[1])):
            with watched() as report:
                model(latents(grid))
            assert grids(report) == {grid}


def test_blocks_by_themselves_take_the_grid_of_the_context():
    model = Video()
    expected = {grid: whole(model, latents(grid)) for grid in GRIDS}
    with torch.no_grad():
        dense = model(latents(GRIDS[0]))
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="rainfusion", options=OPTIONS)
    for grid in (*GRIDS, *GRIDS):
        with watched() as report, rainfusion_compile.video_layout(grid):
            out = model(latents(grid))
        assert grids(report) == {grid}
        torch.testing.assert_close(out, expected[grid])
    with watched() as report:  # after the context, nothing is known
        out = model(latents(GRIDS[0]))
    assert grids(report) == {None}
    torch.testing.assert_close(out, dense)
    with watched() as report, rainfusion_compile.video_layout((3, 5, 7)):
        model(latents(GRIDS[0]))
    assert grids(report) == {None}
    assert "do not fit" in report.to_dict()["attentions"][0]["reason"]


def test_the_context_is_of_its_thread():
    model = Video()
    for block in model.blocks:
        block.compile(backend="rainfusion", options=OPTIONS)
    seen: dict[str, set[Any]] = {}

    def run(name: str) -> None:
        with watched() as report:
            model(latents(GRIDS[0]))
        seen[name] = grids(report)

    with rainfusion_compile.video_layout(GRIDS[0]):
        run("here")
        thread = threading.Thread(target=run, args=("there",))
        thread.start()
        thread.join()
    assert seen == {"here": {GRIDS[0]}, "there": {None}}


def test_dynamic_shapes():
    compiled = torch.compile(Video("block"), backend="rainfusion", dynamic=True, options=OPTIONS)
    for grid in (*GRIDS, (5, 6, 10), GRIDS[0]):
        with watched() as report:
            compiled(latents(grid))
        assert grids(report) == {grid}


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("breaks", ["", "block", "attention", "block attention"])
def test_no_compilations_beyond_the_usual_ones(breaks: str, dynamic: bool | None):
    graphs = {}
    for backend in ({"backend": "eager"}, {"backend": "rainfusion", "options": OPTIONS}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(automatic_dynamic_local_pgo=False):  # else the second learns from the first
            compiled = torch.compile(Video(breaks), dynamic=dynamic, **backend)
            for grid in (*GRIDS, (5, 6, 10), (7, 3, 8), GRIDS[0]):
                with watched() as report:
                    compiled(latents(grid))
                if backend["backend"] == "rainfusion":
                    assert grids(report) == {grid}
        graphs[backend["backend"]] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs["rainfusion"] == graphs["eager"]


def test_an_impossible_layout_is_an_error():
    with pytest.raises(ValueError, match="grid"), rainfusion_compile.video_layout((0, 1, 2)):
        pass
