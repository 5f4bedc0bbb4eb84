# SPDX-License-Identifier: Apache-2.0
"""Keys as integers, what rounding does to scores, and how the ARM counts it: in Triton's interpreter, or on a GPU."""

import pytest
import torch
from random_tables import DEVICE, make_tables
from strategies import by_error

from rainfusion_compile import Options
from rainfusion_compile.kernels import operators
from rainfusion_compile.kernels.gpu import configs, int8_keys
from rainfusion_compile.kernels.gpu.attention import block_sparse_attention


def make_keys(tokens=300, dim=128, dtype=torch.bfloat16, seed=0):
    """``[2, 3, S, D]`` in ``[B, S, H, D]`` memory; a head's keys have a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(2, tokens, 3, dim, generator=generator) + 2 * torch.randn(1, 1, 3, dim, generator=generator)
    return k.to(DEVICE, dtype).transpose(1, 2)


@pytest.mark.parametrize(("tokens", "dim"), [(300, 128), (31, 128), (2100, 64), (77, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_are_rounded_without_their_mean(tokens, dim, dtype):
    k = make_keys(tokens, dim, dtype)
    means, scales, lengths = int8_keys.key_scales(k)
    centred = k.float() - k.float().mean(2, keepdim=True)
    torch.testing.assert_close(means[..., :dim], k.float().mean(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scales, centred.abs().amax((2, 3)) / 127, rtol=1e-5, atol=0)
    torch.testing.assert_close(lengths, centred.square().sum(-1).mean(2), rtol=1e-4, atol=0)
    rounded, again = int8_keys.int8_keys(k)
    assert torch.equal(scales, again)
    assert rounded.shape == (2, 3, tokens, dim // 2)
    assert rounded.dtype == dtype
    steps = rounded.view(torch.int8).float()
    assert float((steps - centred / scales[..., None, None]).abs().max()) < 0.501
    assert steps.abs().amax((2, 3)).eq(127).all()


def test_keys_that_are_all_the_same_are_zeros_and_broken_ones_break_their_head_alone():
    k = make_keys()
    k[0, 1] = 3.0
    k[1, 2, 7, 5] = float("nan")
    k[1, 0, 9, 2] = float("inf")
    rounded, scales = int8_keys.int8_keys(k)
    assert not rounded.view(torch.int8)[0, 1].any()
    broken = torch.tensor([[False, False, False], [True, False, True]], device=DEVICE)
    assert torch.equal(scales.isnan(), broken)


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_the_variance_of_scores_is_foretold(size):
    k, scale = make_keys(3000), 0.1
    q = size * make_keys(3000, seed=1).repeat_interleave(2, 1)
    samples = torch.arange(0, 3000, 50, device=DEVICE, dtype=torch.int32)
    foretold = int8_keys.score_noise(q, k, samples, scale)
    assert foretold.shape == (2, 6, 60)
    rounded, scales = int8_keys.int8_keys(k)
    keys = (rounded.view(torch.int8).float() * scales[..., None, None]).repeat_interleave(2, 1)
    centred = (k.float() - k.float().mean(2, keepdim=True)).repeat_interleave(2, 1)
    rows = q[:, :, samples].float()
    steps = rows.abs().amax((2, 3), keepdim=True) / 127
    off = ((rows / steps).round() * steps) @ keys.transpose(2, 3) - rows @ centred.transpose(2, 3)
    true = (off * scale).square().mean(-1)
    ratio = foretold.sum(-1) / true.sum(-1)
    assert float(ratio.min()) > 0.75, ratio
    assert float(ratio.max()) < 1.35, ratio


def test_one_key_that_is_longer_than_all_others_makes_the_noise():
    k = make_keys(3000)
    samples = torch.arange(0, 3000, 50, device=DEVICE, dtype=torch.int32)
    usual = int8_keys.score_noise(k, k, samples, 0.1)
    k[:, :, 1001, 7] = 120.0
    assert bool((int8_keys.score_noise(k, k, samples, 0.1) > 50 * usual).all())


@pytest.mark.parametrize("patterns", [3, 15])  # as many candidates as leave no room beside them, too
def test_the_probe_adds_what_rounding_costs_to_every_candidate_and_to_dense_attention(patterns):
    tables = make_tables(200, 32, 32, patterns=patterns)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 4, 200, 64, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(3))
    outcome = {}
    for int8 in (False, True):
        tables.int8 = int8
        outcome[int8] = tables.probe(q, k, v, None, 0.3, by_error(0.3, DEVICE))
    choice, errors, recall = outcome[True]
    other, without, shares = outcome[False]
    assert torch.equal(recall, shares)
    assert torch.equal(errors[..., -1], without[..., -1])
    more = (errors - without)[..., :-1]
    noise = int8_keys.score_noise(q, k, tables.samples, 0.3)
    rows = q.index_select(2, tables.samples).double()
    mass = (rows @ k.double().transpose(2, 3) * 0.3).softmax(-1)
    output = mass @ v.double()
    spread = (mass.square()[..., None] * (v.double()[:, :, None] - output[:, :, :, None]).square()).sum((3, 4))
    meant = (noise * spread).sum(-1)
    # values are seen in 14 directions
    torch.testing.assert_close(more, meant[..., None].float().expand_as(more), rtol=0.4, atol=0)
    torch.testing.assert_close(more, more[..., :1].expand_as(more), rtol=0.02, atol=1e-4)
    density = torch.cat([tables.density, tables.density.new_ones(1)])
    assert density[choice.long()].sum() >= density[other.long()].sum()
    # A budget that rounding alone spends leaves nothing to drop; and it is counted for heads that stay dense.
    spent = float((more[..., 0].sum(1) / errors[..., -1].sum(1)).sqrt().min())
    tables.int8 = True
    choice, *_ = tables.probe(q, k, v, None, 0.3, by_error(0.99 * spent, DEVICE))
    assert (choice == patterns).all()


def test_who_asks_for_it_where_it_cannot_be_is_told_what_it_needs():
    tables = make_tables(200, 32, 32)
    tables.int8 = True
    q, k, v = (torch.randn(1, 2, 200, 128).to(DEVICE, torch.bfloat16) for _ in range(3))
    choice = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="needs a GPU of compute capability"):
        block_sparse_attention(q, k, v, choice, None, tables.attention_tables, 0.1)  # blocks of 32
    q, k, v, choice = (x.cpu() for x in (q, k, v, choice))
    on_cpu = [x.cpu() if isinstance(x, torch.Tensor) else x for x in tables.attention_tables]
    with pytest.raises(ValueError, match="got q on cpu"):
        operators.block_sparse_attention(q, k, v, choice, None, *on_cpu, 0.1)
    on_cpu = [x.cpu() if isinstance(x, torch.Tensor) else x for x in tables.probe_tables]
    with pytest.raises(ValueError, match="got q on cpu"):
        operators.arm_probe(q, k, v, None, *on_cpu, 0.1, *by_error(0.1))


def test_which_kernels_multiply_integers():
    assert configs.multiplies_int8(128, torch.bfloat16, (9, 0))
    portable = configs.LaunchConfig(64, 64, num_warps=4, num_stages=2)
    assert not configs.multiplies_int8(128, torch.bfloat16, (9, 0), config=portable)
    assert not configs.multiplies_int8(64, torch.bfloat16, (9, 0))
    assert not configs.multiplies_int8(128, torch.float32, (9, 0))
    assert not configs.multiplies_int8(128, torch.bfloat16, (9, 0), block_q=64)
    for capability in ((8, 0), (10, 0), None):
        assert not configs.multiplies_int8(128, torch.bfloat16, capability)


def test_the_option():
    assert Options().precision == "full"
    with pytest.raises(
        ValueError, match="precision must be 'full' or 'int8'; got 'fp8'; 'int8' is more exact than float8"
    ):
        Options(precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision must be 'full' or 'int8'; got 8"):
        Options(precision=8)  # type: ignore[arg-type]


def test_samples_that_are_no_tokens_are_looked_at_nowhere():
    k = make_keys()
    samples = torch.tensor([-1, 300, 2**31 - 1, 5], dtype=torch.int32, device=DEVICE)
    noise = int8_keys.score_noise(k, k, samples, 0.1)
    last = samples.new_tensor([299, 299, 299, 5])
    assert torch.equal(noise, int8_keys.score_noise(k, k, last, 0.1))
