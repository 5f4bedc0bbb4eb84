# SPDX-License-Identifier: Apache-2.0
"""Forward-mode derivatives: neither sparse attention nor Inductor has them, so graphs that need them are dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import rainfusion_compile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID = (4, 8, 8)
OPTIONS = {"min_tokens": 0, "sparsity": 0.0, "grid": GRID}


def model(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x).sin()


def tangent(function: Callable[..., Any], x: Tensor) -> Tensor | None:
    with fad.dual_level():
        return fad.unpack_dual(function(fad.make_dual(x, torch.ones_like(x)))).tangent


def status(report: Any) -> list[str]:
    return [entry["status"] for entry in report.to_dict()["attentions"]]


@pytest.mark.parametrize("grad", [False, True])
def test_a_level_outside_of_the_graph(grad: bool) -> None:
    """Whatever the graph was compiled for before: a level that opens or ends is guarded."""
    x = torch.randn(1, 2, 256, 16)
    ours = torch.compile(model, backend="rainfusion", options=OPTIONS)
    exact = torch.compile(model, backend="aot_eager")
    with torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH):
        for call, dual in enumerate((False, True, False, True)):
            with rainfusion_compile.observe() as report:
                if dual:
                    torch.testing.assert_close(tangent(ours, x), tangent(exact, x))
                else:
                    ours(x)
            # from 2.14 on, Dynamo itself leaves a function to Python where a level is open, and ever after
            left = call > 0 and torch.__version__ >= "2.14"
            assert status(report) == ([] if left else ["dense" if dual else "sparse"])


@pytest.mark.parametrize("how", ["level", "jvp"])
def test_a_level_inside_of_the_graph(how: str) -> None:
    x = torch.randn(1, 2, 256, 16)

    def run(x: Tensor) -> Any:
        return tangent(model, x) if how == "level" else torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]

    ours = torch.compile(run, backend="rainfusion", options=OPTIONS)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), rainfusion_compile.observe() as report:
        torch.testing.assert_close(ours(x), run(x), rtol=1e-4, atol=1e-4)
    assert set(status(report)) == {"dense"}
