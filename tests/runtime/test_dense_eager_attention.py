# SPDX-License-Identifier: Apache-2.0
"""Attention outside all graphs that stays as it was: dense and told, or none that the context is about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager_attention import GRID, HALF, N, call, entries, operands, sdpa
from models import randn
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from rainfusion_compile import observe, sparse_eager_attention
from rainfusion_compile.passes.attention_match import DenseReason

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


DENSE: dict[str, tuple[dict[str, Any], dict[str, Any], DenseReason]] = {
    "causal": ({"is_causal": True}, {}, DenseReason.CAUSAL),
    "dropout": ({"dropout_p": 0.5}, {}, DenseReason.DROPOUT),
    "mask of queries": ({"attn_mask": torch.ones(N, N, dtype=torch.bool).tril()}, {}, DenseReason.MASK),
    "another grid": ({}, {"grid": (6, 12, 15)}, DenseReason.GIVEN),
    "no text": ({}, {"text": (0, 1)}, DenseReason.GIVEN),
}


@pytest.mark.parametrize("kind", DENSE)
def test_what_stays_dense_is_what_it_was_and_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments, options, reason = DENSE[kind]
    q, k, v = operands()
    outs = []
    for context in (sparse_eager_attention(**{"grid": GRID, **HALF, **options}), torch.no_grad()):
        torch.manual_seed(0)
        with observe() as report, context, torch.no_grad():
            outs += [sdpa(q, k, v, **arguments)]
            (entry,) = entries(report) or [None]
            if len(outs) == 1:
                assert (entry["status"], entry["remedy"]) == ("dense", reason.remedy)
    assert torch.equal(*outs)
    assert caplog.text.count("0 of 1 video self-attentions sparse") == 1
    assert "test_dense_eager_attention.py:" in caplog.text


@pytest.mark.parametrize("given", [{"head_dim": 12}, {"dtype": torch.float64}])
def test_what_no_operator_takes_stays_dense(given: dict[str, Any]) -> None:
    dtype = given.pop("dtype", torch.float32)
    q, k, v = (x.to(dtype) for x in operands(**given))
    out, (entry,) = call(sdpa, q, k, v, **HALF)
    assert torch.equal(out, sdpa(q, k, v))
    assert entry["remedy"] == DenseReason.UNSUPPORTED.remedy
    tokens = N - 1  # as many as an autoencoder's attention may have: nobody expects anything of it
    q, k, v = (x[:, :, :tokens] for x in (q, k, v))
    assert call(sdpa, q, k, v, **HALF, strict=True)[1] == []


def test_what_is_told_is_told_once_for_each_place(caplog: pytest.LogCaptureFixture) -> None:
    def here(*x: Tensor) -> Tensor:
        return sdpa(*x, is_causal=True)

    q, k, v = operands()
    _, found = call(lambda: [here(q, k, v), here(q[:1], k[:1], v[:1]), here(q, k, v)], **HALF)
    assert [entry["calls"] for entry in found] == [2, 1]
    assert caplog.text.count("causal; drop is_causal") == 1


def test_gradients_are_right_and_told() -> None:
    leaves = [x.detach().requires_grad_() for x in operands()]
    with observe() as report, sparse_eager_attention(GRID, **HALF):
        got = torch.autograd.grad(sdpa(*leaves).sum(), leaves)
    assert [entry["reason"] for entry in entries(report)] == ["needs gradients"]
    want = torch.autograd.grad(sdpa(*leaves).sum(), leaves)
    assert all(map(torch.equal, got, want))


def test_tangents_and_transforms_are_right_and_told() -> None:
    q, k, v = operands()
    derivative = torch.func.grad(lambda q: sdpa(q, k, v).sum())
    got, (entry,) = call(derivative, q, **HALF)
    assert "torch.func" in entry["reason"]
    assert torch.equal(got, derivative(q))

    def tangent() -> Tensor:
        with forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return forward_ad.unpack_dual(sdpa(forward_ad.make_dual(q, torch.ones_like(q)), k, v)).tangent

    got, (entry,) = call(tangent, **HALF)
    assert entry["reason"] == "needs forward-mode derivatives"
    assert torch.equal(got, tangent())
    vmapped = torch.vmap(sdpa)
    assert torch.equal(call(vmapped, q[None], k[None], v[None], **HALF)[0], vmapped(q[None], k[None], v[None]))


def test_other_tensors_than_plain_ones_are_told() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    q, k, v = operands()
    wrapped = TwoTensor(q, q.clone())
    out, (entry,) = call(sdpa, wrapped, k, v, **HALF)
    assert entry["reason"] == "operand is no plain tensor (query: TwoTensor)"
    assert torch.equal(out.a, sdpa(q, k, v))


def test_whoever_looks_at_operators_sees_those_of_the_model() -> None:
    q, k, v = operands()
    seen: list[list[str]] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[-1].append(str(func))
            return func(*args, **(kwargs or {}))

    for context in (torch.no_grad(), sparse_eager_attention(GRID, **HALF)):
        seen.append([])
        with context, torch.no_grad(), Look():
            sdpa(q, k, v)
    assert seen[0] == seen[1] != []


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_left_alone(layout: torch.layout) -> None:
    parts = [randn(tokens, 2, 16, seed=tokens) for tokens in (N, 9)]
    if layout is torch.strided:
        x = torch.nested.nested_tensor([part.transpose(0, 1) for part in parts])
    else:
        x = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
    out, found = call(sdpa, x, x, x, **HALF, strict=True)
    assert found == []
    assert all(map(torch.equal, out.unbind(), sdpa(x, x, x).unbind()))


def test_cross_attention_is_left_alone() -> None:
    q, k, v = operands()
    out, found = call(sdpa, q, k[:, :, :200], v[:, :, :200], **HALF, strict=True)
    assert torch.equal(out, sdpa(q, k[:, :, :200], v[:, :, :200]))
    assert found == []


def test_small_attention_is_no_matter() -> None:
    q, k, v = operands(50)
    _, found = call(sdpa, q, k, v, **{**HALF, "min_tokens": 100}, strict=True)
    assert found == []


def test_a_grid_of_too_few_tokens_is_told(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = operands()
    out, (entry,) = call(sdpa, q, k, v, **{**HALF, "min_tokens": N + 1})
    assert torch.equal(out, sdpa(q, k, v))
    few = f"{N} tokens, fewer than min_tokens={N + 1}"
    assert (entry["status"], entry["reason"], entry["remedy"]) == ("dense", few, DenseReason.SIZE.remedy)
    assert f"nothing outside of graphs becomes sparse: {few}; {DenseReason.SIZE.remedy}" in caplog.text


def test_strict_is_an_error_that_names_the_place() -> None:
    q, k, v = operands()
    wrong = r"strict=True, but runtime/test_\w+.py:\d+ stays dense: causal; drop is_causal"
    with pytest.raises(RuntimeError, match=wrong):
        call(lambda: sdpa(q, k, v, is_causal=True), **HALF, strict=True)
