# SPDX-License-Identifier: Apache-2.0
"""The operators as every engine must do them: against the reference, and by identities that hold for any input."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from strategies import OperatorCall, by_error, by_recall, cases, chosen_by_recall, expected_errors, tolerance

from rainfusion_compile.kernels import operators, reference
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS

ops = torch.ops.rainfusion
RECALL = by_recall(0.9, 0.1)


def attention(case: OperatorCall) -> torch.Tensor:
    return ops.block_sparse_attention(*case.attention_args())


def dense(case: OperatorCall) -> torch.Tensor:
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    mask = case.key_mask
    if mask is not None:
        mask = mask[:, :, None] if mask.dtype == torch.bool else mask[:, :, None].double()
        mask = mask.expand(len(q), q.shape[1], q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=case.scale, enable_gqa=True).nan_to_num()


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), **tolerance(dtype))


@given(cases())
def test_attention_equals_the_reference(case):
    out = attention(case)
    assert out.dtype == case.q.dtype
    close(out, reference.block_sparse_attention(*case.attention_args(flat=False)), case.q.dtype)


@given(cases())
def test_recall_equals_the_reference_and_choice_follows_it(case):
    target, least = 0.7, 0.5
    choice, errors, recall = ops.arm_probe(*case.probe_args(), *by_recall(target, least))
    close(recall, reference.arm_errors(*case.probe_args(flat=False))[1], case.q.dtype)
    by_paper = [
        chosen_by_recall(r, energy > 0, target, least)
        for r, energy in zip(recall.flatten(0, 1).tolist(), errors[..., -1].flatten().tolist(), strict=True)
    ]
    assert choice.flatten().tolist() == by_paper


@given(cases())
def test_errors_equal_the_reference_seen_in_the_same_directions(case):
    _, errors, _ = ops.arm_probe(*case.probe_args(), *RECALL)
    expected = expected_errors(case)
    scale = expected[..., -1:].clamp_min(1e-9)
    torch.testing.assert_close(errors / scale, expected / scale, atol=1e-4, rtol=1e-3, check_dtype=False)


@given(cases())
def test_everything_kept_equals_dense(case):
    case.choice.fill_(len(case.tables.patterns))
    close(attention(case), dense(case), case.q.dtype)


@given(cases())
def test_sparsity_zero_equals_dense(case):
    for sampled in (True, False):
        tables = block_tables(
            case.tables.layout, sparsity=0.0, patterns=PATTERNS, sampled=sampled,
            block_q=case.tables.block_q, block_k=case.tables.block_k,
        )  # fmt: skip
        case.choice.clamp_max_(len(tables.patterns))
        close(attention(dataclasses.replace(case, tables=tables)), dense(case), case.q.dtype)
        _, errors, _ = ops.arm_probe(*dataclasses.replace(case, tables=tables).probe_args(), *RECALL)
        assert bool((errors[..., :-1] <= 1e-6 * errors[..., -1:]).all()), "what reads everything makes no error"


@given(cases())
def test_rows_of_text_and_of_the_first_frame_are_dense(case):
    layout = case.tables.layout
    video, frame, _, _ = layout.coordinates()
    first = (frame == 0) & torch.tensor([grid[0] > 1 for grid in layout.grids])[video]  # an image has none
    rows = ((video < 0) | first).nonzero().flatten()
    assume(len(rows))
    close(attention(case)[:, :, rows], dense(case)[:, :, rows], case.q.dtype)


@given(cases(masks=("bool",)))
def test_a_padding_key_never_changes_an_output(case):
    out = attention(case)
    choice, errors, recall = ops.arm_probe(*case.probe_args(), *RECALL)
    hidden = ~case.key_mask.flatten(0, 1).any(0)
    noisy_k, noisy_v = case.k.clone(), case.v.clone()
    noisy_k[:, :, hidden], noisy_v[:, :, hidden] = 100.0, -1000.0
    noisy = dataclasses.replace(case, k=noisy_k, v=noisy_v)
    close(attention(noisy), out, case.q.dtype)
    other_choice, other_errors, other_recall = ops.arm_probe(*noisy.probe_args(), *RECALL)
    torch.testing.assert_close(other_recall, recall, atol=1e-5, rtol=0)
    scale = errors[..., -1:].clamp_min(1e-9)
    torch.testing.assert_close(other_errors / scale, errors / scale, atol=1e-5, rtol=1e-4)
    assert torch.equal(other_choice, choice)


@given(cases())
def test_a_batch_equals_its_samples(case):
    rule = by_error(0.1)
    out, (choice, _, recall) = attention(case), ops.arm_probe(*case.probe_args(), *rule)
    for b in range(len(case.q)):
        mask = case.key_mask
        if mask is not None and len(mask) > 1:
            mask = mask[b : b + 1]
        one = dataclasses.replace(
            case, key_mask=mask, **{name: getattr(case, name)[b : b + 1] for name in ("q", "k", "v", "choice")}
        )
        close(attention(one), out[b : b + 1], case.q.dtype)
        own_choice, _, own_recall = ops.arm_probe(*one.probe_args(), *rule)
        torch.testing.assert_close(own_recall, recall[b : b + 1], atol=1e-5, rtol=0)
        assert torch.equal(own_choice, choice[b : b + 1]), "each sample has a budget of its own"


@given(cases())
def test_grouped_queries_equal_repeated_keys(case):
    group = case.q.shape[1] // case.k.shape[1]
    repeated = dataclasses.replace(case, k=case.k.repeat_interleave(group, 1), v=case.v.repeat_interleave(group, 1))
    close(attention(repeated), attention(case), case.q.dtype)


@given(cases())
def test_sharding_by_heads_changes_nothing(case):
    group = case.q.shape[1] // case.k.shape[1]
    out = attention(case)
    for kv in range(case.k.shape[1]):
        heads = slice(kv * group, (kv + 1) * group)
        mask = case.key_mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, heads]
        shard = dataclasses.replace(
            case,
            q=case.q[:, heads],
            choice=case.choice[:, heads],
            k=case.k[:, kv : kv + 1],
            v=case.v[:, kv : kv + 1],
            key_mask=mask,
        )
        close(attention(shard), out[:, heads], case.q.dtype)


@given(cases())
def test_strides_are_those_of_flash_attention(case):
    _batch, heads, tokens, dim = case.q.shape
    assert attention(case).stride() == (tokens * heads * dim, dim, heads * dim, 1)


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize(("grid", "text"), [((3, 5, 7), (0, 0)), ((2, 9, 5), (4, 9))])
@pytest.mark.parametrize("permuted", [True, False])
def test_opcheck(mask, grid, text, permuted):
    tables = block_tables(VideoLayout(grid, text), sparsity=0.5, patterns=PATTERNS, block_q=16, block_k=8)
    tokens = tables.layout.tokens
    shape = (2, tokens, 4, 16) if permuted else (2, 4, tokens, 16)
    q, k, v = (torch.randn(shape) for _ in range(3))
    if permuted:
        q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    key_mask = {None: None, "bool": torch.rand(2, 1, tokens) > 0.3, "additive": torch.randn(1, 4, tokens)}[mask]
    choice = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.int32)
    case = OperatorCall(tables, q, k, v, key_mask, choice, 0.25)
    torch.library.opcheck(operators.block_sparse_attention, case.attention_args())
    rule = by_recall(0.95, 0.1) if permuted else by_error(0.05)
    torch.library.opcheck(operators.arm_probe, (*case.probe_args(), *rule))


def test_the_probe_takes_its_scores_in_float32():
    """Logits that half precision cannot hold, before a small scale."""
    tables = block_tables(VideoLayout((3, 8, 12)), sparsity=0.5, patterns=PATTERNS, block_q=16, block_k=8)
    q, k = (300 * torch.randn(1, 2, 288, 16) for _ in range(2))
    case = OperatorCall(tables, q.half(), k.half(), k.half(), None, torch.zeros(1, 2, dtype=torch.int32), 1e-5)
    _, errors, recall = ops.arm_probe(*case.probe_args(), *RECALL)
    expected = reference.arm_errors(*case.probe_args(flat=False))
    torch.testing.assert_close(recall.double(), expected[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(errors[..., -1].double(), expected[0][..., -1], atol=0, rtol=1e-4)


def test_tables_do_not_follow_the_default_device():
    with torch.device("meta"):
        tables = block_tables(VideoLayout((3, 7, 13)), sparsity=0.37, patterns=PATTERNS)
    assert tables.order.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_nothing_follows_the_default_dtype(dtype, default_dtype):
    def results() -> tuple[torch.Tensor, ...]:
        block_tables.cache_clear()
        tables = block_tables(VideoLayout((4, 6, 10), (3, 5)), sparsity=0.5, patterns=PATTERNS, block_q=32, block_k=16)
        case = OperatorCall(tables, q, k, k, mask, torch.tensor([[0, 1, 2, 3]], dtype=torch.int32), 0.25)
        probed = ops.arm_probe(*case.probe_args(), *RECALL)
        return *tables.tensors.values(), *probed, attention(case)

    q, k = (torch.randn(1, 4, 248, 16) for _ in range(2))
    mask = torch.rand(1, 1, 248) > 0.1
    usual = results()
    default_dtype(dtype)
    for now, before in zip(results(), usual, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0)
