# SPDX-License-Identifier: Apache-2.0
"""How long the longest key is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from rainfusion_compile.kernels.gpu.key_norms import SPLITS, key_norms


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.sampled_from([1, 63, 64, 65, 2500]),
    dim=st.sampled_from([16, 64, 72, 96]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    tokens_first=st.booleans(),
)
def test_the_longest_key_of_each_head_is_found(
    seed: int, tokens: int, dim: int, dtype: torch.dtype, tokens_first: bool
) -> None:
    k = torch.randn(2, 3, tokens, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if tokens_first:
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    for keys in (k, k[:, 1:], k[:1].expand(2, -1, -1, -1)):
        norms = key_norms(keys)
        assert norms.shape == (*keys.shape[:2], SPLITS)
        torch.testing.assert_close(norms.amax(-1), keys.float().square().sum(-1).amax(-1))


def test_what_is_no_number_is_left_out_and_what_is_too_large_is_infinite() -> None:
    k = torch.ones(1, 2, 100, 32)
    k[0, 0, 30, 4], k[0, 1, 99, 0] = float("nan"), 1e30
    assert key_norms(k).amax(-1).tolist() == [[32.0, float("inf")]]
