# SPDX-License-Identifier: Apache-2.0
"""Rows that `order` does not name are zeros, whatever memory held; all others are left alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from rainfusion_compile.kernels.gpu import unnamed_rows


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 2), st.sampled_from([16, 80]), st.integers(0, 2), st.integers(0, 2**31))
def test_only_unnamed_rows_are_cleared(tokens, batch, head_dim, wrong, seed):
    if torch.cuda.is_available():
        pytest.skip("the kernel's own tests run on the device")
    torch.manual_seed(seed)
    order = torch.randperm(tokens, dtype=torch.int32)
    if wrong:  # names some twice, and others out of bounds, which stand for the last one
        order[torch.rand(tokens) < 0.1 * wrong] = order[0].item()
        order[torch.rand(tokens) < 0.02 * wrong] = 2**31 - 1
        order[torch.rand(tokens) < 0.02 * wrong] = -5
    garbage = torch.where(
        torch.rand(tokens) < 0.5, torch.randint(-(2**31), 2**31, (tokens,)), torch.randint(0, tokens, (tokens,))
    ).int()
    out = torch.full((batch, tokens, 3, head_dim), 7.0, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda _: garbage)
        unnamed_rows.clear_unnamed_rows(out, order)
    named = torch.zeros(tokens, dtype=torch.bool)
    named[torch.where((order < 0) | (order >= tokens), tokens - 1, order).long()] = True
    assert named.all() or wrong
    expected = torch.where(named, 7.0, 0.0)[None, :, None, None].expand(out.shape)
    assert torch.equal(out.float(), expected)
