# SPDX-License-Identifier: Apache-2.0
"""Tables of positions that one graph makes or reads, for attention that another one has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from found_grids import GRIDS, OPTIONS, call
from models import randn
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("fixed_phases", "fresh_dynamo")


@torch.compiler.disable
def nothing(*parts: Tensor) -> tuple[Tensor, ...]:
    return parts


class Turned(nn.Module):
    """A block whose queries and keys leave the graph after they were turned by a table, which is an input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        q, k = (part * cos + part.roll(8, -1) * sin for part in (q, k))
        q, k, v = nothing(q, k, v)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def angles(grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    places = torch.cartesian_prod(*(torch.arange(float(size)) for size in grid))
    turns = F.pad((places[:, :, None] * 1e4 ** -(torch.arange(4) / 4)).flatten(1), (0, 4))
    return turns.cos(), turns.sin()


class TableApart(nn.Module):
    """A table that one graph makes, queries and keys that another one turns, and attention in a third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        frames, rows, columns = (torch.arange(float(size))[:, None] * 1e2 ** -(torch.arange(4) / 4) for size in grid)
        parts = frames[:, None, None], rows[None, :, None], columns[None, None]
        turns = torch.cat([part.expand(*grid, -1) for part in parts], -1).flatten(0, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        torch._dynamo.graph_break()
        turns = F.pad(turns, (0, 4))
        q, k = (part * turns.cos() + part.roll(8, -1) * turns.sin() for part in (q, k))
        q, k, v = nothing(q, k, v)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_table_of_another_graph_does_not_part_queries_from_values() -> None:
    model = TableApart()
    everything = torch.compile(TableApart(), backend="rainfusion", options={**OPTIONS, "sparsity": 0.0})
    function = torch.compile(model, backend="rainfusion", options=OPTIONS)
    x, outs = randn(1, 385, 32), []
    for grid in (*GRIDS, GRIDS[0]):
        with torch.no_grad():
            dense = model(x, grid)
        out, found = call(function, x, grid)
        assert found == {grid}
        outs.append(out)
        out, found = call(everything, x, grid)
        assert found == {grid}
        torch.testing.assert_close(out, dense)
    torch.testing.assert_close(outs[0], outs[2])
    assert not torch.allclose(outs[0], outs[1], atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_graph_without_attention_reads_the_table_for_the_one_that_has_it(batch: int) -> None:
    model, outs = Turned(), {}
    function = torch.compile(model, backend="rainfusion", options=OPTIONS)
    everything = torch.compile(Turned(), backend="rainfusion", options={**OPTIONS, "sparsity": 0.0})
    for grid in (*GRIDS, *GRIDS):
        args = randn(batch, 385, 32), *angles(grid)
        with torch.no_grad():
            dense = model(*args)
        out, found = call(function, *args)
        assert found == {grid}
        torch.testing.assert_close(out, outs.setdefault(grid, out))
        out, found = call(everything, *args)
        assert found == {grid}
        torch.testing.assert_close(out, dense)
    assert not torch.allclose(outs[GRIDS[0]], outs[GRIDS[1]], atol=1e-5)


def test_a_table_that_is_written_into_and_one_that_shows_nothing() -> None:
    model = Turned()
    function = torch.compile(model, backend="rainfusion", options=OPTIONS)
    x, tables = randn(1, 385, 32), angles(GRIDS[0])
    for other, wanted in ((GRIDS[0], GRIDS[0]), (GRIDS[1], GRIDS[1]), (None, None), (GRIDS[0], GRIDS[0])):
        new = angles(other) if other else (randn(385, 16), randn(385, 16, seed=1))
        for table, numbers in zip(tables, new, strict=True):
            table.copy_(numbers)
        out, found = call(function, x, *tables)
        assert found == {wanted}
        if wanted is None:
            with torch.no_grad():
                torch.testing.assert_close(out, model(x, *tables))


def test_queries_of_one_table_and_keys_of_another_stay_dense() -> None:
    class Two(Turned):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            q, k, v = nothing(q * cos, k * sin, v)
            return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    x, tables = randn(1, 385, 32), (angles(GRIDS[0])[0], angles(GRIDS[1])[1])
    out, found = call(torch.compile(Two(), backend="rainfusion", options=OPTIONS), x, *tables)
    assert found == {None}
    with torch.no_grad():
        torch.testing.assert_close(out, Two()(x, *tables))
