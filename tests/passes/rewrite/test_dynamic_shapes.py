# SPDX-License-Identifier: Apache-2.0
"""One compiled graph for many resolutions: no more compilations than plain Inductor's, and always the right grid."""

import math
from typing import Any

import models
import pytest
import small_video
import torch
import torch.nn.functional as F
from resolutions import (
    CLOSE,
    EVERYTHING,
    GRIDS,
    OPTIONS,
    Video,
    by_function,
    call,
    compiled_by_us,
    latents,
    plain_compilations,
)
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import rainfusion_compile
from rainfusion_compile.options import Options
from rainfusion_compile.passes.graph.symbolic_sizes import InputSizes
from rainfusion_compile.passes.match.find import find_attentions
from rainfusion_compile.passes.provenance.known_tokens import NOTHING
from rainfusion_compile.passes.rewrite.analysis import Plan, analyse
from rainfusion_compile.runtime import compiled_graphs
from rainfusion_compile.runtime.compiled_graphs import CompiledGraph

pytestmark = pytest.mark.usefixtures("fixed_phases")


@pytest.fixture
def dynamic_graphs(monkeypatch):
    """The graphs for many resolutions that are made."""
    made = []
    init = CompiledGraph.__init__

    def noted(self: Any, compiled: Any, plan: Any, *args: Any) -> None:
        init(self, compiled, plan, *args)
        made.extend([self] if plan.any_size and plan.sparse else [])

    monkeypatch.setattr(CompiledGraph, "__init__", noted)
    return made


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Video().eval()


def static(model, *args, **kwargs):
    """The same by a graph of one resolution."""
    torch._dynamo.reset()
    out, attentions = call(compiled_by_us(model, dynamic=False), *args, **kwargs)
    torch._dynamo.reset()
    return out, attentions


# --- one graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_no_compilations_beyond_the_usual_ones(model, compilations, dynamic):
    calls = [((latents(grid),), {}) for grid in GRIDS]
    expected = [static(model, *args) for args, _ in calls]
    usual = plain_compilations(model, calls, dynamic)
    compilations.clear()
    function = compiled_by_us(model, dynamic=dynamic)
    for grid, (args, _), (out, attentions) in zip(GRIDS, calls, expected, strict=True):
        got, found = call(function, *args)
        torch.testing.assert_close(got, out)
        with torch.no_grad():
            assert grid == GRIDS[2] or (got - model(*args)).abs().max() > 0.1  # blocks are too coarse for that one
        assert [(a["status"], a["grid"], a["text"], a["tokens"]) for a in found] == [
            ("sparse", list(grid), [0, 0], grid[0] * grid[1] * grid[2])
        ] * 2
        for entry, was in zip(found, attentions, strict=True):
            assert entry["patterns"] == was["patterns"]
            assert entry["density"] == was["density"]
            assert entry["sparsity"] == was["sparsity"]
            assert entry["layer_error"] == pytest.approx(was["layer_error"])
    assert len(compilations) == usual < len(calls)


