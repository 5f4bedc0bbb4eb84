# SPDX-License-Identifier: Apache-2.0
"""Weights spread over two processes on the CPU, by gloo: what each does stands in `spread_weights`."""

from __future__ import annotations

from pathlib import Path

import pytest
import spread_weights
import torch
from processes import run_ranks
from spread_weights import GRID, WAYS, Found

All = list[dict[str, Found]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> All:
    """What each rank found, by how weights were spread."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    run_ranks(spread_weights.work, lambda rank: (rank, str(folder)), seconds=600)
    return [torch.load(folder / str(rank), weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("name", WAYS)
def test_attention_is_sparse_as_in_one_process(both: All, name: str) -> None:
    if name.startswith("split_heads") and torch.__version__ < "2.13":
        pytest.skip("with torch 2.11 heads that DTensors split stay dense")
    for found in both:
        one = found[name]
        assert (one.grids, one.reasons) == ({GRID}, set())
        assert one.error < 1e-6
        assert one.left_out > 1e-3


def test_a_part_of_the_tokens_is_none_of_a_grid(both: All) -> None:
    """Not even where it is as long as two frames."""
    for found in both:
        one = found["part of tokens"]
        assert not one.grids
        (reason,) = one.reasons
        assert "to_local (S(1))" in reason
