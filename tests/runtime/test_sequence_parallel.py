# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism in two processes on the CPU, by gloo: what each does stands in `sequence_parallel`."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sequence_parallel
import torch
import torch.distributed as dist
from processes import run_ranks
from sequence_parallel import GRIDS, ORDERS, TRUE, Found

from rainfusion_compile.passes.provenance import ranks

All = list[dict[str, list[Found]]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> All:
    """What each rank found, by what was done."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    run_ranks(sequence_parallel.work, lambda rank: (rank, str(folder)), seconds=900)
    return [torch.load(folder / str(rank), weights_only=False) for rank in (0, 1)]


def check(both: All, name: str, grids: tuple[tuple[int, int, int], ...], *, sparse: bool = True) -> None:
    """All attentions are sparse over these grids, and the output is that of one process; `sparse` leaves out some."""
    for found in both:
        assert [one.grids for one in found[name]] == [{grid} for grid in grids]
        assert all(not one.reasons and one.error < 1e-6 for one in found[name])
        assert all(one.left_out > 1e-3 if sparse else one.left_out < 1e-6 for one in found[name])


@pytest.mark.parametrize(("name", "grids"), [("by hand", GRIDS[::2]), ("by hand, any size", GRIDS[:2])])
def test_parts_that_the_graph_makes_are_sparse_as_in_one_process(
    both: All, name: str, grids: tuple[tuple[int, int, int], ...]
) -> None:
    check(both, name, grids)


def test_with_everything_kept_parts_are_dense_attention(both: All) -> None:
    check(both, "by hand, everything", GRIDS[:1], sparse=False)


@pytest.mark.parametrize(("how", "grids"), [("option", GRIDS[:1]), ("context", GRIDS[1:])])
def test_of_parts_that_are_made_outside_the_users_grid_is_believed(
    both: All, how: str, grids: tuple[tuple[int, int, int], ...]
) -> None:
    check(both, f"outside, {how}", grids)


def test_parts_that_are_made_outside_are_dense_by_themselves(both: All) -> None:
    for found in both:
        (one,) = found["outside, nothing"]
        (reason,) = one.reasons
        assert not one.grids
        assert reason.startswith("the order of tokens is lost at all_to_all_single")


def test_the_parallelism_of_diffusers_is_sparse_as_in_one_process(both: All) -> None:
    check(both, "diffusers", GRIDS[:1])
    check(both, "diffusers, everything", GRIDS[:1], sparse=False)


def test_layers_that_are_graphs_of_their_own_are_sparse_where_ranks_have_whole_frames(both: All) -> None:
    for found in both:
        (one,) = found["diffusers, compiled first"]
        assert (one.grids, one.reasons) == ({GRIDS[2]}, set())


@pytest.mark.parametrize("name", ORDERS)
def test_each_way_to_split_tokens_is_dense_or_of_the_true_grid(both: All, name: str) -> None:
    """Whatever the user says of them."""
    for found in both:
        for one in found[name]:
            assert one.grids == ({True} if name in TRUE else set())
            assert not any("cross-attention" in reason for reason in one.reasons)


def test_keys_of_another_rank_are_called_so(both: All) -> None:
    for found in both:
        for one in found["ring"]:
            assert not one.grids
            (reason,) = one.reasons
            assert reason.startswith("keys are another rank's part of the tokens, from tensor (all_gather")


# --- what ranks say to each other -----------------------------------------------------------------------------------


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    met = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: met)
    monkeypatch.setattr(ranks, "PATIENCE", 0.5)


def answers(parts: list[int | None]) -> list[bool | None]:
    """What each of several ranks hears if these are their parts; None for one that does not say."""
    heard: list[bool | None] = [None] * len(parts)

    def ask(rank: int, part: int) -> None:
        group = ranks.Group(rank, tuple(range(len(parts))))
        heard[rank] = group.each_has_its_own(part, torch.Size((2, 8)))

    threads = [threading.Thread(target=ask, args=(rank, part)) for rank, part in enumerate(parts) if part is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("parts", "heard"),
    [
        ([0, 1, 2, 3], [True] * 4),
        ([2, 1, 0], [False] * 3),  # the one in the middle has its own
        ([0, 2, 1, 3], [False] * 4),
        ([0, 0], [False] * 2),
        ([0, 1, None], [None] * 3),
    ],
)
def test_ranks_ask_one_another_which_parts_they_have(parts: list[int | None], heard: list[bool | None]) -> None:
    assert answers(parts) == heard


@pytest.mark.usefixtures("store")
def test_what_was_said_before_does_not_count_for_a_program_that_differs() -> None:
    assert answers([0, 1, 2, 3]) == [True] * 4
    assert answers([0, 2, 1, 3]) == [False] * 4
    assert answers([0, 1, 2, 3]) == [False] * 4
