# SPDX-License-Identifier: Apache-2.0
"""``rainfusion_compile.attention``, for those who own their model code."""

import pytest
import torch
import torch.nn.functional as F

import rainfusion_compile
from rainfusion_compile.kernels import reference
from rainfusion_compile.sparsity.layout import VideoLayout


def qkv(tokens, heads=2, kv_heads=2, dim=32, batch=2):
    return tuple(torch.randn(batch, tokens, h, dim).permute(0, 2, 1, 3) for h in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize(
    ("grid", "text"), [((3, 9, 11), (0, 0)), ((1, 5, 7), (3, 2)), ((13, 1, 1), (0, 4)), ((1, 1, 1), (0, 0))]
)
def test_sparsity_zero_is_dense_attention(grid, text):
    q, k, v = qkv(grid[0] * grid[1] * grid[2] + sum(text))
    out = rainfusion_compile.attention(q, k, v, grid=grid, text=text, sparsity=0.0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


RULES = [{"arm": "recall", "min_recall": 0.9}, {"arm": "error"}, {"error": 0.0}]


@pytest.mark.parametrize("rule", RULES)
def test_uniform_heads_stay_dense_and_exact(rule):
    grid = (6, 16, 16)
    q, k, v = qkv(6 * 256)
    out = rainfusion_compile.attention(q * 0.1, k, v, grid=grid, sparsity=0.7, **rule)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q * 0.1, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [{"arm": "recall", "min_recall": 0.0}, {"error": 1.0, "patterns": ("textural",)}])
def test_without_the_guard_uniform_heads_become_sparse(rule):
    q, k, v = qkv(6 * 256)
    v = v + 0.2 * torch.ones(
        1, 2, 1, 1
    )  # of values that are zero on average, any sample is wrong by more than all of it
    out = rainfusion_compile.attention(q * 0.1, k, v, grid=(6, 16, 16), sparsity=0.7, **rule)
    assert not torch.allclose(out, F.scaled_dot_product_attention(q * 0.1, k, v), rtol=1e-2, atol=1e-3)


def test_key_mask_and_grouped_queries():
    q, k, v = qkv(2 * 5 * 7 + 9, heads=6, kv_heads=2)
    mask = torch.ones(2, 79, dtype=torch.bool)
    mask[0, 74:] = False
    out = rainfusion_compile.attention(q, k, v, grid=(2, 5, 7), text=(0, 9), key_mask=mask, sparsity=0.0, scale=0.3)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


GRID = (8, 12, 16)


def smooth(seed=0, heads=4, batch=2):
    """Tokens that move slowly over a video: ``q = k``, and values with a mean, so that sampled keys tell a lot."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.cartesian_prod(*(torch.arange(size) / size for size in GRID))  # [S, 3]
    waves = torch.randn(batch, heads, 3, 32, generator=generator) * 3
    x = torch.cos(place @ waves + torch.rand(batch, heads, 1, 32, generator=generator) * 6)
    return x * 0.3, x * 0.3, x + 0.5 + 0.1 * torch.randn(x.shape, generator=generator)


def relative(out, dense):
    """The output error of each sample, all heads together, ``[B]``."""
    squares = (out - dense).double().square().sum((1, 2, 3)), dense.double().square().sum((1, 2, 3))
    return (squares[0] / squares[1]).sqrt()


def test_the_budget_bounds_the_error_and_ladders_use_it():
    """A larger budget is spent, and is not exceeded by more than the probe's guess from 32 queries is wrong."""
    q, k, v = smooth()
    dense = F.scaled_dot_product_attention(q, k, v)
    errors = []
    for budget in (0.0, 0.05, 0.1, 0.3):
        out = rainfusion_compile.attention(q, k, v, grid=GRID, error=budget)
        errors.append(relative(out, dense))
        assert bool((errors[-1] <= 1.5 * budget + 1e-6).all()), (budget, errors[-1])
    assert bool((errors[-1] > 0.05).all()), errors
    assert bool((errors[-1] > errors[1]).all()), errors


@pytest.mark.parametrize("rule", [{"error": 0.3}, {"arm": "recall", "min_recall": 0.0, "recall_target": 0.6}])
@pytest.mark.parametrize("sparsity", [0.5, (0.8, 0.5), [0.35, 0.9, 0.6]])
def test_it_is_the_reference_at_the_operators_choice(sparsity, rule):
    """Every pattern at every rung of the ladder is a candidate, and the choice is that of the operator `arm_probe`."""
    q, k, v = smooth(seed=1)
    out = rainfusion_compile.attention(q, k, v, grid=GRID, sparsity=sparsity, **rule)
    options = rainfusion_compile.Options(sparsity=sparsity, **rule)
    tables = options.tables(VideoLayout(GRID))
    scale = 32**-0.5
    choice, *_ = torch.ops.rainfusion.arm_probe(q, k, v, None, *tables.probe_arguments, scale, *options.rule(q.device))
    assert bool((choice < len(tables.patterns)).any())  # something is sparse
    expected = reference.block_sparse_attention(q, k, v, choice, None, tables.attention_arguments, scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_text_and_grouped_queries_by_error(kind):
    """Samples of the keys honour them, too: what is hidden has no influence, and the rest is the reference's."""
    text, heads = (5, 9), 4
    q, k, v = (torch.cat([x[:, :, :5], x, x[:, :, :9]], dim=2) for x in smooth(seed=3, heads=heads))
    k, v = k[:, :2], v[:, :2]
    mask = torch.rand(2, 1, q.shape[2], generator=torch.Generator().manual_seed(0)) > 0.3
    mask = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    hidden = ~mask[0, 0] if kind == "bool" else mask[0, 0] < 0
    given = {"grid": GRID, "text": text, "key_mask": mask, "sparsity": (0.7, 0.5), "error": 0.3}
    out = rainfusion_compile.attention(q, k, v, **given)
    options = rainfusion_compile.Options(sparsity=(0.7, 0.5), error=0.3)
    tables, scale = options.tables(VideoLayout(GRID, text)), 32**-0.5
    choice, *_ = torch.ops.rainfusion.arm_probe(q, k, v, mask, *tables.probe_arguments, scale, *options.rule(q.device))
    assert bool((choice < len(tables.patterns)).any())  # something is sparse
    expected = reference.block_sparse_attention(q, k, v, choice, mask, tables.attention_arguments, scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    spoilt = v.clone()
    spoilt[0, :, hidden] += 100.0
    torch.testing.assert_close(rainfusion_compile.attention(q, k, spoilt, **given)[0], out[0])


def test_a_ladder_serves_each_head_at_least_as_well_as_one_sparsity():
    """By recall, a head takes the sparsest of all candidates that reach the target; of a ladder, there are more."""
    q, k, v = smooth(seed=2)
    rule = {"arm": "recall", "recall_target": 0.7, "min_recall": 0.0}

    def densities(sparsity):
        options = rainfusion_compile.Options(sparsity=sparsity, **rule)
        tables = options.tables(VideoLayout(GRID))
        arguments = (*tables.probe_arguments, 32**-0.5, *options.rule(q.device))
        choice, _, recall = torch.ops.rainfusion.arm_probe(q, k, v, None, *arguments)
        taken = recall.gather(-1, choice.long()[..., None])[..., 0]
        return torch.tensor(tables.densities)[choice.long()], taken >= 0.7

    ladder, reached = densities((0.8, 0.6, 0.35))
    for sparsity in (0.8, 0.6, 0.35):
        one, also = densities(sparsity)
        assert bool((reached | ~also).all())  # what one sparsity serves, the ladder does
        assert bool((ladder <= one)[also].all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (2, 5, 8)}, r"grid \(2, 5, 8\) with text \(0, 0\) makes 80 tokens; q has 70"),
        ({"grid": (2, 5)}, "grid must be 3 integers"),
        ({"sparsity": 2.0}, "sparsity must be"),
        ({"sparsity": (0.5, 2.0)}, r"sparsity must be a number in \[0, 1\), or several; got \(0.5, 2.0\)"),
        ({"sparsity": []}, "sparsity must be"),
        ({"arm": "mean"}, "arm must be one of 'error', 'recall'; got 'mean'"),
        ({"error": 2}, r"error must be a number in \[0, 1\]; got 2"),
        ({"error": 0.1, "arm": "recall"}, "error belongs to arm='error'; got error=0.1"),
        ({"min_recall": 0.1}, "min_recall belongs to arm='recall'; got min_recall=0.1"),
        ({"recall_target": 0.1}, "recall_target belongs to arm='recall'; got recall_target=0.1"),
        ({"patterns": ("radial",)}, "unknown pattern 'radial'"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, "key_mask must be"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    q, k, v = qkv(70)
    with pytest.raises(ValueError, match=message):
        rainfusion_compile.attention(q, k, v, **({"grid": (2, 5, 7)} | change))


def test_mixed_dtypes_and_heads_are_refused():
    q, k, v = qkv(70, heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 key heads"):
        rainfusion_compile.attention(q, k, v, grid=(2, 5, 7))
    q, k, v = qkv(70)
    with pytest.raises(ValueError, match="one dtype"):
        rainfusion_compile.attention(q.bfloat16(), k, v, grid=(2, 5, 7))


def test_gradients_are_refused_rather_than_lost():
    q, k, v = qkv(70)
    with pytest.raises(NotImplementedError, match="no gradient"):
        rainfusion_compile.attention(q.requires_grad_(), k, v, grid=(2, 5, 7))
    with torch.no_grad():
        rainfusion_compile.attention(q, k, v, grid=(2, 5, 7))


def test_a_call_does_not_list_inductors_options(monkeypatch: pytest.MonkeyPatch):
    """That takes milliseconds, more than attention itself on a GPU."""
    monkeypatch.setattr(torch._inductor, "list_options", lambda: pytest.fail("listed Inductor's options"))
    q = torch.randn(1, 2, 60, 16)
    assert rainfusion_compile.attention(q, q, q, grid=(3, 4, 5)).shape == q.shape


def test_sparsity_out_of_reach_is_told_once(caplog: pytest.LogCaptureFixture):
    q = torch.randn(1, 1, 2 * 20 * 20, 16)
    for _ in range(2):
        rainfusion_compile.attention(q, q, q, grid=(2, 20, 20), sparsity=0.9)
    assert len([record for record in caplog.records if "sparsity=0.9 is out of reach" in record.message]) == 1
