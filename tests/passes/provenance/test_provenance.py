# SPDX-License-Identifier: Apache-2.0
"""Unmodified diffusers models: exactly their video self-attentions are found, with grid and text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Grid, ModelCase, capture, randn
from torch import Tensor, fx, nn

from rainfusion_compile.passes.attention_match import AttentionMatch
from rainfusion_compile.passes.match.find import find_attentions
from rainfusion_compile.passes.provenance.trace import trace

Builder = Callable[[Grid, int], ModelCase]

# a grid that no tile divides, and a single frame
GRIDS: list[tuple[Grid, int]] = [((3, 5, 7), 2), ((1, 5, 7), 1)]


def attentions(case: ModelCase) -> list[AttentionMatch]:
    (graph,) = capture(case.model, **case.inputs)
    with torch.no_grad():
        return find_attentions(graph)


def check(case: ModelCase) -> None:
    found = attentions(case)
    video = [match for match in found if match.reason is None]
    assert [(match.grid, match.text) for match in video] == [(case.grid, case.text)] * case.video, found
    dense = [match for match in found if match.reason is not None]
    assert len(dense) == case.dense
    for match in dense:
        assert match.grid is None
        # text, or text and video, but never a video that was not understood
        assert match.reason.startswith(("cross-attention", "mask depends", "head dim", "tokens: ")), match.reason


@pytest.mark.parametrize(("grid", "batch"), GRIDS)
@pytest.mark.parametrize("name", models.VIDEO_MODELS)
def test_video_self_attentions_are_found(name: str, grid: Grid, batch: int) -> None:
    check(models.VIDEO_MODELS[name](grid, batch))


def test_states_of_a_scan_over_the_frames_are_in_no_known_order() -> None:
    """Each is computed from many frames and put into a list: nothing shows which of them it stands for."""
    case = models.sana_wm((4, 4, 4))
    assert case.video
    for match in attentions(case):
        assert match.reason is not None, match


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox_rotary", "cogvideox_15", "allegro", "ltx"])
def test_axes_of_one_size_are_told_apart(name: str) -> None:
    check(models.VIDEO_MODELS[name]((4, 4, 4), 1))


@pytest.mark.parametrize(
    ("name", "grid", "batch"),
    [
        ("wan", (3, 1, 7), 1),
        ("cogvideox", (3, 5, 1), 2),
        ("cogvideox_15", (1, 4, 4), 2),
        ("ltx", (3, 1, 7), 1),
        ("ltx", (3, 5, 1), 2),
        ("kandinsky5", (1, 4, 4), 2),
    ],
)
def test_dims_of_size_one_stay_in_place(name: str, grid: Grid, batch: int) -> None:
    check(models.VIDEO_MODELS[name](grid, batch))


def test_names_come_from_the_modules() -> None:
    found = attentions(models.hunyuan_video((2, 3, 4)))
    assert [match.name for match in found] == [
        "context_embedder.token_refiner.refiner_blocks.0.attn",
        "transformer_blocks.0.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    ]


def test_key_masks() -> None:
    refiner, *video = attentions(models.hunyuan_video((2, 3, 4), 2))
    assert not refiner.mask.keys
    assert [match.key_mask_kind for match in video] == ["bool"] * 3
    masked, crossed = attentions(models.allegro((2, 3, 4), 2, mask=True))[:2]
    assert masked.key_mask_kind == "additive"
    assert not crossed.mask.keys


def test_attention_inside_frames_is_an_image() -> None:
    """Latte attends inside frames, then along time: no attention there is over the video."""
    spatial, text, temporal = attentions(models.latte((3, 5, 7)))
    assert (spatial.reason, spatial.grid, spatial.batch) == (None, (1, 5, 7), 3)
    assert text.reason is not None
    assert temporal.reason is not None


@pytest.mark.parametrize("name", ["cogvideox_15", "ltx"])
def test_symbolic_sizes_get_no_guards(name: str) -> None:
    case = models.VIDEO_MODELS[name]((3, 5, 7), 2)
    (graph,) = capture(case.model, dynamic=True, **case.inputs)
    sizes = [size for node in graph.graph.nodes for size in getattr(node.meta.get("example_value"), "shape", ())]
    shape_env = next(size.node.shape_env for size in sizes if isinstance(size, torch.SymInt))
    before = (len(shape_env.guards), dict(shape_env.replacements))
    with torch.no_grad():
        found = find_attentions(graph)
    assert [match.grid for match in found if match.reason is None] == [case.grid] * case.video
    assert (len(shape_env.guards), dict(shape_env.replacements)) == before


def test_each_call_has_its_own_grid() -> None:
    """Two videos of one token count, one after the other through one model."""
    for grid in [(2, 4, 6), (2, 6, 4), (2, 4, 6)]:
        video = [match.grid for match in attentions(models.ltx(grid)) if match.reason is None]
        assert video == [grid] * 2


def test_dynamic_graphs_stay_dynamic() -> None:
    """Inside the compiler, too: looking at a graph makes no second one."""
    found = []

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        found.append([match.grid for match in find_attentions(graph)])
        return graph.forward

    def run(x: Tensor, weight: Tensor) -> Tensor:
        q = F.conv3d(x, weight).flatten(2).transpose(1, 2).unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for t, h, w in [(3, 5, 7), (4, 6, 8), (5, 9, 10)]:
            assert compiled(randn(1, 4, t, h, w), randn(16, 4, 1, 1, 1)).shape == (1, 1, t * h * w, 16)
    assert found == [[(3, 5, 7)]]


def test_the_graph_is_left_alone() -> None:
    case = models.cogvideox((2, 3, 4), rotary=True)
    (graph,) = capture(case.model, **case.inputs)
    code = graph.code
    values = [node.meta.get("example_value") for node in graph.graph.nodes]
    with torch.no_grad():
        find_attentions(graph)
    assert graph.code == code
    assert all(node.meta.get("example_value") is value for node, value in zip(graph.graph.nodes, values, strict=True))
    assert torch.is_grad_enabled()


def test_autocast_does_not_hide_the_grid() -> None:
    case = models.wan((3, 5, 7))

    def run(**inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return case.model(**inputs)

    (graph,) = capture(run, **case.inputs)
    with torch.no_grad():
        video = [match for match in find_attentions(graph) if match.reason is None]
    assert [match.grid for match in video] == [(3, 5, 7)] * 2
    assert {match.out_dtype for match in video} == {torch.bfloat16}


def test_many_layers_take_seconds() -> None:
    case = models.wan((2, 3, 4), layers=10)
    (graph,) = capture(case.model, **case.inputs)
    start = time.process_time()
    with torch.no_grad():
        trace(graph)
    assert time.process_time() - start < 5


# --- graphs without video tokens -------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Random layers on `[B, S, C]` tokens that came from nowhere, with attentions in between."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in steps)
        self.table = nn.Parameter(randn(24, 32))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        for step, layer in zip(self.steps, self.layers, strict=True):
            b, s, c = x.shape
            if step == "attention":
                q, k, v = (item.view(b, s, 2, c // 2).transpose(1, 2) for item in (layer(x), x, x * 2))
                x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, c)
            elif step == "cross":
                q, k = (item.view(b, -1, 2, c // 2).transpose(1, 2) for item in (layer(x), other))
                x = F.scaled_dot_product_attention(q, k, k).transpose(1, 2).reshape(b, s, c)
            elif step == "linear":
                x = F.silu(layer(x)) + x
            elif step == "norm":
                x = F.layer_norm(x, (c,)) * self.table[:s]
            elif step == "flip":
                x = x.flip(1)
            elif step == "cat":
                x = torch.cat([x[:, s // 2 :], x[:, : s // 2]], 1)
            elif step == "view":
                x = x.reshape(b, 2, 3, s // 6, c).transpose(1, 2).reshape(b, s, c)
            elif step == "positions":
                x = x + torch.outer(torch.arange(s, dtype=x.dtype), torch.arange(c, dtype=x.dtype)).sin()
        return x


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.sampled_from(["attention", "cross", "linear", "norm", "flip", "cat", "view", "positions"]),
        min_size=2,
        max_size=8,
    )
)
def test_nothing_is_found_where_there_is_no_video(steps: list[str]) -> None:
    (graph,) = capture(Mixer([*steps, "attention"]), randn(2, 24, 32), randn(2, 10, 32))
    with torch.no_grad():
        found = find_attentions(graph)
    assert found
    assert all(match.reason is not None for match in found)


def test_unknown_operators_hide_the_grid() -> None:
    """What an operator without a rule makes of tokens is not known, so nothing is claimed."""

    def run(x: Tensor, weight: Tensor) -> Tensor:
        tokens = F.conv3d(x, weight).flatten(2).transpose(1, 2)
        tokens = torch.ops.aten._fft_r2c(tokens, [1], 0, False).real.contiguous()
        q = tokens.unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q)

    (graph,) = capture(run, randn(1, 4, 3, 5, 7), randn(16, 4, 1, 1, 1))
    with torch.no_grad():
        (match,) = find_attentions(graph)
    assert match.reason == "the order of tokens is lost at _fft_r2c"


def test_nothing_to_find_costs_nothing() -> None:
    graph = fx.symbolic_trace(nn.Linear(2, 2))
    assert find_attentions(graph) == []


def rotated(x: Tensor) -> Tensor:
    """By positions of a mesh, frames before rows before columns."""
    places = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), torch.arange(7.0), indexing="ij")
    return x * (places[0] + 10 * places[1] + 100 * places[2]).flatten()[:, None].sin()


@pytest.mark.parametrize("before", [False, True])
def test_pieces_are_what_their_whole_is_found_to_be(before: bool) -> None:
    """Whether they were cut before or after that, and whichever of them showed it."""

    def run(x: Tensor) -> Tensor:
        q, k, v = 2 * x, 3 * x, 4 * x
        if not before:
            k = rotated(k)
        q, k, v = (part[:, : 2 * 5 * 7].unflatten(-1, (2, 16)).transpose(1, 2) for part in (q, k, v))
        if before:
            rotated(x)
        return F.scaled_dot_product_attention(q, k, v)

    def part_of_a_sequence(x: Tensor) -> Tensor:
        q, k, v = (part[:, 9:] for part in (2 * x, 3 * x, 4 * x))
        heads = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (rotated(q), rotated(k), v))
        return F.scaled_dot_product_attention(*heads)

    for model, tokens, grid in ((run, 105, (2, 5, 7)), (part_of_a_sequence, 114, (3, 5, 7))):
        (graph,) = capture(model, randn(1, tokens, 32))
        with torch.no_grad():
            (match,) = find_attentions(graph)
        assert (match.reason, match.grid) == (None, grid)


@pytest.mark.parametrize("views", [False, True])
def test_a_dim_of_one_index_may_stand_among_the_grids(views: bool) -> None:
    """Where each of several views, here of one, is a video in the batch, or each frame a video of one frame."""
    weight = randn(32, 32, 1, 1, 1)

    def run(x: Tensor) -> Tensor:  # [B, 1, T, H, W, C] or [B, T, 1, H, W, C]
        tokens = F.conv3d(x.flatten(0, 1).permute(0, 4, 1, 2, 3), weight)
        tokens = tokens.unflatten(0, x.shape[:2]).permute(0, 1, 3, 4, 5, 2).flatten(1, 4)
        q = tokens.unflatten(-1, (2, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q)

    def frames(x: Tensor) -> Tensor:  # [B, T, H, W, C]
        return run(x.unsqueeze(2))

    (graph,) = capture(run, randn(1, 1, 3, 5, 7, 32)) if views else capture(frames, randn(1, 3, 5, 7, 32))
    with torch.no_grad():
        (match,) = find_attentions(graph)
    assert (match.reason, match.grid) == (None, (3, 5, 7))


def test_a_linear_layer_of_one_vector_does_not_hide_the_grid() -> None:
    """It changes the shape of its result in place."""

    def run(x: Tensor, weight: Tensor, time: Tensor) -> Tensor:
        scale = F.linear(time, weight.flatten(1))
        q = (F.conv3d(x, weight).flatten(2).transpose(1, 2) * scale).unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q)

    (graph,) = capture(run, randn(1, 4, 3, 5, 7), randn(16, 4, 1, 1, 1), randn(4))
    with torch.no_grad():
        (match,) = find_attentions(graph)
    assert (match.reason, match.grid) == (None, (3, 5, 7))
