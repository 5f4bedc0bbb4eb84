# SPDX-License-Identifier: Apache-2.0
"""``rainfusion_compile.attention``, for those who own their model code."""

import pytest
import torch
import torch.nn.functional as F

import rainfusion_compile


def qkv(tokens, heads=2, kv_heads=2, dim=32, batch=2):
    return tuple(torch.randn(batch, tokens, h, dim).permute(0, 2, 1, 3) for h in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize(
    ("grid", "text"), [((3, 9, 11), (0, 0)), ((1, 5, 7), (3, 2)), ((13, 1, 1), (0, 4)), ((1, 1, 1), (0, 0))]
)
def test_sparsity_zero_is_dense_attention(grid, text):
    q, k, v = qkv(grid[0] * grid[1] * grid[2] + sum(text))
    out = rainfusion_compile.attention(q, k, v, grid=grid, text=text, sparsity=0.0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_uniform_heads_stay_dense_and_exact():
    grid = (6, 16, 16)
    q, k, v = qkv(6 * 256)
    out = rainfusion_compile.attention(q * 0.1, k, v, grid=grid, sparsity=0.7, min_recall=0.9)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q * 0.1, k, v), rtol=1e-4, atol=1e-5)


def test_without_the_guard_uniform_heads_become_sparse():
    q, k, v = qkv(6 * 256)
    out = rainfusion_compile.attention(q * 0.1, k, v, grid=(6, 16, 16), sparsity=0.7, min_recall=0.0)
    assert not torch.allclose(out, F.scaled_dot_product_attention(q * 0.1, k, v), rtol=1e-2, atol=1e-3)


def test_key_mask_and_grouped_queries():
    q, k, v = qkv(2 * 5 * 7 + 9, heads=6, kv_heads=2)
    mask = torch.ones(2, 79, dtype=torch.bool)
    mask[0, 74:] = False
    out = rainfusion_compile.attention(q, k, v, grid=(2, 5, 7), text=(0, 9), key_mask=mask, sparsity=0.0, scale=0.3)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (2, 5, 8)}, r"grid \(2, 5, 8\) with text \(0, 0\) makes 80 tokens; q has 70"),
        ({"grid": (2, 5)}, "grid must be 3 integers"),
        ({"sparsity": 2.0}, "sparsity must be"),
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
