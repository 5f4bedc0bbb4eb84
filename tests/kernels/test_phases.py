# SPDX-License-Identifier: Apache-2.0
"""Phases are drawn evenly, alike on all engines, and what is sampled is right on average over them."""

import pytest
import torch
import torch.nn.functional as F

from rainfusion_compile.kernels import operators
from rainfusion_compile.kernels.phases import draws
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import BY_NAME, PATTERNS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("phases", [2, 3, 7, 16])
def test_draws_are_even_and_differ_between_heads(dtype, phases):
    order = torch.arange(3, dtype=torch.int32)
    q = torch.randn(64, 64, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn = draws(q, order)
    assert bool(((drawn >= 0) & (drawn < 2**32)).all())
    share = torch.bincount((drawn % phases).flatten(), minlength=phases) / drawn.numel()
    torch.testing.assert_close(share, torch.full_like(share, 1 / phases), rtol=0, atol=0.02)
    assert len(drawn.unique()) > 0.99 * drawn.numel()


def test_draws_depend_on_the_middle_query_alone_and_not_on_its_sign():
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).int()
    q = torch.randn(2, 3, 9, 16)
    drawn, middle = draws(q, order), int(order[4])
    assert torch.equal(draws(-q, order), drawn)
    others = torch.randn_like(q)
    others[:, :, middle] = q[:, :, middle]
    assert torch.equal(draws(others, order), drawn)
    q[1, 2, middle, 0] += 1e-3  # as from one step to the next
    assert torch.equal(draws(q, order) != drawn, torch.tensor([[False] * 3, [False, False, True]]))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_the_mean_over_draws_comes_near_to_dense_attention(name, mask):
    layout = VideoLayout((9, 14, 18), (0, 20))
    tables = block_tables(layout, sparsity=0.7 if name != "adaptive" else 0.4, patterns=(name,), block_q=32, block_k=16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.tokens, 32, generator=generator) for _ in range(3))
    key_mask = {
        None: None,
        "bool": torch.rand(1, 1, layout.tokens, generator=generator) > 0.2,
        "additive": torch.randn(1, 1, layout.tokens, generator=generator),
    }[mask]
    bias = None if key_mask is None else key_mask[:, :, None]
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.2)
    middle = int(tables.order[layout.tokens // 2])
    others = torch.arange(layout.tokens) != middle
    choice, outs = torch.zeros(1, 2, dtype=torch.int32), []
    for _ in range(32):
        q[:, :, middle] = torch.randn(1, 2, 32, generator=generator)
        outs.append(
            operators.block_sparse_attention(q, k, v, choice, key_mask, *tables.attention_arguments, 0.2)[:, :, others]
        )
    each = torch.stack(outs) - dense[:, :, others]
    one, mean = each.square().mean().sqrt(), each.mean(0).square().mean().sqrt()
    assert float(one) > 0.02, "nothing was sampled"
    assert float(mean) < 0.35 * float(one)


def test_equal_inputs_draw_equal_phases():
    tables = block_tables(VideoLayout((9, 14, 18)), sparsity=0.7, patterns=PATTERNS)
    q, k, v = (torch.randn(1, 3, 9 * 14 * 18, 16) for _ in range(3))
    choice = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    args = (q, k, v, choice, None, *tables.attention_arguments, 0.25)
    first = operators.block_sparse_attention(*args)
    assert torch.equal(operators.block_sparse_attention(*args), first)
