# SPDX-License-Identifier: Apache-2.0
"""Triton's probe, and what it chooses, against a reference, under the interpreter or on the GPU if there is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from strategies import by_error, by_recall, chosen_by_recall

pytest.importorskip("triton")

from random_tables import BY_RECALL, DEVICE, Rule, check_probe, make_mask, make_qkv, make_tables

from rainfusion_compile.kernels.cpu import choose_by_error
from rainfusion_compile.kernels.gpu import probe as triton_probe
from rainfusion_compile.kernels.gpu.configs import LaunchConfig


@pytest.mark.parametrize("kind", [None, "bool batch", "bool heads", "bias32 one", "bias16 batch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_and_recall(kind: str | None, dtype: torch.dtype):
    t = make_tables(150, 32, 32)
    q, k, v = make_qkv(2, 2, 1, 150, 32, dtype)
    mask = None if kind is None else make_mask(kind, 2, 2, 150)
    check_probe(t, t.probe(q, k, v, mask, 0.3, config=None), q, k, v, mask, 0.3)


@pytest.mark.parametrize("kind", [None, "bias32 one", "bool heads"])
@pytest.mark.parametrize("excess", [-1.0, 0.0, 7.5])
def test_errors_of_what_is_dropped_read_and_sampled(excess: float, kind: str | None):
    t = make_tables(150, 32, 32)
    t.excess.fill_(excess)
    q, k, v = make_qkv(2, 2, 1, 150, 32, torch.float32)
    mask = None if kind is None else make_mask(kind, 2, 2, 150)
    probed = t.probe(q, k, v, mask, 0.3)
    check_probe(t, probed, q, k, v, mask, 0.3)
    assert bool((probed[1][..., :-1] > 0).all()) == (excess != 0), "a sample of all keys makes no error"


@pytest.mark.parametrize("kind", [None, "bool batch", "bool heads", "bias32 one"])
@pytest.mark.parametrize("excess", [-1.0, 7.5])
@pytest.mark.parametrize(
    ("stride", "block", "tile", "splits"), [(2, 32, 16, 1), (2, 32, 32, 2), (4, 64, 64, 3), (2, 64, 16, 2)]
)
def test_errors_and_recall_by_a_part_of_the_keys(stride, block, tile, splits, excess, kind):
    """Several blocks in a tile, a block in several tiles, or one each."""
    t = make_tables(350, 32, block, stride=stride)
    t.excess.fill_(excess)
    q, k, v = make_qkv(2, 2, 1, 350, 32, torch.float32)
    mask = None if kind is None else make_mask(kind, 2, 2, 350)
    config = LaunchConfig(32, tile, num_warps=4, num_stages=2)
    check_probe(t, t.probe(q, k, v, mask, 0.3, config=config, splits=splits), q, k, v, mask, 0.3)


@pytest.mark.parametrize(("dim", "patterns"), [(40, 1), (64, 3), (72, 2), (96, 5), (128, 8), (256, 30)])
def test_probe_head_dims_and_candidate_counts(dim: int, patterns: int):
    t = make_tables(130, 32, 16, patterns=patterns)
    q, k, v = make_qkv(1, 2, 1, 130, dim, torch.float32)
    check_probe(t, t.probe(q, k, v, None, dim**-0.5), q, k, v, None, dim**-0.5)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_probe_before_and_in_padding(bias: bool, splits: int):
    """Each sample and head is masked from another place on: within a split, at its edge, from the start, nowhere."""
    t = make_tables(250, 32, 32)
    q, k, v = make_qkv(2, 2, 2, 250, 32, torch.float32)
    mask = torch.ones(2, 2, 250, dtype=torch.bool, device=DEVICE)
    for one, first in zip(mask.flatten(0, 1), (150, 64, 1, 250), strict=True):
        one[t.order[first:].long()] = False
    key_mask = torch.where(mask, 0.0, float("-inf")) if bias else mask
    probed = t.probe(q, k, v, key_mask, 0.3, splits=splits)
    check_probe(t, probed, q, k, v, key_mask, 0.3)
    k[~mask], v[~mask] = float("nan"), -9.0  # what padding holds changes nothing
    for now, before in zip(t.probe(q, k, v, key_mask, 0.3, splits=splits), probed, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize(("samples", "splits"), [(1, 1), (1, 7), (33, 1), (33, 9), (70, 2)])
def test_splits_and_sample_counts(samples: int, splits: int):
    t = make_tables(200, 32, 32, samples=samples)
    q, k, v = make_qkv(1, 2, 2, 200, 32, torch.float32)
    check_probe(t, t.probe(q, k, v, None, 0.3, splits=splits), q, k, v, None, 0.3)


@pytest.mark.parametrize(
    ("programs", "tiles", "resident", "splits"),
    [
        (24, 1861, 264, 11),  # as many programs as run at a time
        (80, 1182, 396, 4),
        (1, 4096, 264, 64),  # at most MAX_SPLITS
        (1, 10, 264, 3),  # each of about four tiles
        (1000, 1861, 264, 1),  # more heads than programs run at a time
        (24, 1861, 0, 3),  # no GPU
    ],
)
def test_over_how_many_programs_keys_are_split(programs: int, tiles: int, resident: int, splits: int):
    assert triton_probe._split_count(programs, tiles, resident) == splits


@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_probe_of_short_sequences(tokens: int):
    t = make_tables(tokens, 16, 16, extra=0)
    q, k, v = make_qkv(1, 1, 1, tokens, 32, torch.float32)
    check_probe(t, t.probe(q, k, v, None, 0.3), q, k, v, None, 0.3)


@pytest.mark.parametrize("limits", [(0.95, 0.2), (0.5, 0.2), (0.4, 0.45), (0.0, 0.0), (0.95, 0.99)])
def test_choice_by_recall(limits: tuple[float, float]):
    t = make_tables(90, 32, 32, patterns=3)
    q, k, v = make_qkv(2, 2, 2, 90, 32, torch.float32)
    choice, _, recall = t.probe(q, k, v, None, 0.3, by_recall(*limits))
    assert choice.dtype == torch.int32
    assert choice.tolist() == [[chosen_by_recall(r, True, *limits) for r in sample] for sample in recall.tolist()]


@pytest.mark.parametrize("error", [0.0, 0.5, 10.0])
def test_choice_by_error(error: float):
    t = make_tables(90, 32, 32, patterns=3)
    q, k, v = make_qkv(1, 4, 2, 90, 32, torch.float32)
    choice, errors, _ = t.probe(q, k, v, None, 0.3, by_error(error))
    assert choice.dtype == torch.int32
    assert torch.equal(choice.cpu(), choose_by_error(errors.cpu(), t.density.cpu(), error))
    taken = F.pad(errors[..., :-1], (0, 1)).gather(-1, choice[..., None].long()).sum((1, 2))
    assert bool((taken <= 1.0001 * error**2 * errors[..., -1].sum(1)).all())
    dense = choice == t.patterns
    assert bool(dense.all()) if error == 0 else not bool(dense.any()) if error == 10 else True


def test_choice_at_the_edges_of_the_rule():
    t = make_tables(90, 32, 32, patterns=3)
    q, k, v = make_qkv(1, 1, 1, 90, 32, torch.float32)
    t.excess.fill_(-1)
    t.sample_keep.fill_(0b1110)  # candidates 1 and 2 keep everything, 0 nothing
    choice, errors, recall = t.probe(q, k, v, None, 0.3, by_recall(0.95, 0.2))
    assert recall.tolist() == [[[0.0, 1.0, 1.0]]]  # whole sums are exact
    assert errors[0, 0, 1:3].tolist() == [0.0, 0.0]
    assert choice.item() == 1
    assert t.probe(q, k, v, None, 0.3, by_error(0.0))[0].item() == 1  # what makes no error, even without any budget
    t.sample_keep.fill_(0b1000)
    assert t.probe(q, k, v, None, 0.3, by_recall(0.95, 0.0))[0].item() == 0  # a tie: the first
    assert t.probe(q, k, v, None, 0.3, by_recall(0.95, 0.1))[0].item() == 3  # the guard: dense
    assert t.probe(q, k, v, None, 0.3, by_error(0.5))[0].item() == 3


@pytest.mark.parametrize("rule", [by_recall(0.0, 0.0), by_error(10.0)])
def test_no_sample_left_means_dense(rule: Rule):
    t = make_tables(100, 32, 32)
    q, k, v = make_qkv(2, 2, 2, 100, 32, torch.float32)
    mask = torch.ones(2, 1, 100, dtype=torch.bool, device=DEVICE)
    mask[1, 0, t.samples.long()] = False
    choice, errors, recall = probed = t.probe(q, k, v, mask, 0.3, rule)
    assert choice.tolist() == [[0, 0], [t.patterns] * 2]
    assert max(recall[1].abs().max(), errors[1].abs().max()) == 0
    check_probe(t, probed, q, k, v, mask, 0.3)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_heads_whose_output_is_no_number_stay_dense(wrong: float):
    t = make_tables(100, 32, 32)
    q, k, v = make_qkv(1, 2, 2, 100, 32, torch.float32)
    v[:, 0, 7] = wrong
    for rule in (BY_RECALL, by_error(10.0)):
        choice, errors, _ = t.probe(q, k, v, None, 0.3, rule)
        assert choice[0, 0] == t.patterns
        assert choice[0, 1] < t.patterns
        if rule[0]:
            assert torch.equal(choice.cpu(), choose_by_error(errors.cpu(), t.density.cpu(), 10.0))
