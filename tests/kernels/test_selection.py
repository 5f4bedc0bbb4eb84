# SPDX-License-Identifier: Apache-2.0
"""Key blocks that heads select: the right ones, on every engine, and what comes of reading them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from strategies import OperatorCall, by_error, lists_of_the_gpu

from rainfusion_compile.kernels import operators, reference, selection
from rainfusion_compile.sparsity.block_tables import BlockTables, block_tables
from rainfusion_compile.sparsity.blocks import Blocks
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import BY_NAME
from rainfusion_compile.sparsity.selected_blocks import granules, selections

LAYOUT = VideoLayout((10, 4, 4), (3, 6))


def made(patterns: tuple[str, ...] = ("adaptive",), sparsity: float = 0.35, **sizes: int) -> BlockTables:
    tables = block_tables(LAYOUT, sparsity=sparsity, patterns=patterns, **{"block_q": 16, "block_k": 16} | sizes)
    assert len(tables.selected)
    few = slice(None, None, 8)  # of the samples: the interpreter is slow
    return replace(
        tables,
        samples=tables.samples[few].contiguous(),
        sample_blocks=tables.sample_blocks[few].contiguous(),
        sample_keep=tables.sample_keep[few].contiguous(),
        excess=tables.excess[:, few].contiguous(),
    )


def call(tables: BlockTables, *, mask: str | None = None, kv_heads: int = 1, scale: float = 0.25) -> OperatorCall:
    generator = torch.Generator().manual_seed(0)
    heads, tokens = 2, LAYOUT.tokens
    q, k, v = (torch.randn(1, n, tokens, 16, generator=generator) for n in (heads, kv_heads, kv_heads))
    number = tables.patterns.index("adaptive")
    choice = torch.tensor([[number, len(tables.patterns)]], dtype=torch.int32)
    key_mask = {
        None: None,
        "end": (torch.arange(tokens) < tokens - 4)[None, None],
        "anywhere": torch.rand(1, heads, tokens, generator=generator) > 0.3,
        "bias": torch.randn(1, 1, tokens, generator=generator),
    }[mask]
    return OperatorCall(tables, q, k, v, key_mask, choice, scale)


@pytest.mark.parametrize("grid", [(21, 30, 52), (13, 30, 45), (6, 20, 20)])
@pytest.mark.parametrize("sparsity", [0.85, 0.6, 0.35])
def test_selections_come_to_the_density_that_is_asked(grid, sparsity):
    blocks = Blocks(VideoLayout(grid, (0, 70)), 128, 64)
    free = int((~blocks.full_columns).sum())
    for count, stride in selections(blocks, 1 - sparsity):
        assert 0 < count < free
        assert (free - count) % stride == 0, "granules fill whole blocks"
        share = count / free + (1 - count / free) / stride
        rows = (~blocks.full_rows).float().mean() * (~blocks.full_columns).float().mean()
        assert float(1 - rows * (1 - share)) == pytest.approx(1 - sparsity, abs=0.05)
    table = block_tables(blocks.layout, sparsity=sparsity, patterns=("adaptive",))
    assert all(abs(density - 1 + sparsity) < 0.05 or density == 1.0 for density in table.densities)


@pytest.mark.parametrize(
    "layout", [VideoLayout((1, 64, 64)), VideoLayout(((4, 20, 20), (4, 20, 20))), VideoLayout((2, 4, 4))]
)
def test_where_all_blocks_are_free_or_among_several_videos_nothing_is_selected(layout):
    tables = block_tables(layout, sparsity=0.5, patterns=tuple(BY_NAME))
    assert "adaptive" not in tables.patterns
    assert len(tables.selected) == 0
    alone = block_tables(layout, sparsity=0.5, patterns=("adaptive",))
    assert alone.densities == (1.0,), "where nothing can be selected, everything is read"


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_granules_take_one_key_of_each_run_in_each_phase(stride):
    blocks = Blocks(VideoLayout((3, 9, 11), (5, 0)), 128, 64)
    each = granules(blocks, stride).view(stride, blocks.n_b, -1)
    whole = ~blocks.full_columns.clone()
    for block in whole.nonzero().flatten().tolist():
        run = (each[:, block] - block * 64) // stride
        assert torch.equal(run, torch.arange(64 // stride).expand(stride, -1))
        assert len(each[:, block].unique()) == 64, "all phases together take every key once"


def test_the_blocks_of_the_highest_mean_scores_are_selected():
    """Keys of one block look where the queries of another look, and are found there."""
    tables = made()
    q, k = torch.randn(2, LAYOUT.tokens, 16, generator=torch.Generator().manual_seed(1)) * 0.01
    free = tables.free.nonzero().flatten()
    target = int(free[5])
    place = tables.order.long()[target * 16 : (target + 1) * 16]
    q[tables.order.long()[7 * 16 : 8 * 16], 3] = 1.0
    k[place, 3] = 1.0
    means = selection.block_means(q, tables.order, 16), selection.block_means(k, tables.order, 16)
    for scale, wanted in ((1.0, 0), (-1.0, len(free) - 1)):
        rank = selection.ranks(selection.mean_scores(*means, scale), tables.free)
        assert int(rank[7, target]) == wanted
        assert torch.equal(rank[:, free].sort().values, torch.arange(len(free)).expand(len(rank), -1))
        lists = selection.block_lists(rank, tables.free, 4)
        assert torch.equal(lists.sort().values, free.expand(len(rank), -1)), "every free block is in one of the lists"
        assert bool((lists[:, :-4].diff() > 0).all())
        assert bool((lists[:, -4:].diff() > 0).all())
        assert (target in lists[7, -4:]) == (scale > 0)


def test_what_a_mask_hides_selects_nothing():
    x, order = torch.randn(40, 8), torch.randperm(40).int()
    mask = torch.rand(40) > 0.4
    means = selection.block_means(x, order, 16, mask)
    noisy = torch.where(mask[:, None], x, float("nan"))
    assert torch.equal(selection.block_means(noisy, order, 16, mask), means)
    bias = torch.where(mask, 0.5, float("-inf"))
    assert torch.equal(selection.block_means(noisy, order, 16, bias), means)
    for block, tokens in enumerate(order.long().split(16)):
        torch.testing.assert_close(means[block], x[tokens][mask[tokens]].mean(0))


@pytest.mark.parametrize("mask", [None, "end", "anywhere", "bias"])
@pytest.mark.parametrize("scale", [0.25, -0.25])
def test_attention_and_arm_equal_the_reference(mask, scale):
    case = call(made(tuple(BY_NAME)), mask=mask, scale=scale)
    out = operators.block_sparse_attention(*case.attention_args())
    want = reference.block_sparse_attention(*case.attention_args(flat=False))
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    _, _, recall = operators.arm_probe(*case.probe_args(), *by_error(0.1))
    torch.testing.assert_close(
        recall.double(), reference.arm_errors(*case.probe_args(flat=False))[1], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("mask", "tile"), [(None, 16), ("end", 16), ("anywhere", 16), ("bias", 16)])
def test_triton_equals_the_reference(mask, tile):
    """Selected blocks are taken from the engine, for they may be as good but for rounding."""
    pytest.importorskip("triton")
    from rainfusion_compile.kernels.gpu import attention, probe
    from rainfusion_compile.kernels.gpu.configs import LaunchConfig

    case = call(made(block_k=tile), mask=mask)
    tables = case.tables.attention_arguments
    lists = lists_of_the_gpu(case.q, case.k, case.choice, case.key_mask, tables, case.scale)
    assert lists is not None
    own = reference._ranks(case.q, case.k, case.key_mask, tables, case.scale, 0, 0)
    count = int(tables.selected[0])
    assert torch.equal(lists[0, 0], selection.block_lists(own, tables.free, count)), "scores lie apart here"
    config = LaunchConfig(16, 16, num_warps=4, num_stages=2)
    out = attention.block_sparse_attention(*case.attention_args(flat=False), config=config)
    want = reference.block_sparse_attention(*case.attention_args(flat=False), lists)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    _, _, recall = probe.arm_probe(*case.probe_args(flat=False), *by_error(0.1))
    torch.testing.assert_close(
        recall.double(), reference.arm_errors(*case.probe_args(flat=False))[1], rtol=0, atol=1e-5
    )


def test_triton_selects_the_first_of_those_that_are_as_good_and_no_number_breaks_it():
    pytest.importorskip("triton")
    from rainfusion_compile.kernels.gpu import selection as on_gpu

    tables = made().attention_arguments
    q, k = torch.zeros(1, 1, LAYOUT.tokens, 16), torch.zeros(1, 1, LAYOUT.tokens, 16)
    q[0, 0, tables.order[32:48].long()] = float("nan")
    choice, free = torch.zeros(1, 1, dtype=torch.int32), tables.free.nonzero().flatten()
    lists = on_gpu.select_blocks(q, k, choice, None, tables, 1.0)[0, 0, :, : len(free)].long()
    count = int(tables.selected[0])
    assert torch.equal(lists, torch.cat([free[count:], free[:count]]).expand_as(lists))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("counts", [(0, 5, 3, 12, 12, 1), (27, 40, 0, 26), (2**31 - 1, 4), (9,)])
def test_triton_selects_for_samples_what_each_candidate_would(dtype, counts):
    pytest.importorskip("triton")
    from rainfusion_compile.kernels.gpu import selection as on_gpu

    generator = torch.Generator().manual_seed(0)
    score = (100 * torch.randn(2, 1, 3, 30, generator=generator)).to(dtype)
    score[1, 0, 1] = 7.0  # all as good: a bound selects all of them
    score[1, 0, 2, 11] = float("inf")
    free = (torch.arange(30) > 2).int()
    tables = SimpleNamespace(selected=torch.tensor(counts, dtype=torch.int32), free=free)
    found = on_gpu.select_each(score, tables)
    for number, count in enumerate(counts):
        bits = (found >> number & 1).bool()
        best = selection.ranks(score.flatten(0, 2).float(), free).view_as(score) < count
        lowest = score.float().masked_fill(~best, float("inf")).amin(-1, keepdim=True)
        assert torch.equal(bits, (score >= lowest) & (free != 0) & (count > 0)), (number, count)
    assert not (found >> len(counts)).any()


@pytest.mark.parametrize("free", [0, 1])
def test_triton_ends_where_no_score_is_a_number_or_no_block_is_free(free):
    pytest.importorskip("triton")
    from rainfusion_compile.kernels.gpu import selection as on_gpu

    selected, blocks = torch.tensor([4, 2], dtype=torch.int32), torch.full((20,), free, dtype=torch.int32)
    found = on_gpu.select_each(torch.full((1, 1, 2, 20), float("nan")), SimpleNamespace(selected=selected, free=blocks))
    assert torch.equal(found, torch.full_like(found, 3 * free))


@pytest.mark.parametrize("value", [-1, 2**31 - 1, 10**6])
@pytest.mark.parametrize("field", ["sampled", "selected", "free", "order", "key_order"])
def test_triton_stays_inside(field, value):
    pytest.importorskip("triton")
    from rainfusion_compile.kernels.gpu import attention

    case = call(made(block_q=32))
    tables = case.tables.attention_arguments
    wrong = getattr(tables, field).clone()
    wrong.view(-1)[wrong.numel() // 2 :: 3] = value
    if field == "sampled":
        wrong[:, 2] = getattr(tables, field)[:, 2]  # as many blocks as it says are read, one after the other
        wrong[:, 0] = getattr(tables, field)[:, 0]
    args = (case.q, case.k, case.v, case.choice, None, tables._replace(**{field: wrong}), case.scale)
    assert bool(attention.block_sparse_attention(*args).isfinite().all())


def test_opcheck():
    case = call(made(tuple(BY_NAME)))
    torch.library.opcheck(operators.block_sparse_attention, case.attention_args())
    torch.library.opcheck(operators.arm_probe, (*case.probe_args(), *by_error(0.05)))
