# SPDX-License-Identifier: Apache-2.0
"""Blocks compiled by themselves, which learn the grid from the tables of positions that they are called with."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Grid, cogvideox, hunyuan_video, ltx, randn, wan
from position_tables import GRIDS, mesh, rotary
from torch import Tensor, nn

import rainfusion_compile

pytestmark = pytest.mark.usefixtures("fixed_phases", "fresh_dynamo")
OPTIONS = {"min_tokens": 0, "error": 1.0, "sparsity": 0.7}


class Block(nn.Module):
    """Self-attention whose queries and keys are turned by a rotary table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        q, k = (item * rotary[0] + item.roll(8, -1) * rotary[1] for item in (q, k))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def angles(grid: Grid) -> tuple[Tensor, Tensor]:
    turns = F.pad(rotary(mesh(grid).flatten(0, 2)), (0, 4))
    return turns.cos(), turns.sin()


def run(block: Any, grid: Grid, batch: int = 1, tables: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Any]:
    """The output, and the grid that it was sparse over; None if it was dense."""
    x = randn(batch, math.prod(grid), 32)
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = block(x, tables or angles(grid))
    (entry,) = report.to_dict()["attentions"]
    return out, tuple(entry["grid"]) if entry["status"] == "sparse" else None


def test_as_many_tokens_in_another_grid():
    block = torch.compile(Block(), backend="rainfusion", options=OPTIONS)
    outs = {}
    for grid in (*GRIDS, *GRIDS):
        out, found = run(block, grid)
        assert found == grid
        torch.testing.assert_close(out, outs.setdefault(grid, out))
    for grid in GRIDS:  # what a given grid gives
        torch._dynamo.reset()
        out, found = run(torch.compile(Block(), backend="rainfusion", options={**OPTIONS, "grid": grid}), grid)
        torch.testing.assert_close(out, outs[grid])


