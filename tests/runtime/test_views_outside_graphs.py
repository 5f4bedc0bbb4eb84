# SPDX-License-Identifier: Apache-2.0
"""Views of keys and values that code outside all graphs makes, known by what they hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from found_grids import GRIDS, OPTIONS, call
from models import randn
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("fixed_phases", "fresh_dynamo")


@torch.compiler.disable
def counted(x: Tensor, lengths: Tensor) -> list[Tensor]:
    """Of each sample what counts, as code that packs sequences has it: views, made outside all graphs."""
    return [one[: int(length)] for one, length in zip(x, lengths, strict=True)]


class Packed(nn.Module):
    """Queries are packed in the graph, keys and values after other code has made something of them."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.other, self.patch, self.qkv = torch.compiler.disable(other), nn.Conv3d(4, 32, 1), nn.Linear(32, 96)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.patch(latents).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        lengths = torch.tensor([x.shape[1]] * len(x))
        keys, values = counted(self.other(k), lengths), counted(self.other(v), lengths)
        q, k, v = (y.reshape(len(x), -1, 2, 16).transpose(1, 2) for y in (q, torch.cat(keys), torch.cat(values)))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


def written(x: Tensor) -> Tensor:
    x[0, 3].copy_(x[0, 4])
    return x


SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "a view": lambda x: x.flatten(2),
    "there and back": lambda x: x.transpose(0, 1).squeeze(1)[None],
    "a view of a view": lambda x: x.view(1, 5, 77, 2, 16).flatten(1, 2),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "written": written,
    "flipped": lambda x: x.flip(1),
    "other strides": lambda x: x.as_strided(x.shape, (x.stride(0), x.stride(1), 1, 2)),
    "another offset": lambda x: torch.cat([x, x[:, :1]], 1).as_strided(x.shape, (0, 32, 16, 1), 32),
    "one token for all": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("other", SAME)
def test_views_that_other_code_made_are_known_by_what_they_hold(other: str) -> None:
    function = torch.compile(Packed(SAME[other]), backend="rainfusion", options=OPTIONS)
    everything = torch.compile(Packed(SAME[other]), backend="rainfusion", options={**OPTIONS, "sparsity": 0.0})
    for grid in (*GRIDS, *GRIDS):
        latents = randn(1, 4, *grid)
        assert call(function, latents)[1] == {grid}
        out, found = call(everything, latents)
        assert found == {grid}
        with torch.no_grad():
            torch.testing.assert_close(out, Packed(SAME[other])(latents))


@pytest.mark.parametrize(("other", "batch"), [*((name, 1) for name in OTHERS), ("itself", 2)])
def test_views_of_something_else_stay_dense(other: str, batch: int) -> None:
    """Of two videos, each key is one's alone; what joins them in one sequence is not followed."""
    change = {**SAME, **OTHERS}[other]
    latents = randn(batch, 4, *GRIDS[0])
    out, found = call(torch.compile(Packed(change), backend="rainfusion", options=OPTIONS), latents)
    assert found == {None}
    with torch.no_grad():
        torch.testing.assert_close(out, Packed(change)(latents))
