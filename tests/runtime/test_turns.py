# SPDX-License-Identifier: Apache-2.0
"""Grids read off rotary tables whose angles mix frame, row and column: the right one, or none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import Grid, randn
from torch import Tensor, nn

import rainfusion_compile
from rainfusion_compile.runtime.turns import read_turns

pytestmark = pytest.mark.usefixtures("fixed_phases", "fresh_dynamo")
OPTIONS = {"min_tokens": 0, "error": 1.0, "sparsity": 0.7}
GRIDS: tuple[Grid, ...] = ((4, 6, 10), (4, 10, 6))  # as many tokens


def places(grid: Grid, begin: tuple[float, float, float] = (0.0, 0.5, 0.5)) -> Tensor:
    """Frame, row and column of each token, ``[T, H, W, 3]``; of `begin`, which share of an axis lies before 0."""
    axes = (torch.arange(float(size)) - share * (size - 1) for size, share in zip(grid, begin, strict=True))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def turns(places: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[tokens, heads, 8]`` of angles of which each mixes the three coordinates."""
    angles = torch.einsum("tc,chf->thf", places.flatten(0, 2), 0.3 * randn(3, 2, 8, seed=seed))
    return angles.cos(), angles.sin()


grids = st.tuples(st.integers(1, 6), st.integers(2, 9), st.integers(2, 9))


@given(grids, st.integers(0, 20), st.booleans())
def test_every_grid_is_read(grid: Grid, seed: int, heads_first: bool) -> None:
    cosines, sines = turns(places(grid), seed)
    if heads_first:
        cosines, sines = cosines.transpose(0, 1), sines.transpose(0, 1)
    if cosines.shape.count(cosines.shape[int(heads_first)]) == 1 and grid[1] * grid[2] * grid[0] > 8:
        assert read_turns(cosines, sines) == (int(heads_first), grid)
        assert read_turns(cosines, -sines) == (int(heads_first), grid)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "frames backwards": lambda x: x.flip(0),
    "rows before frames": lambda x: x.transpose(0, 1),
    "columns before frames": lambda x: x.movedim(2, 0),
    "frames innermost": lambda x: x.movedim(0, 2),
    "two frames swapped": lambda x: x[[0, 2, 1, 3]],
    "two rows swapped": lambda x: x[:, [0, 2, 1, 3, 4, 5]],
    "rows to and fro": lambda x: torch.stack([x[:, i] if i % 2 else x[:, i].flip(1) for i in range(6)], 1),
    "a frame less": lambda x: x[1:],
    "a column less": lambda x: x[:, :, 1:],
    "a token twice": lambda x: torch.cat([x[:, :, :1], x], 2),
    "columns rolled": lambda x: x.roll(1, 2),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_order_is_not_read(other: str) -> None:
    assert read_turns(*turns(OTHERS[other](places(GRIDS[0])))) is None


def test_what_is_no_pair_or_tells_too_little() -> None:
    cosines, sines = turns(places(GRIDS[0]))
    assert read_turns(cosines, sines) == (0, GRIDS[0])
    for one, two in (
        (sines, cosines),
        (cosines, cosines),
        (cosines, sines.double()),
        (cosines, sines[1:]),
        (cosines.bfloat16(), sines.bfloat16()),  # too coarse
        (torch.ones_like(cosines), torch.zeros_like(sines)),
        (torch.full_like(cosines, torch.nan), sines),
        (cosines[:0], sines[:0]),
        (cosines.flatten(), sines.flatten()),
    ):
        assert read_turns(one, two) is None
    assert read_turns(*turns(places(GRIDS[0], (0.0, 0.0, 0.0)))) is None  # nothing says which of them is time
    assert read_turns(*turns(places(GRIDS[0], (0.5, 0.5, 0.5)))) is None
    assert read_turns(cosines, sines, min_tokens=241) is None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        q, k = (self.turned(y, cosines, sines) for y in (q, k))
        return x + self.out(
            F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2).flatten(2)
        )

    def turned(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        one, two = x[..., 0::2], x[..., 1::2]
        return torch.stack([one * cosines - two * sines, one * sines + two * cosines], -1).flatten(-2)


def test_blocks_alone_are_sparse_over_the_grid_of_each_call() -> None:
    block, outs = Block(), {}
    function = torch.compile(block, backend="rainfusion", options=OPTIONS)
    everything = torch.compile(Block(), backend="rainfusion", options={**OPTIONS, "sparsity": 0.0})
    x, tables = randn(1, 240, 32), [table.clone() for table in turns(places(GRIDS[0]))]

    def call(function: Callable[..., Tensor]) -> tuple[Tensor, Grid | None]:
        with torch.no_grad(), rainfusion_compile.observe() as report:
            out = function(x, *tables)
        (entry,) = report.to_dict()["attentions"]
        return out, tuple(entry["grid"]) if entry["status"] == "sparse" else None

    wrong = turns(places(GRIDS[0]).flip(0))
    for grid, new in (*((grid, turns(places(grid))) for grid in (*GRIDS, *GRIDS)), (None, wrong)):
        for table, numbers in zip(tables, new, strict=True):
            table.copy_(numbers)  # into the tensors that were read before
        out, found = call(function)
        assert found == grid
        torch.testing.assert_close(out, outs.setdefault(grid, out))
        with torch.no_grad():
            dense = block(x, *tables)
        torch.testing.assert_close(call(everything)[0], dense)
        assert torch.allclose(out, dense, atol=1e-5) == (grid is None)
    for table, numbers in zip(tables, turns(places(GRIDS[0])), strict=True):
        table.copy_(numbers)
    assert call(function)[1] == GRIDS[0]
    tables[1].neg_()  # cosines as they were
    tables[1][7] += 1
    assert call(function)[1] is None
