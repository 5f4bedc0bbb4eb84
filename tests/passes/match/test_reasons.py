# SPDX-License-Identifier: Apache-2.0
"""What is said of attention that stays dense is true, names what it is about, and says what to do."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import capture, randn
from one_attention import N, Video, latents, match
from torch import Tensor

from benchmarks.pages import reasons_page
from rainfusion_compile.options import Options
from rainfusion_compile.passes.attention_match import DenseReason, Reason
from rainfusion_compile.passes.match.find import find_attentions
from rainfusion_compile.passes.rewrite.writer import rewrite


@torch.library.custom_op("reasons::linear", mutates_args=())
def linear(x: Tensor) -> Tensor:
    return x * 2


@linear.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def lost(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(torch.ops.reasons.linear(x) for x in (q, k, v)))


def test_lost_tokens_are_no_cross_attention() -> None:
    found = match(Video(attend=lost))
    assert found.reason.kind is DenseReason.TOKENS_UNKNOWN
    assert found.reason.startswith("not known whether queries and keys are the same tokens, lost at ")
    assert "linear" in found.reason
    given = match(lambda q, k: F.scaled_dot_product_attention(q, k, k), *(randn(1, 2, N, 16, seed=n) for n in (0, 1)))
    assert given.reason.kind is DenseReason.TOKENS_UNKNOWN
    assert "an input of the graph" in given.reason


def test_known_tokens_that_differ_are_cross_attention() -> None:
    for attend in (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :9], v[:, :, :9]),
        lambda q, k, v: F.scaled_dot_product_attention(q, k.flip(2), v.flip(2)),
    ):
        found = match(Video(attend=attend))
        assert found.reason.kind is DenseReason.CROSS_ATTENTION
        assert found.reason.startswith("cross-attention")


@pytest.mark.parametrize(
    ("attend", "warned"),
    [(lost, True), (lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :9], v[:, :, :9]), False)],
)
def test_only_what_is_unexpected_is_warned_of(attend, warned, caplog) -> None:
    (graph,) = capture(Video(attend=attend), latents())
    with torch.no_grad(), caplog.at_level(logging.WARNING, "rainfusion_compile"):
        rewrite(graph, Options(min_tokens=0))
    assert ("not known whether" in caplog.text) is warned
    assert ("0 of 1 video self-attentions sparse: " in caplog.text) is warned


def test_a_wrapped_operand_is_named() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    q = randn(1, 2, N, 16)
    (graph,) = capture(F.scaled_dot_product_attention, q, TwoTensor(q, q.clone()), q)
    with torch.no_grad():
        (found,) = find_attentions(graph)
    assert found.reason == "operand is no plain tensor (key: TwoTensor)"
    run = torch.func.grad(lambda q: F.scaled_dot_product_attention(q, q, q).sum())
    (graph,) = capture(run, q)
    with torch.no_grad():
        (found,) = find_attentions(graph)
    assert "torch.func" in found.reason


def test_every_reason_has_a_remedy_and_stands_in_the_docs() -> None:
    assert all(kind.meaning and kind.remedy for kind in DenseReason)
    page = reasons_page.PAGE.read_text()
    assert page == reasons_page.with_table(page), "make reasons"


def test_advice_is_the_reason_and_its_remedy() -> None:
    assert Reason(DenseReason.DROPOUT, "dropout").advice == "dropout; call model.eval()"
    reason = match(lambda q: F.scaled_dot_product_attention(q, q, q), randn(1, 2, N, 16)).reason
    assert reason.kind is DenseReason.GRID_UNKNOWN
    assert reason.advice == f"{reason}; give options grid=(T, H, W)"


def test_a_sparsity_out_of_reach_is_said(caplog) -> None:
    """Half of two frames is the first frame, which is always kept."""
    q = randn(1, 1, 2 * 40 * 40, 16)
    for grid, sparsity, said in (((2, 40, 40), 0.9, True), ((2, 40, 40), 0.0, False), ((1, 40, 80), 0.5, False)):
        caplog.clear()
        (graph,) = capture(lambda q: F.scaled_dot_product_attention(q, q, q), q)
        with torch.no_grad(), caplog.at_level(logging.WARNING, "rainfusion_compile"):
            (found,) = rewrite(graph, Options(min_tokens=0, grid=grid, sparsity=sparsity)).sparse
        assert ("out of reach" in caplog.text) is said
        assert (f"{min(found.densities):.0%}" in caplog.text) is said


def test_reasons_may_be_sent_to_another_process():
    reason = Reason(DenseReason.CAUSAL, "causal")
    sent = pickle.loads(pickle.dumps(reason))
    assert (sent, sent.kind) == (reason, reason.kind)
