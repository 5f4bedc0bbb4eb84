# SPDX-License-Identifier: Apache-2.0
"""Queries of the video, keys of text and video, rewritten and compiled: what comes out, against references."""

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import capture, randn
from one_attention import TEXT, H, N, T, W, attend, flat, latents
from torch import Tensor, nn
from whole_models import SPARSE, ReferenceAttention, run, sample

import rainfusion_compile
from rainfusion_compile.kernels import reference
from rainfusion_compile.options import Options
from rainfusion_compile.passes.match.partial_queries import density
from rainfusion_compile.passes.rewrite.writer import rewrite
from rainfusion_compile.sparsity.layout import VideoLayout

pytestmark = pytest.mark.usefixtures("fixed_phases", "fresh_dynamo")
OPTIONS = {"min_tokens": 500, "sparsity": 0.6, "error": 1.0}


@st.composite
def parts(draw: st.DrawFn) -> tuple[VideoLayout, int, int]:
    """A layout with blocks to drop, and how many tokens of its text have no query."""
    grid = st.tuples(st.integers(3, 6), st.integers(7, 12), st.integers(9, 16))
    grids = draw(st.one_of(grid.map(lambda one: (one,)), st.tuples(grid, grid)))
    layout = VideoLayout(grids, tuple(draw(st.integers(0, 70)) for _ in range(len(grids) + 1)))
    return layout, draw(st.integers(0, layout.text[0])), draw(st.integers(0, layout.text[-1]))


@settings(max_examples=15)
@given(
    parts(),
    st.sampled_from([None, "bool", "additive"]),
    st.sampled_from([0.0, 0.6, (0.9, 0.5)]),
    st.sampled_from(["error", "recall"]),
    st.integers(0, 99),
)
def test_numbers_and_choices(part, kind, sparsity, arm, seed):
    """Equal to the reference under the same block mask; and what stands for the queries left out has no influence."""
    layout, before, after = part
    queries, tokens = layout.tokens - before - after, layout.tokens
    x, keys, values = (randn(*shape, seed=seed + n) for n, shape in enumerate(((1, 2, tokens, 16), (16, 16), (16, 16))))
    keys, values = keys / 4, values / 4
    k, v = x[:, :1] @ keys, x[:, :1] @ values
    mask = None
    if kind is not None:
        mask = randn(1, 1, 1, tokens, seed=seed + 3)
        mask = mask > -0.8 if kind == "bool" else mask

    def model(x: Tensor, keys: Tensor, values: Tensor, *mask: Tensor) -> Tensor:
        k, v = x[:, :1] @ keys, x[:, :1] @ values
        return F.scaled_dot_product_attention(x[:, :, before : tokens - after], k, v, *mask, enable_gqa=True)

    args = (x, keys, values) if mask is None else (x, keys, values, mask)
    (graph,) = capture(model, *args)
    given: dict[str, Any] = {"arm": arm, **({"error": 1.0} if arm == "error" else {"min_recall": 0.0})}
    options = Options(min_tokens=0, sparsity=sparsity, grid=layout.grid, text=layout.text, **given)
    with torch.no_grad():
        report = rewrite(graph, options)
        if 4 * (before + after) > queries:
            assert "too many" in report.attentions[0].reason
            return
        (found,) = report.sparse
        out, choice, errors, recall = graph(*args)
    assert (found.grid, found.text, found.tokens) == (layout.grid, layout.text, queries)
    tables = options.tables(layout)
    key_mask = None if mask is None else mask[:, :, 0]
    expected = reference.block_sparse_attention(x, k, v, choice, key_mask, tables.attention_arguments, 0.25)
    kept = slice(before, tokens - after)
    torch.testing.assert_close(out.double(), expected[:, :, kept], rtol=1e-4, atol=1e-5)
    energy, truth = reference.arm_errors(x, k, v, key_mask, tables.probe_arguments, 0.25)
    torch.testing.assert_close(recall.double(), truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors[..., -1].double(), energy[..., -1], rtol=1e-4, atol=1e-5)
    for number, shown in enumerate(found.densities):
        assert shown == pytest.approx(float(visible(tables, number)[kept].double().mean()))


def visible(tables: Any, pattern: int) -> Tensor:
    """Which keys each query sees: bool, by tokens."""
    tokens = tables.layout.tokens
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    keys = tables.key_blocks
    blocks = tables.block_mask(pattern)
    for row, queries in enumerate(tables.order.long().split(tables.block_q)):
        listed = torch.cat([keys[number] for number in blocks[row].nonzero().flatten().tolist()])
        seen[queries[:, None], listed] = True
    return seen


def test_spelled_by_hand():
    def model(x: Tensor) -> Tensor:
        return (x[:, :, TEXT:] @ x.transpose(-1, -2) / 4).softmax(-1) @ x

    x = randn(2, 2, N + TEXT, 16)
    (graph,) = capture(model, x)
    with torch.no_grad():
        (found,) = rewrite(graph, Options(min_tokens=0, sparsity=0.0, grid=(T, H, W))).sparse
        out, *_ = graph(x)
    assert (found.text, found.tokens) == ((TEXT, 0), N)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


def test_density_of_the_rows_that_there_are():
    assert density(0.5, 8, 8) == 0.5
    assert density((2 * 10 + 8 * 5) / 100, 8, 10) == pytest.approx(0.5)