@pytest.mark.inductor
def test_through_inductor_without_recompiling(model):
    function = compiled_by_us(model)
    call(function, latents(GRIDS[0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for grid in GRIDS[1:3]:
            got, found = call(function, latents(grid))
            assert [a["grid"] for a in found] == [list(grid)] * 2
            torch.testing.assert_close(got, by_function(model, latents(grid), grid=grid), **CLOSE)


def test_everything_kept_equals_dense(model, compilations):
    function = compiled_by_us(model, options=EVERYTHING)
    for grid in GRIDS:
        with torch.no_grad():
            torch.testing.assert_close(function(latents(grid)), model(latents(grid)), **CLOSE)
    assert len(compilations) == 1


@pytest.mark.parametrize(("name", "dynamic"), [("wan", None), ("hunyuan_video", True), ("ltx", None)])
def test_models_of_diffusers(name, dynamic, compilations):
    pytest.importorskip("diffusers")
    build = models.VIDEO_MODELS[name]
    grids = ((3, 5, 8), (3, 8, 5), (2, 7, 9))
    model = build(grids[0], 1).model
    cases = [build(grid, 1) for grid in grids]
    usual = plain_compilations(model, [((), case.inputs) for case in cases], dynamic)
    function = compiled_by_us(model, dynamic=dynamic, options=EVERYTHING)
    for case in cases:
        (got,), found = call(function, **case.inputs)
        with torch.no_grad():
            torch.testing.assert_close(got, model(**case.inputs)[0], **CLOSE)
        sparse = [(a["grid"], a["text"]) for a in found if a["status"] == "sparse"]
        assert sparse == [(list(case.grid), list(case.text))] * case.video
    assert len(compilations) == usual


# --- the layouts of a call -------------------------------------------------------------------------------------------


def test_layouts_are_looked_up_by_the_sizes_of_the_inputs(model, compilations, dynamic_graphs):
    """And by nothing less: with the number of tokens as the key, the second call would get the first one's grid."""
    function = compiled_by_us(model)
    for grid in (GRIDS[0], GRIDS[1], GRIDS[0]):
        got, found = call(function, latents(grid))
        assert [a["grid"] for a in found] == [list(grid)] * 2
        torch.testing.assert_close(got, by_function(model, latents(grid), grid=grid), **CLOSE)
    (graph,) = dynamic_graphs
    assert graph.at.cache_info().currsize == 2


def test_every_size_of_the_inputs_is_read():
    seen = []

    def backend(gm, _):
        sizes = InputSizes(gm)

        def run(*args):
            seen.append(sizes.of(args))
            return gm.forward(*args)

        return run

    function = torch.compile(lambda x, y, n: x.sum() + y.sum() * n, backend=backend, fullgraph=True, dynamic=True)
    for shape, length, number in (((3, 4), 5, 6), ((4, 3), 5, 6), ((3, 4), 7, 6), ((3, 4), 5, 8)):
        function(torch.ones(shape), torch.ones(length), number)
    assert [sorted(sizes) for sizes in seen] == [[3, 4, 5, 6], [3, 4, 5, 6], [3, 4, 6, 7], [3, 4, 5, 8]]
    assert len(set(seen)) == 4


def test_the_number_of_remembered_resolutions_is_bounded(model, compilations, dynamic_graphs, monkeypatch):
    monkeypatch.setattr(compiled_graphs, "MAX_RESOLUTIONS", 2)
    function = compiled_by_us(model)
    for grid in (*GRIDS, *GRIDS):
        _, found = call(function, latents(grid))
        assert [a["grid"] for a in found] == [list(grid)] * 2
    (graph,) = dynamic_graphs
    assert graph.at.cache_info().currsize == 2
    assert graph.at.cache_info().misses > 2


def test_a_resolution_is_analysed_once(model, compilations, dynamic_graphs):
    function = compiled_by_us(model)
    for grid in (*GRIDS, *GRIDS):
        call(function, latents(grid))
    (graph,) = dynamic_graphs
    assert graph.at.cache_info().misses == len(set(GRIDS))


def test_what_is_not_sparse_at_these_sizes_is_dense(model, compilations):
    """Also where the first call was the one with too few tokens."""
    function = compiled_by_us(model, options={**OPTIONS, "min_tokens": 500})
    for grid, sparse in (((2, 6, 8), False), ((4, 9, 16), True), ((2, 8, 6), False)):
        got, found = call(function, latents(grid))
        with torch.no_grad():
            dense = model(latents(grid))
        assert torch.allclose(got, dense, **CLOSE) is not sparse
        for entry in found:
            assert entry["status"] == ("sparse" if sparse else "dense")
            assert sparse or entry["reason"] == "96 tokens, fewer than min_tokens=500"
            assert sparse or entry["patterns"] == [["dense", "dense"]]
    assert len(compilations) == 1


def test_text_of_any_length(model, compilations):
    calls = [
        ((latents(grid), models.randn(1, length, 32, seed=1)), {})
        for grid, length in zip(GRIDS[:3], (5, 9, 7), strict=True)
    ]
    usual = plain_compilations(model, calls, True)
    function = compiled_by_us(model)
    for grid, (args, _) in zip(GRIDS[:3], calls, strict=True):
        got, found = call(function, *args)
        text = (0, args[1].shape[1])
        assert [(a["grid"], a["text"]) for a in found] == [(list(grid), list(text))] * 2
        torch.testing.assert_close(got, by_function(model, *args, grid=grid, text=text), **CLOSE)
    assert len(compilations) == usual < len(calls)


@pytest.mark.parametrize("kind", ["keys", "keys and queries", "additive"])
def test_masks(model, compilations, kind):
    def run(video, text, valid):
        video_tokens = video.shape[2] * video.shape[3] * video.shape[4] // 4
        tokens = F.pad(valid, (video_tokens, 0), value=True)
        mask = tokens[:, None, None, :]
        if kind == "keys and queries":
            mask = mask & tokens[:, None, :, None]
        elif kind == "additive":
            mask = (1 - mask.float()) * -1e4
        return model(video, text, mask)

    valid = torch.arange(7) < torch.tensor([[5], [3]])
    calls = [((latents(grid, 2), models.randn(2, 7, 32, seed=1), valid), {}) for grid in GRIDS[:3]]
    usual = plain_compilations(run, calls, True)
    function = compiled_by_us(run, options=EVERYTHING)
    for args, _ in calls:
        got, found = call(function, *args)
        with torch.no_grad():
            torch.testing.assert_close(got, run(*args), **CLOSE)
        assert [a["status"] for a in found] == ["sparse"] * 2
    assert len(compilations) == usual


def test_a_head_dim_that_changes_stays_dense(compilations):
    """Its scale would be that of the first call."""

    def run(video):
        q = video.flatten(2).transpose(1, 2).unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q)

    function = compiled_by_us(lambda video: run(F.conv3d(video, torch.eye(video.shape[1])[..., None, None, None])))
    for channels in (16, 24, 32):
        video = models.randn(1, channels, 3, 6, 9)
        got, found = call(function, video)
        torch.testing.assert_close(got, run(video))
        assert [a["status"] for a in found] == ["dense"]


def test_a_given_text_that_contradicts_the_graph_leaves_it_dense(model, compilations):
    function = compiled_by_us(model, options={**OPTIONS, "text": (7, 0)})
    for grid in GRIDS[:2]:
        _, found = call(function, latents(grid))
        assert {a["reason"] for a in found} == {"the graph shows text=(0, 0), not text=(7, 0)"}


def test_dense_layers(model, compilations):
    function = compiled_by_us(model, options={**OPTIONS, "dense_layers": 1})
    for grid in GRIDS[:3]:
        _, found = call(function, latents(grid))
        assert [(a["status"], a["reason"]) for a in found] == [
            ("dense", "kept dense by dense_layers"),
            ("sparse", None),
        ]
    assert len(compilations) == 1


def test_the_report_counts_every_call_by_its_own_densities(model, compilations):
    function = compiled_by_us(model)
    each = [call(function, latents(grid))[1][0] for grid in GRIDS[:3]]
    densities = [torch.tensor(entry["density"]).mean().item() for entry in each]
    assert len(set(densities)) > 1
    with torch.no_grad(), rainfusion_compile.observe() as report:
        for grid in GRIDS[:3]:
            function(latents(grid))
    entry = report.to_dict()["attentions"][0]
    assert entry["calls"] == 3
    work = [math.prod(grid) ** 2 for grid in GRIDS[:3]]
    kept = sum(density * pairs for density, pairs in zip(densities, work, strict=True))
    assert entry["mean_density"] == pytest.approx(kept / sum(work))
    assert entry["grid"] == list(GRIDS[2])
    assert "6x8x10" in str(report)


def test_autocast_and_inference_mode(model, compilations):
    function = compiled_by_us(model, options=EVERYTHING)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        for grid in GRIDS[:3]:
            got, found = call(function, latents(grid))
            torch.testing.assert_close(got, model(latents(grid)), rtol=5e-2, atol=0.1)
            assert [a["grid"] for a in found] == [list(grid)] * 2
    assert len(compilations) == 1


def test_inference_mode_hides_no_reordering():
    """Tokens written in another order through a view; calls are analysed in whatever mode they run."""

    def run(video):
        x = F.conv3d(video, torch.ones(16, 3, 1, 1, 1))
        x.view(1, 16, 3, 108).copy_(x.flatten(3).flip(3))
        q = x.flatten(2).transpose(1, 2).unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q)

    (gm,) = models.capture(run, latents((3, 3, 9)))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            (match,) = find_attentions(gm)
        assert match.reason is not None
        assert match.reason.startswith("tokens are reordered"), mode


def test_torch_remembers_nothing_of_the_sizes_of_calls():
    """It would for good, for every operator: some 20 KiB for each resolution of a model of one layer."""
    found: list[Plan] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(analyse(gm, Options(min_tokens=0), lambda: NOTHING))
        return gm

    with torch.no_grad():
        torch.compile(small_video.Video(layers=1), backend=backend, dynamic=True)(torch.randn(1, 3, 5, 18, 22))
    (plan,) = found
    before = FakeTensorMode.cache_info().size
    for height in range(6, 12):
        numbers = tuple(2 * height if number == 18 else number for number in plan.sizes.hints.values())
        (layout,) = plan.at(numbers, NOTHING).shown
        assert layout is not None
        assert layout.grid == (5, height, 11)
    assert FakeTensorMode.cache_info().size == before
