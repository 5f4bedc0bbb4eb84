# SPDX-License-Identifier: Apache-2.0
"""Whatever tables and choices hold, kernels read and write inside the tensors that they are given.

On a GPU nobody looks at contents before a launch. Keys and values lie between NaN here, which any read beside them
would show; ``tests/gpu/sanitize.py`` has the same under compute-sanitizer.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from strategies import by_error, by_recall
from torch import Tensor

pytest.importorskip("triton")

from rainfusion_compile.kernels import reference
from rainfusion_compile.kernels.gpu.attention import block_sparse_attention
from rainfusion_compile.kernels.gpu.probe import arm_probe
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUT = VideoLayout((5, 5, 6), (3, 5))
TABLES = block_tables(LAYOUT, sparsity=0.6, patterns=PATTERNS, block_q=32, block_k=16, device=DEVICE)
assert bool((TABLES.sampled[:, :2] > 0).all(1).any()), "no row samples"
WRONG = (-1, 2**31 - 1, LAYOUT.tokens)


def guarded(*shape: int) -> Tensor:
    """Random numbers with as much NaN before and after them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return F.pad(x.flatten(), (x.numel(), x.numel()), value=float("nan")).view(3, *shape)[1]


def with_one(x: Tensor, value: int) -> Tensor:
    """One number among good ones is wrong, and the last."""
    places = torch.tensor([x.numel() // 2, x.numel() - 1], device=DEVICE)
    return x.clone().flatten().index_fill_(0, places, value).view_as(x)


@pytest.mark.parametrize("mask", [None, "bool"])
@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("field", ["choice", "order", "key_order", "rows", "row_ptr", "indices", "sampled"])
def test_attention_stays_inside(field, value, mask):
    q, k, v = (guarded(1, 2, LAYOUT.tokens, 16) for _ in range(3))
    key_mask = None if mask is None else torch.arange(LAYOUT.tokens, device=DEVICE)[None, None] < LAYOUT.tokens - 5
    tables, choice = TABLES.attention_arguments, torch.tensor([[0, 2]], dtype=torch.int32, device=DEVICE)
    if field == "choice":
        choice = with_one(choice, value)
    else:
        tables = tables._replace(**{field: with_one(getattr(tables, field), value)})
    assert bool(block_sparse_attention(q, k, v, choice, key_mask, tables, 0.25).isfinite().all())


@pytest.mark.parametrize(("mask", "rule"), [(None, by_recall(0.9, 0.1)), ("bool", by_error(0.5))])
@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("field", ["order", "keys", "samples"])
def test_the_probe_stays_inside(field, value, mask, rule):
    q, k, v = (guarded(1, 2, LAYOUT.tokens, 16) for _ in range(3))
    key_mask = None if mask is None else torch.arange(LAYOUT.tokens, device=DEVICE)[None, None] < LAYOUT.tokens - 5
    tables = TABLES.probe_arguments
    tables = tables._replace(**{field: with_one(getattr(tables, field), value)})
    choice, errors, recall = arm_probe(q, k, v, key_mask, tables, 0.25, *rule)
    assert bool(recall.isfinite().all() & errors.isfinite().all())
    assert bool(((choice >= 0) & (choice <= len(tables.density))).all())


def test_rows_that_no_query_block_names_are_zero():
    q, k, v = (guarded(1, 2, LAYOUT.tokens, 16) for _ in range(3))
    tables = TABLES.attention_arguments
    tables = tables._replace(order=torch.zeros_like(tables.order))
    out = block_sparse_attention(q, k, v, torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), None, tables, 0.25)
    assert not bool(out[:, :, 1:].any())


@pytest.mark.parametrize(("scale", "mask"), [(-0.3, None), (-0.3, "bool"), (-0.3, "bias"), (0.0, "bias")])
def test_any_scale(scale, mask):
    q, k, v = (torch.randn(2, 2, LAYOUT.tokens, 16, device=DEVICE) for _ in range(3))
    bias = torch.randn(2, 1, LAYOUT.tokens, device=DEVICE)
    key_mask = {None: None, "bool": bias > -1, "bias": bias}[mask]
    choice = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=DEVICE)
    args = (q, k, v, choice, key_mask, TABLES.attention_arguments, scale)
    torch.testing.assert_close(
        block_sparse_attention(*args).double(), reference.block_sparse_attention(*args), rtol=1e-4, atol=1e-5
    )
    probed = (q, k, v, key_mask, TABLES.probe_arguments, scale)
    _, errors, recall = arm_probe(*probed, *by_recall(0.9, 0.1))
    expected = reference.arm_errors(*probed)
    torch.testing.assert_close(recall.double(), expected[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(errors[..., -1].double(), expected[0][..., -1], rtol=1e-4, atol=1e-6)