class Streams(Block):
    """Text and video as two inputs, in one attention under one table."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(32, 96)

    def forward(self, x: Tensor, text: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.text(text), self.qkv(x)], 1)
        q, k, v = both.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        q, k = (item * rotary[0] + item.roll(8, -1) * rotary[1] for item in (q, k))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + y[:, text.shape[1] :], text + y[:, : text.shape[1]]


@pytest.mark.parametrize("first", [0.0, 5.0])
@pytest.mark.parametrize("stream", ["one", "two"])
def test_a_table_of_text_and_video(stream: str, first: float):
    """As if grid and text were given; everything kept equals eager."""
    words = 13
    block = Block() if stream == "one" else Streams()
    for grid in GRIDS:
        turns = F.pad(rotary(torch.cat([torch.zeros(words, 3), mesh(grid).flatten(0, 2) + first])), (0, 4))
        tables, both = (turns.cos(), turns.sin()), randn(2, words + math.prod(grid), 32)
        args = (both, tables) if stream == "one" else (both[:, words:], both[:, :words], tables)
        outs = {}
        for name, more in {"shown": {}, "given": {"grid": grid, "text": (words, 0)}, "all": {"sparsity": 0.0}}.items():
            torch._dynamo.reset()
            with torch.no_grad(), rainfusion_compile.observe() as report:
                outs[name] = torch.compile(block, backend="rainfusion", options={**OPTIONS, **more})(*args)
            (entry,) = report.to_dict()["attentions"]
            assert (entry["status"], entry["grid"], entry["text"]) == ("sparse", [*grid], [words, 0])
        torch.testing.assert_close(outs["shown"], outs["given"])
        with torch.no_grad():
            torch.testing.assert_close(outs["all"], block(*args), rtol=1e-4, atol=1e-5)


def test_the_same_tables_with_new_numbers_in_them():
    block = torch.compile(Block(), backend="rainfusion", options=OPTIONS)
    tables = angles(GRIDS[0])
    assert run(block, GRIDS[0], tables=tables)[1] == GRIDS[0]
    for tensor, new in zip(tables, angles(GRIDS[1]), strict=True):
        tensor.copy_(new)
    assert run(block, GRIDS[1], tables=tables)[1] == GRIDS[1]


def test_tables_that_contradict_each_other_or_show_nothing_leave_attention_dense():
    block = torch.compile(Block(), backend="rainfusion", options=OPTIONS)
    (cos, _), (_, sin) = map(angles, GRIDS)
    assert run(block, GRIDS[0])[1] == GRIDS[0]
    for tables in ((cos, sin), (randn(240, 16), randn(240, 16, seed=1))):
        out, found = run(block, GRIDS[0], tables=tables)
        assert found is None
        torch.testing.assert_close(out, eager(tables))
    assert run(block, GRIDS[0])[1] == GRIDS[0]


def eager(tables: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return Block()(randn(1, 240, 32), tables)


def test_a_grid_that_the_table_contradicts_is_not_believed():
    block = torch.compile(Block(), backend="rainfusion", options=OPTIONS)
    with rainfusion_compile.video_layout(GRIDS[1]):
        assert run(block, GRIDS[0])[1] is None
    with rainfusion_compile.video_layout(GRIDS[0]):
        assert run(block, GRIDS[0])[1] == GRIDS[0]


def test_other_sizes_and_samples():
    block = torch.compile(Block(), backend="rainfusion", options=OPTIONS)
    for grid, batch in (((4, 6, 10), 1), ((7, 6, 10), 1), ((4, 10, 6), 2), ((1, 12, 20), 1), ((4, 6, 10), 2)):
        assert run(block, grid, batch)[1] == grid


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)], ids=["dynamic", "automatic"])
def test_a_block_is_not_compiled_again_for_every_resolution(dynamic: bool | None, graphs: int):
    torch._dynamo.utils.counters.clear()
    block = torch.compile(Block(), backend="rainfusion", dynamic=dynamic, options=OPTIONS)
    for grid in ((4, 6, 10), (7, 6, 10), (4, 10, 6), (1, 12, 20), (5, 7, 9), (4, 6, 10)):
        out, found = run(block, grid)
        assert found == grid
        assert out.isfinite().all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    out, found = run(block, (5, 7, 9), tables=(randn(315, 16), randn(315, 16, seed=1)))
    assert found is None


def test_blocks_after_blocks_are_the_same_call():
    """Though the last is made of what all before it are; the first is handed what no graph made."""
    torch._dynamo.utils.counters.clear()
    blocks, x = [Block() for _ in range(5)], randn(1, 240, 32)
    with torch.no_grad():
        for block in blocks:
            block.compile(backend="rainfusion", options=OPTIONS)
            x = block(x, angles(GRIDS[0]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._dynamo.utils.counters["rainfusion"]["graphs"] == 2


def test_the_inputs_of_the_first_call_are_not_kept():
    block = torch.compile(Block(), backend="rainfusion", options=OPTIONS)
    x = randn(1, 240, 32)
    seen = weakref.ref(x)
    with torch.no_grad():
        block(x, angles(GRIDS[0]))
    del x
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize(
    ("build", "dynamic"),
    [
        pytest.param(wan, False, marks=pytest.mark.inductor),
        (wan, True),
        (hunyuan_video, None),
        (ltx, None),
        (cogvideox, None),
    ],
)
def test_blocks_of_real_models(build: Any, dynamic: bool | None):
    grid = (3, 5, 7)
    case = build(grid, rotary=True) if build is cogvideox else build(grid)
    if build is cogvideox:
        places = mesh(grid).flatten(0, 2)
        turns = F.pad(rotary(places), (0, 4))
        case.inputs["image_rotary_emb"] = (turns.cos(), turns.sin())
    with torch.no_grad():
        dense = case.model(**case.inputs)[0]
    settings = {"backend": "rainfusion", "dynamic": dynamic, "options": {"min_tokens": 0, "sparsity": 0.0}}
    if getattr(case.model, "_repeated_blocks", None):
        case.model.compile_repeated_blocks(**settings)
    else:
        for block in case.model.transformer_blocks:
            block.compile(**settings)
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = case.model(**case.inputs)[0]
    entries = [entry for entry in report.to_dict()["attentions"] if entry["status"] == "sparse"]
    assert sum(entry["calls"] for entry in entries) == case.video
    assert {(tuple(entry["grid"]), tuple(entry["text"])) for entry in entries} == {(grid, case.text)}
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)
