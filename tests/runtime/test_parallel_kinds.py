# SPDX-License-Identifier: Apache-2.0
"""Kinds of parallelism on the CPU, by gloo: what each process does stands in `parallel_kinds`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import parallel_kinds
import pytest
import torch
from parallel_kinds import GRID
from sequence_parallel import Found

All = Sequence[dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> All:
    return parallel_kinds.run(parallel_kinds.of_two, str(tmp_path_factory.mktemp("two")), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> All:
    return parallel_kinds.run(parallel_kinds.of_four, str(tmp_path_factory.mktemp("four")), 4)


def check(one: Found) -> None:
    """All attentions are sparse, and the output is that of one process, which leaves something out."""
    assert one.grids == {GRID}
    assert not one.reasons
    assert one.error < 1e-6
    assert one.left_out > 1e-3


@pytest.mark.skipif(torch.__version__ < "2.13", reason="with torch 2.11 what is split as one sequence stays dense")
def test_text_and_video_that_are_split_together_are_sparse_as_in_one_process(two: All) -> None:
    for found in two:
        check(found["joint"])


@pytest.mark.skipif(torch.__version__ < "2.13", reason="with torch 2.11 what is split as one sequence stays dense")
def test_four_ranks_are_sparse_as_one_process(four: All) -> None:
    """Those in the middle have nothing but a run of the video."""
    for found in four:
        check(found["joint"])


def test_the_parallelism_of_diffusers_is_sparse_on_four_ranks(four: All) -> None:
    for found in four:
        check(found["diffusers"])


@pytest.mark.parametrize("name", ["joint, the other part", "joint, one part"])
def test_text_and_video_in_parts_of_other_ranks_stay_dense(two: All, name: str) -> None:
    for found in two:
        assert not found[name].grids
        (reason,) = found[name].reasons
        assert reason.startswith("tokens are reordered")


def test_a_block_by_itself_finds_the_grid_around_its_part_of_a_table(two: All) -> None:
    for found in two:
        check(found["tables"][0])


def test_a_part_of_a_table_that_is_a_copy_shows_no_grid(two: All) -> None:
    for found in two:
        assert not found["tables"][1].grids
        (reason,) = found["tables"][1].reasons
        assert reason.startswith("the order of tokens is lost at all_to_all_single")


@pytest.mark.skipif(torch.__version__ < "2.13", reason="gloo of torch 2.11 has no such form")
def test_collectives_in_their_list_form_are_outside_all_graphs(two: All) -> None:
    """Told, and sparse as in one process where the grid is."""
    for found in two:
        untold, told = found["lists"]
        assert not untold.grids
        assert all("outside all graphs" in reason for reason in untold.reasons)
        assert untold.reasons
        assert untold.error < 1e-6
        check(told)
