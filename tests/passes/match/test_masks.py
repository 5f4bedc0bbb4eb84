# SPDX-License-Identifier: Apache-2.0
"""Masks over queries and keys: products of one over keys and one over queries, and others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import capture, randn
from torch import Tensor, nn

import rainfusion_compile
from rainfusion_compile.passes.match.find import find_attentions

T, H, W = 5, 7, 9
N = T * H * W
OPTIONS = {"min_tokens": 0, "error": 1.0}


def both(valid: Tensor) -> Tensor:
    """The mask of HunyuanVideo-1.5 and others: repeated over the queries, and its transpose."""
    keys = valid.view(len(valid), 1, 1, N).repeat(1, 1, N, 1)
    return (keys & keys.transpose(2, 3)).bool()


def broadcast(valid: Tensor) -> Tensor:
    return torch.logical_and(valid[:, None, :, None], valid[:, None, None, :])


def multiplied(valid: Tensor) -> Tensor:
    return valid[:, None, None, :].expand(-1, 1, N, -1) * valid[:, None, None, :].mT


def of_keys(valid: Tensor) -> Tensor:
    return valid.view(len(valid), 1, 1, N).repeat((1, 1, N, 1)).contiguous()


def of_queries(valid: Tensor) -> Tensor:
    return valid.view(len(valid), 1, N, 1).repeat(1, 1, 1, N)


def written_after(valid: Tensor) -> Tensor:
    mask = both(valid)
    mask[:, :, :, 0] = True
    return mask


def written_through_a_view(valid: Tensor) -> Tensor:
    mask = both(valid)
    mask[0].fill_(True)
    return mask


def written_before(valid: Tensor) -> Tensor:
    keys = valid.view(len(valid), 1, 1, N).clone()
    mask = keys.repeat(1, 1, N, 1) & keys.transpose(2, 3)
    keys.zero_()
    return mask


def either(valid: Tensor) -> Tensor:
    return valid[:, None, :, None] | valid[:, None, None, :]


def causal(valid: Tensor) -> Tensor:
    return broadcast(valid) & torch.ones(N, N, dtype=torch.bool).tril()


class Masked(nn.Module):
    """A video whose attention takes a mask made from which tokens are valid."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, latents: Tensor, valid: Tensor) -> Tensor:
        x = self.patch(latents).flatten(2).transpose(1, 2)
        q, k, v = (linear(x).unflatten(-1, (2, 16)).transpose(1, 2) for linear in self.qkv)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(valid))


def inputs() -> tuple[Tensor, Tensor]:
    valid = torch.ones(2, N, dtype=torch.bool)
    valid[0, -40:] = False
    valid[1, 10:15] = False
    return randn(2, 4, T, 2 * H, 2 * W), valid


@pytest.mark.parametrize("mask", [both, broadcast, multiplied, of_keys, of_queries])
def test_products_are_rewritten(mask: Callable[[Tensor], Tensor]):
    torch.manual_seed(0)
    model, args = Masked(mask), inputs()
    (graph,) = capture(model, *args)
    (found,) = find_attentions(graph)
    assert found.reason is None
    assert found.grid == (T, H, W)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, options=OPTIONS | {"sparsity": 0.0})
    with torch.no_grad():
        dense = model(*args)
        with rainfusion_compile.observe() as report:
            out = compiled(*args)
    assert [entry["status"] for entry in report.to_dict()["attentions"]] == ["sparse"]
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [both, of_keys, of_queries])
def test_sparse_hides_the_same(mask: Callable[[Tensor], Tensor]):
    """Hidden keys change no output; queries that see nothing give 0."""
    torch.manual_seed(0)
    model, (latents, valid) = Masked(mask), inputs()
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, options=OPTIONS | {"sparsity": 0.7})
    torch._dynamo.reset()
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = compiled(latents, valid)
        assert [entry["status"] for entry in report.to_dict()["attentions"]] == ["sparse"]
        hidden = ~valid[:, None, :, None]
        if mask is not of_keys:
            assert not out.masked_select(hidden).any()
        if mask is not of_queries:
            spoilt = latents.clone()
            spoilt[0, :, -1, -2:, -2:] += 100.0  # the last token, which is hidden in the first sample
            assert not valid[0, -1]
            again = compiled(spoilt, valid)
            seen = valid[:, None, :, None]
            torch.testing.assert_close(again.masked_select(seen), out.masked_select(seen))


@pytest.mark.parametrize("mask", [written_after, written_through_a_view, written_before, either, causal])
def test_other_masks_stay_dense(mask: Callable[[Tensor], Tensor]):
    (graph,) = capture(Masked(mask), *inputs())
    (found,) = find_attentions(graph)
    assert found.reason == f"mask depends on the query: shape {tuple(mask(inputs()[1]).shape)}"
