# SPDX-License-Identifier: Apache-2.0
"""Queries of the video, keys of text and video: matched as the self-attention over both without the rows of text."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import randn
from one_attention import TEXT, H, N, T, W, attend, flat, reason
from one_attention import match as match_of
from torch import Tensor, nn

from rainfusion_compile.passes.match.partial_queries import find_partial_queries
from rainfusion_compile.passes.provenance.axes import cut_axis, join
from rainfusion_compile.passes.provenance.axis import Axis, Cut
from rainfusion_compile.sparsity.layout import VideoLayout

pytestmark = pytest.mark.usefixtures("fixed_phases", "fresh_dynamo")


class Joint(nn.Module):
    """Latents, a 3-D convolution, and `tokens` of its output: of the queries, of the keys, of the values if others."""

    def __init__(self, tokens: Any, mask: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.mask = tokens, mask
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.text, self.more = nn.Parameter(randn(2, TEXT, 32)), nn.Parameter(randn(2, 5, 32, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, *values = self.tokens(self.patch(x), self.text, self.more)
        return attend(queries, keys, (values or [keys])[0], self.mask)


def match(tokens: Any, mask: Tensor | None = None, **options: Any) -> Any:
    return match_of(Joint(tokens, mask), **options)


def why(tokens: Any, mask: Tensor | None = None, **options: Any) -> str:
    return reason(Joint(tokens, mask), **options)


def text_before(y: Tensor, text: Tensor, more: Tensor) -> tuple[Tensor, ...]:
    return flat(y), torch.cat([text, flat(y)], 1)


def text_of_queries(y: Tensor, text: Tensor, more: Tensor) -> tuple[Tensor, ...]:
    return torch.cat([flat(y), more], 1), torch.cat([text, flat(y), more], 1)


def two_videos(y: Tensor, text: Tensor, more: Tensor) -> tuple[Tensor, ...]:
    both = torch.cat([flat(y[:, :, :2]).clone(), more, flat(y)], 1)
    return both, torch.cat([both, text], 1)


@pytest.mark.parametrize(
    ("tokens", "grid", "text", "partial_queries"),
    [
        (text_before, (T, H, W), (9, 0), (9, 0)),
        (lambda y, text, more: (flat(y), torch.cat([flat(y), text], 1)), (T, H, W), (0, 9), (0, 9)),
        (lambda y, text, more: (flat(y), torch.cat([text, flat(y), more], 1)), (T, H, W), (9, 5), (9, 5)),
        (text_of_queries, (T, H, W), (9, 5), (9, 0)),
        (two_videos, ((2, H, W), (T, H, W)), (0, 5, 9), (0, 9)),
        (lambda y, text, more: ((x := torch.cat([text, flat(y)], 1))[:, TEXT:], x), (T, H, W), (9, 0), (9, 0)),
        (lambda y, text, more: ((x := torch.cat([text, flat(y)], 1))[:, 4:], x), (T, H, W), (9, 0), (4, 0)),
    ],
    ids=["before", "after", "both sides", "text with queries", "two videos", "sliced", "sliced in the text"],
)
def test_queries_of_a_run_of_tokens(tokens, grid, text, partial_queries):
    found = match(tokens)
    assert (found.reason, found.grid, found.text, found.partial_queries) == (None, grid, text, partial_queries)
    assert found.keys == found.tokens + sum(partial_queries) == VideoLayout(grid, text).tokens


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (lambda y, text, more: (flat(y)[:, H * W :], flat(y)), "70 queries, 105 keys; too many"),
        (lambda y, text, more: (flat(y)[:, W:], flat(y)), "98 queries, 105 keys"),
        (lambda y, text, more: (flat(y), torch.cat([flat(y), flat(y[:, :, :1]).clone()], 1)), "too many"),
        (
            lambda y, text, more: (flat(y), torch.cat([flat(y), flat(y[:, :, :1, :2]).clone()], 1)),
            "tokens of the video",
        ),
        (lambda y, text, more: (flat(y), torch.cat([text] * 3 + [flat(y)], 1)), "105 queries, 132 keys; too many"),
        (lambda y, text, more: (flat(y).flip(1), torch.cat([text, flat(y)], 1)), "105 queries, 114 keys"),
        (
            lambda y, text, more: (torch.cat([flat(y), more], 1), torch.cat([more, text, flat(y)], 1)),
            "110 queries, 119",
        ),
        (lambda y, text, more: (flat(y)[:, :W], torch.cat([text, flat(y).flip(1)], 1)), "7 queries, 114 keys"),
        (
            lambda y, text, more: (flat(y), torch.cat([text, flat(y)], 1), torch.cat([flat(y), text], 1)),
            "keys and values are not provably the same tokens",
        ),
    ],
    ids=["frames", "a row", "a frame again", "two rows again", "text", "flipped", "apart", "others", "values"],
)
def test_what_stays_dense(tokens, expected):
    found = why(tokens)
    assert found.startswith("cross-attention: ")
    assert expected in found


def test_a_run_that_is_there_twice_is_none():
    x, text = (Axis(20),), (Axis(3),)
    assert find_partial_queries(x, join([x, text])) == (0, 3)
    assert find_partial_queries(x, join([x, text, x])) is None


@given(st.integers(0, 9), st.integers(1, 30), st.integers(0, 9), st.integers(0, 40), st.integers(1, 40))
def test_slices_of_one_axis(before, count, after, start, queries):
    """The keys are a slice with text around; the queries another slice. What is found is true."""
    whole = Axis(80)
    key = cut_axis(whole, 5, 5 + count, 1)
    query = cut_axis(whole, start, start + queries, 1)
    found = find_partial_queries((query,), join([(Axis(before),), (key,), (Axis(after),)]))
    inside = start >= 5 and start + queries <= 5 + count
    if inside and queries > 1:
        assert found == (before + start - 5, 5 + count - start - queries + after)
    else:
        assert found is None


def test_the_cut_of_a_cut():
    whole = Axis(50)
    one = cut_axis(cut_axis(whole, 10, 40, 1), 5, 20, 1)
    assert one.cut == Cut(whole, 15, 30, 1)
    assert find_partial_queries((one,), (cut_axis(whole, 10, 40, 1),)) == (5, 10)


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (torch.ones(2, 1, 1, N + TEXT, dtype=torch.bool), "bool"),
        (torch.zeros(2, 1, 1, N + TEXT).expand(2, 2, N, N + TEXT), "additive"),
    ],
)
def test_masks_of_keys(mask, kind):
    found = match(text_before, mask)
    assert (found.reason, found.key_mask_kind, found.text) == (None, kind, (9, 0))


def test_other_masks_stay_dense():
    mask = torch.ones(1, 1, N, N + TEXT, dtype=torch.bool)
    assert why(text_before, mask).startswith("mask depends on the query")


def test_a_mask_of_queries_stays_dense():
    keys, queries = torch.ones(2, N + TEXT, dtype=torch.bool), torch.ones(2, N, dtype=torch.bool)

    def model(x: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
        return attend(x[:, TEXT:], x, x, keys[:, None, None, :] & queries[:, None, :, None])

    x = randn(2, N + TEXT, 32)
    assert reason(model, x, keys, queries, grid=(T, H, W)).startswith("mask depends on the query")


def sliced(x: Tensor) -> Tensor:
    return attend(x[:, TEXT:], x, x)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (9, 0)),
        ((9, 0), (9, 0)),
        ((0, 0), "114 tokens do not fit"),
        ((4, 5), "tokens of the video have no query"),
        ((0, 9), "tokens of the video have no query"),
    ],
)
def test_the_grid_given(text, expected):
    """Where text is not told, it is the tokens without a query."""
    x = randn(2, N + TEXT, 32)
    assert "unstructured" in reason(sliced, x)
    found = match_of(sliced, x, grid=(T, H, W), text=text)
    if isinstance(expected, tuple):
        assert (found.reason, found.grid, found.text) == (None, (T, H, W), expected)
    else:
        assert expected in found.reason


def test_min_tokens_counts_queries():
    assert match(text_before, min_tokens=N).reason is None
    assert why(text_before, min_tokens=N + 1) == f"{N} tokens, fewer than min_tokens={N + 1}"
