# SPDX-License-Identifier: Apache-2.0
"""Text and video that code outside all graphs takes apart, as a model does whose frame is left to Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import randn
from torch import Tensor, nn

import rainfusion_compile

GRID, TEXT = (5, 7, 11), 9
N = TEXT + 5 * 7 * 11
OPTIONS: dict[str, Any] = {"min_tokens": 0, "sparsity": 0.5, "error": 1.0}
pytestmark = pytest.mark.usefixtures("fixed_phases", "fresh_dynamo")
Pieces = Callable[[Tensor], list[Tensor]]


class Joint(nn.Module):
    """Text and video come in one sequence; other code cuts that in `pieces`, which are put together and attended to."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pieces = torch.compiler.disable(pieces)
        self.patch, self.text, self.qkv = nn.Conv3d(4, 32, 1), nn.Linear(8, 32), nn.Linear(32, 96)

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([self.text(text), self.patch(latents).flatten(2).transpose(1, 2)], 1)
        x = torch.cat(self.pieces(x), 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)


def written(x: Tensor) -> list[Tensor]:
    x[0, TEXT + 3].copy_(x[0, TEXT + 4])
    return [x[:, :TEXT], x[:, TEXT:]]


SAME: dict[str, tuple[Pieces, tuple[int, int]]] = {
    "slices": (lambda x: [x[:, :TEXT], x[:, TEXT:]], (TEXT, 0)),
    "split": (lambda x: [*x.split([TEXT, N - TEXT], 1)], (TEXT, 0)),
    "the video alone": (lambda x: [x[:, TEXT:]], (0, 0)),
    "some of the text": (lambda x: [x[:, 4:]], (TEXT - 4, 0)),
    "the text after it": (lambda x: [x[:, TEXT:], x[:, :TEXT]], (0, TEXT)),
    "slices of slices": (lambda x: [x[:, 2:][:, : TEXT - 2], x[:, 2:][:, TEXT - 2 :]], (TEXT - 2, 0)),
    "the video in pieces": (lambda x: [x[:, :TEXT], x[:, TEXT : TEXT + 80], x[:, TEXT + 80 :]], (TEXT, 0)),
}
OTHERS: dict[str, Pieces] = {
    "written": written,
    "the video's ends exchanged": lambda x: [x[:, :TEXT], x[:, TEXT + 80 :], x[:, TEXT : TEXT + 80]],
    "not all of the video": lambda x: [x[:, :TEXT], x[:, TEXT:-11]],
    "every other token": lambda x: [x[:, TEXT::2], x[:, TEXT + 1 :: 2]],
    "part of the features": lambda x: [torch.cat([x[..., 16:], x[..., :16]], -1).flip(1)],
    "one piece twice": lambda x: [x[:, TEXT : TEXT + 192], x[:, TEXT : TEXT + 193]],
}


def call(pieces: Pieces, batch: int, **options: Any) -> tuple[Tensor, Tensor, set[Any]]:
    """The output, that of the model itself, and where attention was sparse over which grid and text."""
    model, inputs = Joint(pieces), (randn(batch, 4, *GRID), randn(batch, TEXT, 8))
    compiled = torch.compile(model, backend="rainfusion", options={**OPTIONS, **options})
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out, want = compiled(*inputs), model(*inputs)
    entries = [one for one in report.to_dict()["attentions"] if one["status"] == "sparse"]
    return out, want, {(tuple(one["grid"]), tuple(one["text"])) for one in entries}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", SAME)
def test_slices_are_known_by_what_they_are_slices_of(name: str, batch: int) -> None:
    pieces, text = SAME[name]
    out, want, found = call(pieces, batch, sparsity=0.0)
    assert found == {(GRID, text)}
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("name", OTHERS)
def test_slices_of_something_else_stay_dense(name: str) -> None:
    out, want, found = call(OTHERS[name], 1)
    assert not found
    torch.testing.assert_close(out, want)


class Asks(nn.Module):
    """One half of a sequence asks the other, after a graph between, or with one table of positions for both."""

    def __init__(self, between: bool, positions: bool, text: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text, size = text, 5 * 7 * 11
        self.cut = torch.compiler.disable(lambda x: (x[:, :size], x[:, size:]))
        self.between = torch.compiler.disable(lambda one, other: (one, other)) if between else None
        self.positions = nn.Parameter(torch.randn(1, size, 32)) if positions else None
        self.patch, self.queries, self.keys = nn.Conv3d(4, 32, 1), nn.Linear(32, 32), nn.Linear(32, 64)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        first = one.flatten(1, 2)[..., :32] if self.text else self.patch(one).flatten(2).transpose(1, 2)
        x, y = self.cut(torch.cat([first, self.patch(other).flatten(2).transpose(1, 2)], 1))
        if self.between is not None:
            x, y = self.between(x * 2, y * 2)
        if self.positions is not None:
            x, y = x + self.positions, y + self.positions
        keys, values = self.keys(y).chunk(2, -1)
        q, k, v = (one.unflatten(-1, (2, 16)).transpose(1, 2) for one in (self.queries(x), keys, values))
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("text", [0, 385])
@pytest.mark.parametrize(("between", "positions"), [(False, False), (True, False), (False, True), (True, True)])
def test_slices_of_one_tensor_are_not_the_same_tokens(between: bool, positions: bool, text: int) -> None:
    """Two videos, or a video and as long a text, in one sequence: one of them asks the other."""
    model = Asks(between, positions, text)
    inputs = (randn(1, 35, 11, 32) if text else randn(1, 4, *GRID)), randn(1, 4, *GRID)
    compiled = torch.compile(model, backend="rainfusion", options=OPTIONS)
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out, want = compiled(*inputs), model(*inputs)
    assert all(one["status"] == "dense" for one in report.to_dict()["attentions"])
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("starts", [(4, 2), (2, 4), (0, 4), (4, 0)])
def test_overlapping_slices_go_through_one_graph(starts: tuple[int, int]) -> None:
    """Of one sequence, from two places on: each is what it is, or dense."""

    class Two(Joint):
        def forward(self, latents: Tensor, text: Tensor) -> Tensor:
            x = torch.cat([self.text(text), self.patch(latents).flatten(2).transpose(1, 2)], 1)
            one, other = again(*(2 * piece for piece in self.pieces(x)))
            q, k, v = self.qkv(one + other.mean(1, True)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k, v)

    again = torch.compiler.disable(lambda one, other: (one, other))
    model, inputs = Two(lambda x: [x[:, start:] for start in starts]), (randn(1, 4, *GRID), randn(1, TEXT, 8))
    compiled = torch.compile(model, backend="rainfusion", options={**OPTIONS, "sparsity": 0.0})
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out, want = compiled(*inputs), model(*inputs)
    torch.testing.assert_close(out, want)
    sparse = [one for one in report.to_dict()["attentions"] if one["status"] == "sparse"]
    assert all((one["grid"], one["text"]) == ([*GRID], [TEXT - starts[0], 0]) for one in sparse)
