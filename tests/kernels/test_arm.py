# SPDX-License-Identifier: Apache-2.0
"""The ARM names the pattern of heads whose attention is known, tells the error it makes, and keeps to its budget."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import by_error, by_recall
from torch import Tensor

from benchmarks.attention.structured import structured_qk
from rainfusion_compile.kernels import operators, reference
from rainfusion_compile.kernels.cpu import choose_by_error
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import BY_NAME, DENSE, PATTERNS

KINDS = ("spatial", "temporal", "textural", "uniform")
BY_RECALL = {"spatial": "spatial", "temporal": "temporal", "textural": DENSE, "uniform": DENSE}
BY_ERROR = {"spatial": "spatial", "temporal": "temporal", "textural": "textural", "uniform": "textural"}


@pytest.mark.parametrize(("grid", "text"), [((9, 14, 18), (0, 0)), ((7, 18, 23), (40, 0)), ((8, 22, 16), (0, 77))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [by_error(0.05), by_recall(0.95, 0.8)], ids=["error", "recall"])
def test_arm_names_the_class_of_structured_heads(grid, text, dtype, rule):
    """By recall, a head that looks everywhere stays dense: a part holds no more than its share. By error, a sample of
    what is everywhere will do. Each head is a sample of its own, with all of the budget."""
    layout = VideoLayout(grid, text)
    tables = block_tables(layout, sparsity=0.5, patterns=PATTERNS, sampled=rule[0])
    kinds = KINDS * 6
    q, k = structured_qk(layout, kinds, head_dim=64, batch=2)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)) + 1
    alone = (x.transpose(0, 1).flatten(0, 1)[:, None].to(dtype) for x in (q, k, v))
    choice, errors, recall = operators.arm_probe(*alone, None, *tables.probe_arguments, 64**-0.5, *rule)
    names = (*tables.patterns, DENSE)
    wanted = [(BY_ERROR if rule[0] else BY_RECALL)[kind] for kind in kinds for _ in range(2)]
    right = [names[c] == want for c, want in zip(choice.flatten().tolist(), wanted, strict=True)]
    assert sum(right) >= 0.95 * len(right), (choice, errors, recall, tables.patterns)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_predicted_error_is_that_of_many_draws(name):
    """The squared error of the sampled queries' outputs, on average over phases; one draw is near to it too."""
    layout, scale = VideoLayout((9, 14, 18), (0, 20)), 0.15
    tables = block_tables(layout, sparsity=0.6 if name != "adaptive" else 0.4, patterns=(name,), block_q=32, block_k=16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, layout.tokens, 32, generator=generator) for _ in range(3))
    _, errors, _ = operators.arm_probe(q, k, v, None, *tables.probe_arguments, scale, *by_error(0.1))
    exact = reference.arm_errors(q, k, v, None, tables.probe_arguments, scale)[0]
    dense = F.scaled_dot_product_attention(q, k, v, scale=scale)
    middle, samples = int(tables.order[layout.tokens // 2]), tables.samples.long()
    samples = samples[samples != middle]
    choice, made = torch.zeros(1, 8, dtype=torch.int32), []
    for _ in range(24):
        q[:, :, middle] = torch.randn(1, 8, 32, generator=generator)
        out = operators.block_sparse_attention(q, k, v, choice, None, *tables.attention_arguments, scale)
        made.append((out - dense)[:, :, samples].square().sum().item() * len(tables.samples) / len(samples))
    mean = sum(made) / len(made)
    assert exact[..., 0].sum().item() == pytest.approx(mean, rel=0.25)
    assert errors[..., 0].sum().item() == pytest.approx(mean, rel=0.25)
    assert min(made) > 0.5 * mean
    assert max(made) < 2 * mean


def summed(choice: Tensor, each: Tensor) -> Tensor:
    """Of each sample: what its heads' choices come to, of ``each [B, H, P + 1]``."""
    return each.gather(-1, choice[..., None].long()).squeeze(-1).sum(1)


@st.composite
def measured(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Errors ``[B, H, P + 1]`` that mostly fall with density, and densities ``[P]``."""
    batch, heads, patterns = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = torch.rand(patterns, generator=generator).sort().values
    energy = 10 ** (3 * torch.rand(batch, heads, 1, generator=generator))
    errors = energy * (1 - density) * 10 ** -(3 * torch.rand(batch, heads, patterns, generator=generator))
    errors[torch.rand(errors.shape, generator=generator) < 0.1] = draw(st.sampled_from([0.0, float("inf")]))
    return torch.cat([errors, energy], -1), density


@given(measured(), st.sampled_from([0.0, 0.03, 0.1, 0.3, 1.0]))
def test_choices_keep_to_the_budget_and_drop_about_as_much_as_any_that_do(given_errors, error):
    errors, density = given_errors
    squares, cost = F.pad(errors[..., :-1], (0, 1)), F.pad(density, (0, 1), value=1.0)
    choice = choose_by_error(errors, density, error)
    budget = error**2 * errors[..., -1].sum(1)
    assert bool((summed(choice, squares) <= budget * (1 + 1e-5)).all())
    each_cost = cost.expand_as(squares)
    heads = errors.shape[1]
    every = torch.tensor(list(itertools.product(range(len(cost)), repeat=heads)), dtype=torch.int32)
    for own, spent, most, taken in zip(
        squares, summed(choice, squares), budget, summed(choice, each_cost), strict=True
    ):
        paid = summed(every, own.expand(len(every), -1, -1))
        kept = cost[every.long()].sum(1)
        best = float(kept[paid <= most * (1 + 1e-5)].min())
        assert best - 1e-5 <= float(taken) <= best + float(1 - density[0]), "within one head's step of the best"
        # No head alone could drop more: the budget is used up.
        single = own - own.gather(-1, choice[0][:, None].long()) if len(squares) == 1 else None
        if single is not None:
            cheaper = each_cost[0] < each_cost[0].gather(-1, choice[0][:, None].long()) - 1e-5
            assert not bool((cheaper & (single < (most - spent) * (1 - 1e-4) - 1e-6)).any())


@given(measured())
def test_without_a_budget_only_what_is_exact_is_taken(given_errors):
    errors, density = given_errors
    choice = choose_by_error(errors, density, 0.0)
    exact = F.pad(errors[..., :-1], (0, 1)) == 0
    sparsest = torch.where(exact, F.pad(density, (0, 1), value=1.0), 2.0).argmin(-1)
    assert torch.equal(choice, sparsest.int())


def test_more_error_means_less_work():
    """On average over heads as they come: what is left of a budget may go to one large step instead of two."""
    generator = torch.Generator().manual_seed(0)
    density = torch.tensor([0.2, 0.35, 0.5, 0.7])
    energy = 10 ** (2 * torch.rand(64, 12, 1, generator=generator))
    errors = energy * (1 - density) * 10 ** -(3 * torch.rand(64, 12, 4, generator=generator))
    errors = torch.cat([errors, energy], -1)
    cost = F.pad(density, (0, 1), value=1.0).expand_as(errors)
    work = [summed(choose_by_error(errors, density, x), cost) for x in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 2.0)]
    for less, more in itertools.pairwise(work):
        assert bool((more <= less + 0.3).all()), "by no more than a part of one head's step"
        assert float(more.mean()) < float(less.mean())
    assert torch.equal(work[0], torch.full((64,), 12.0))
    torch.testing.assert_close(work[-1], torch.full((64,), 12 * 0.2))


def test_each_sample_of_a_batch_has_its_own_budget_and_heads_share_it():
    density = torch.tensor([0.5])
    errors = torch.tensor([[[0.5, 1.0], [4.0, 1e3]], [[0.5, 1.0], [4.0, 1.0]]])
    assert choose_by_error(errors, density, 0.1).tolist() == [[0, 0], [1, 1]]
    assert choose_by_error(errors, density, 0.5).tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 0.0])
def test_heads_that_tell_nothing_stay_dense(wrong):
    errors = torch.tensor([[[0.1, wrong], [0.1, 10.0]]])
    assert choose_by_error(errors, torch.tensor([0.5]), 1.0).tolist() == [[1, 0]]


@settings(max_examples=12)
@given(measured(), st.sampled_from([0.0, 0.1, 0.5]))
def test_triton_chooses_the_same(given_errors, error):
    errors, density = given_errors
    assert torch.equal(choose(errors, density, error), choose_by_error(errors, density, error))


@settings(max_examples=60)
@given(measured(), st.sampled_from([0.0, 0.1, 0.5]), st.floats(0.0, 0.4), st.randoms(use_true_random=False))
def test_what_rounding_spends_is_not_there_for_dropping(given_errors, error, most, random):
    """Rounding costs every candidate, and dense attention, as much: what all heads take fits, or all are dense."""
    errors, density = given_errors
    energy = errors[..., -1]
    rounding = energy * most**2 * random.random()
    choice = choose(torch.cat([errors[..., :-1] + rounding[..., None], errors[..., -1:]], -1), density, error, rounding)
    sound = (energy > 0) & energy.isfinite()
    squares = torch.cat([errors[..., :-1] + rounding[..., None], rounding[..., None]], -1)
    spent = torch.where(sound, squares.gather(-1, choice.long()[..., None])[..., 0], 0.0).sum(1)
    total = torch.where(sound, energy, 0.0).sum(1)
    dense = (choice == len(density)).all(1)
    assert ((spent <= error**2 * total * (1 + 1e-5)) | dense).all()
    assert dense[torch.where(sound, rounding, 0.0).sum(1) > error**2 * total * (1 + 1e-5)].all()


def choose(errors, density, error, rounding=None):
    """The choice of the Triton kernel."""
    pytest.importorskip("triton")
    from rainfusion_compile.kernels.gpu.measure import choose_kernel

    if torch.cuda.is_available():
        pytest.skip("the kernel's own tests run on the device")
    batch, heads, _ = errors.shape
    choice, recall = torch.empty(batch, heads, dtype=torch.int32), torch.empty_like(errors[..., :-1])
    choose_kernel[(batch,)](
        errors, recall, rounding, density, torch.tensor([[error, 0.0]]), choice, heads, 0, 1,
        PATTERNS=len(density), CANDIDATES=16, HEADS=4, BY_ERROR=True,
    )  # fmt: skip
    return choice
