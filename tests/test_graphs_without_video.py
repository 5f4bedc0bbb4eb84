# SPDX-License-Identifier: Apache-2.0
"""Graphs without attention over a video come out of the backend as they went in."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rainfusion_compile.options import Options
from rainfusion_compile.passes.rewrite.writer import rewrite

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.inductor
def test_nothing_to_rewrite_is_bit_identical_to_inductor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    x = torch.randn(8, 16)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="rainfusion")(x), torch.compile(model, backend="inductor")(x))


@st.composite
def plain_functions(draw):
    """A random function on [2, 60, 16] tensors, with attentions, none of which is over a video."""
    steps = draw(
        st.lists(st.sampled_from(["linear", "gelu", "norm", "flip", "image", "attention", "cross"]), max_size=6)
    )
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) / 4

    def function(x):
        for step in steps:
            if step == "linear":
                x = F.linear(x, weight)
            elif step == "gelu":
                x = F.gelu(x)
            elif step == "norm":
                x = F.layer_norm(x, (16,))
            elif step == "flip":
                x = x.flip(1)
            elif step == "image":
                x = x.unflatten(1, (6, 10)).transpose(1, 2).flatten(1, 2)
            else:
                q = x.unflatten(-1, (1, 16)).transpose(1, 2)
                k = q[:, :, :30] if step == "cross" else q
                x = F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)
        return x

    return function


@settings(max_examples=25)
@given(plain_functions())
def test_graphs_without_video_come_out_as_they_went_in(function):
    seen = []

    def backend(gm, _):
        before = gm.code
        report = rewrite(gm, Options(min_tokens=0))
        seen.append((before == gm.code, not list(gm.named_buffers()), report.sparse))
        return gm.forward

    x = torch.randn(2, 60, 16)
    with torch.no_grad():
        assert torch.equal(torch.compile(function, backend=backend)(x), function(x))
    assert all(entry == (True, True, []) for entry in seen)