class Block(nn.Module):
    """Text and video attend as in Cosmos 3: the text to itself, the video to both."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks
        self.text, self.video = (nn.Linear(32, 96) for _ in range(2))

    def forward(self, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        if self.breaks:
            torch._dynamo.graph_break()
        own = self.text(text).chunk(3, -1)
        queries, *both = self.video(video).chunk(3, -1)
        keys, values = (torch.cat(pair, 1) for pair in zip(own[1:], both, strict=True))
        text = text + attend(*own).transpose(1, 2).flatten(2)
        return text, video + attend(queries, keys, values).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.first, self.second = Block(breaks), Block(breaks)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = flat(self.patch(video))
        text, x = self.first(text, x)
        return self.second(text, x)[1]


def check(model: nn.Module, compiled: Any, grid: models.Grid, text: int, sparsity: float) -> None:
    args = latents(grid, 1), randn(1, text, 32, seed=2)
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = compiled(*args)
    found = report.to_dict()["attentions"]
    tokens = torch.Size(grid).numel()
    entries = [entry for entry in found if entry["tokens"] == tokens for _ in range(entry["calls"])]
    assert [(entry["status"], entry["grid"], entry["text"]) for entry in entries] == [
        ("sparse", list(grid), [text, 0])
    ] * 2
    assert all((entry["mean_density"] < 0.9) == (sparsity > 0) for entry in entries)
    if sparsity == 0:
        with torch.no_grad():
            torch.testing.assert_close(out, model(*args), rtol=1e-4, atol=1e-5)
        return
    with torch.no_grad(), ReferenceAttention(entries, {"sparsity": sparsity, "error": 1.0}):
        torch.testing.assert_close(out, model(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dynamic", "sparsity"), [(False, 0.0), (False, 0.6), (True, 0.6)])
def test_compiled(dynamic, sparsity):
    model = Model().eval()
    options = OPTIONS | {"sparsity": sparsity}
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, options=options, dynamic=dynamic)
    for grid, text in (((8, 9, 16), 9), ((8, 9, 16), 30))[: 1 + dynamic]:
        check(model, compiled, grid, text, sparsity)


def test_one_graph_for_many_texts(compilations):
    """Also where a call has no text, or too much of it: dense then, and right."""
    model = Model().eval()
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, options=OPTIONS, dynamic=True)
    for text in (9, 30, 2):
        check(model, compiled, (8, 9, 16), text, OPTIONS["sparsity"])
    args = latents((8, 9, 16), 1), randn(1, 400, 32)
    with torch.no_grad(), rainfusion_compile.observe() as report:
        torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-4, atol=1e-5)
    entry = report.to_dict()["attentions"][1]
    assert (entry["status"], entry["density"]) == ("dense", [[1.0, 1.0]])
    assert entry["reason"].endswith("too many of the same tokens have no query")
    assert len(compilations) == 1


def test_across_graph_breaks():
    model = Model(breaks=True).eval()
    compiled = torch.compile(model, backend="rainfusion", options=OPTIONS | {"sparsity": 0.0})
    for grid in ((8, 9, 16), (8, 16, 9)):
        check(model, compiled, grid, 9, 0.0)


def test_a_shorter_text_and_a_longer_video_are_looked_at_again(compilations):
    """What keeps an attention dense because of its sizes is guarded."""
    model = Model().eval()
    options = OPTIONS | {"min_tokens": 1100}
    compiled = torch.compile(model, backend="rainfusion", options=options, dynamic=True)
    for grid, text, expected in (
        ((8, 10, 16), 400, "cross-attention: 1280 queries, 1680 keys; too many of the same tokens have no query"),
        ((8, 8, 16), 30, "1024 tokens, fewer than min_tokens=1100"),
    ):
        with torch.no_grad(), rainfusion_compile.observe() as report:
            compiled(latents(grid, 1), randn(1, text, 32))
        assert report.to_dict()["attentions"][1]["reason"] == expected
    check(model, compiled, (8, 9, 16), 9, options["sparsity"])


# --- a real model ----------------------------------------------------------------------------------------------------


def test_cosmos3():
    """Tokens are put into one sequence by indices that are data, so the grid is given."""
    case = models.cosmos3((5, 11, 13))
    out, attentions = run(case, grid=case.grid, **SPARSE)
    sparse = [entry for entry in attentions if entry["status"] == "sparse"]
    assert [(tuple(entry["grid"]), tuple(entry["text"]), entry["tokens"]) for entry in sparse] == [
        (case.grid, case.text, 5 * 11 * 13)
    ] * case.video
    assert {entry["reason"] for entry in attentions if entry["status"] == "dense"} == {"causal"}
    assert all(density < 0.9 for entry in sparse for row in entry["density"] for density in row)
    with torch.no_grad():
        dense = sample(case.model(**case.inputs))[0]
        with ReferenceAttention(sparse, SPARSE):
            expected = sample(case.model(**case.inputs))[0]
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-4)
    assert (out[0] - dense).abs().max() > 10 * (out[0] - expected).abs().max()


def test_cosmos3_with_everything_kept():
    case = models.cosmos3((3, 5, 7))
    out, attentions = run(case, grid=case.grid, text=case.text, sparsity=0.0)
    assert sum(entry["status"] == "sparse" for entry in attentions) == case.video
    with torch.no_grad():
        torch.testing.assert_close(out[0], sample(case.model(**case.inputs))[0], rtol=1e-4, atol=1e-4)
