# SPDX-License-Identifier: Apache-2.0
"""The backend as users meet it: ``torch.compile(model, backend="rainfusion")`` on small models of our own."""

import json
import logging
import subprocess
import sys
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_video import Video

import rainfusion_compile
from rainfusion_compile.options import Options
from rainfusion_compile.runtime import compiled_graphs
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import DENSE

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID = (5, 9, 11)
EVERYTHING = {"sparsity": 0.0, "min_tokens": 0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Video().eval()


@pytest.fixture
def video():
    t, h, w = GRID
    return torch.randn(2, 3, t, 2 * h, 2 * w)


def run(model, *args, options=None, **kwargs):
    """Compile and call without gradients; the result and the report."""
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, options={**EVERYTHING, **(options or {})})
    with torch.no_grad(), rainfusion_compile.observe() as report:
        return compiled(*args, **kwargs), report.to_dict()["attentions"]


def statuses(attentions):
    return [entry["status"] for entry in attentions]


def test_the_entry_point_works_without_an_import():
    code = (
        "import sys, torch\n"
        "f = torch.compile(lambda x: x + 1, backend='rainfusion')\n"
        "assert f(torch.ones(2)).tolist() == [2, 2]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attention_is_known_though_another_function_stood_in_its_place_when_the_package_was_imported():
    code = (
        "import torch, torch.nn.functional as F\n"
        "usual = F.scaled_dot_product_attention\n"
        "F.scaled_dot_product_attention = lambda *args: usual(*args)\n"
        "import rainfusion_compile\n"
        "import rainfusion_compile.explainer\n"
        "attend = lambda x: F.scaled_dot_product_attention(x, x, x)\n"
        "options = {'grid': (4, 5, 6), 'min_tokens': 0}\n"
        "for function in (F.scaled_dot_product_attention, usual):\n"
        "    F.scaled_dot_product_attention = function\n"
        "    report = rainfusion_compile.explain(attend, torch.randn(1, 2, 120, 16), options=options)\n"
        "    assert [a['status'] for a in report.to_dict()['attentions']] == ['sparse'], report\n"
        "    torch._dynamo.reset()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.inductor
def test_everything_kept_equals_dense(model, video):
    out, attentions = run(model, video)
    with torch.no_grad():
        torch.testing.assert_close(out, model(video), rtol=1e-4, atol=1e-5)
    assert [a["name"] for a in attentions] == ["blocks.0", "blocks.1"]
    for entry in attentions:
        assert entry["status"] == "sparse"
        assert (entry["grid"], entry["text"], entry["tokens"]) == (list(GRID), [0, 0], 495)
        assert entry["density"] == [[1.0, 1.0]] * 2
        assert [recall for sample in entry["recall"] for recall in sample] == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, video, dtype):
    model, video = model.to(dtype), video.to(dtype)
    out, attentions = run(model, video)
    with torch.no_grad():
        torch.testing.assert_close(out, model(video), rtol=3e-2, atol=3e-2)
    assert statuses(attentions) == ["sparse", "sparse"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(model, video, dtype, default_dtype):
    usual, _ = run(model, video, options={"sparsity": 0.5})
    torch._dynamo.reset()
    block_tables.cache_clear()
    default_dtype(dtype)
    out, attentions = run(model, video, options={"sparsity": 0.5})
    torch.testing.assert_close(out, usual)
    assert statuses(attentions) == ["sparse", "sparse"]


def test_autocast(model, video):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, attentions = run(model, video)
        with torch.no_grad():
            torch.testing.assert_close(out, model(video), rtol=3e-2, atol=3e-2)
    assert statuses(attentions) == ["sparse", "sparse"]


def test_inference_mode(model, video):
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, options=EVERYTHING)
    with torch.inference_mode():
        dense = model(video)
        with rainfusion_compile.observe() as report:
            torch.testing.assert_close(compiled(video), dense, rtol=1e-4, atol=1e-5)
    assert statuses(report.to_dict()["attentions"]) == ["sparse", "sparse"]


def test_key_masks_are_honoured(model, video):
    mask = torch.rand(2, 1, 1, 495) > 0.3
    out, attentions = run(model, video, mask)
    with torch.no_grad():
        torch.testing.assert_close(out, model(video, mask), rtol=1e-4, atol=1e-5)
    assert statuses(attentions) == ["sparse", "sparse"]


def test_query_dependent_masks_causal_and_cross_attention_stay_dense(model, video):
    mask = torch.rand(1, 1, 495, 495) > 0.3
    _, attentions = run(model, video, mask)
    assert statuses(attentions) == ["dense", "dense"]
    assert all("mask depends on the query" in a["reason"] for a in attentions)
    out, attentions = run(model, video, is_causal=True)
    assert {a["reason"] for a in attentions} == {"causal"}
    with torch.no_grad():
        torch.testing.assert_close(out, model(video, is_causal=True), rtol=1e-4, atol=1e-5)


def test_training_stays_dense_and_keeps_its_gradients(model, video):
    compiled = torch.compile(model, backend="rainfusion", options=EVERYTHING)
    with rainfusion_compile.observe() as report:
        compiled(video).square().sum().backward()
    assert {a["reason"] for a in report.to_dict()["attentions"]} == {"needs gradients"}
    got = model.patch.weight.grad.clone()
    model.zero_grad()
    model(video).square().sum().backward()
    torch.testing.assert_close(got, model.patch.weight.grad, rtol=1e-3, atol=1e-3)


def test_dynamic_shapes_have_their_own_grids(model):
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, dynamic=True, options=EVERYTHING)
    for grid in ((4, 6, 10), (4, 10, 6), (3, 8, 10)):  # the first two have as many tokens
        clip = torch.randn(1, 3, grid[0], 2 * grid[1], 2 * grid[2])
        with torch.no_grad():
            dense = model(clip)
        with torch.no_grad(), rainfusion_compile.observe() as report:
            torch.testing.assert_close(compiled(clip), dense, rtol=1e-4, atol=1e-5)
        assert [a["grid"] for a in report.to_dict()["attentions"]] == [list(grid)] * 2


def test_a_dynamic_graph_of_a_short_video_does_not_serve_long_ones(model):
    options = {**EVERYTHING, "min_tokens": 400}
    compiled = torch.compile(lambda clip: model(clip).mean(1), backend="rainfusion", dynamic=True, options=options)
    for grid, status in (((4, 6, 7), "dense"), ((4, 9, 12), "sparse"), ((5, 6, 7), "dense")):
        clip = torch.randn(1, 3, grid[0], 2 * grid[1], 2 * grid[2])
        with torch.no_grad(), rainfusion_compile.observe() as report:
            compiled(clip)
        assert {entry["status"] for entry in report.to_dict()["attentions"]} == {status}, grid


def test_two_resolutions_of_equal_token_count_get_their_own_grids(model):
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, options=EVERYTHING)
    for grid in ((4, 6, 10), (4, 10, 6), (4, 6, 10)):
        clip = torch.randn(1, 3, grid[0], 2 * grid[1], 2 * grid[2])
        with torch.no_grad(), rainfusion_compile.observe() as report:
            compiled(clip)
        assert [a["grid"] for a in report.to_dict()["attentions"]] == [list(grid)] * 2


@pytest.mark.inductor
def test_strides_and_what_follows_do_not_change(model, video):
    compiled = torch.compile(
        lambda x: F.scaled_dot_product_attention(x, x, x), backend="rainfusion", options={**EVERYTHING, "grid": GRID}
    )
    for q in (torch.randn(1, 2, 495, 32), torch.randn(1, 495, 2, 32).permute(0, 2, 1, 3)):
        dense = F.scaled_dot_product_attention(q, q, q)
        with torch.no_grad(), rainfusion_compile.observe() as report:
            assert compiled(q).stride() == dense.stride()
        assert statuses(report.to_dict()["attentions"]) == ["sparse"]


@pytest.mark.inductor
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_attention_straight_out_of_another(dynamic):
    def chain(q):
        for _ in range(3):
            q = F.scaled_dot_product_attention(q, q, q)
        return q

    q = torch.randn(1, 2, 495, 32)
    compiled = torch.compile(chain, backend="rainfusion", dynamic=dynamic, options={**EVERYTHING, "grid": GRID})
    dense = chain(q)
    with torch.no_grad(), rainfusion_compile.observe() as report:
        torch.testing.assert_close(compiled(q), dense, rtol=1e-4, atol=1e-4)
    assert statuses(report.to_dict()["attentions"]) == ["sparse"] * 3


def test_options_reach_the_attentions(model, video):
    _, attentions = run(model, video, options={"min_tokens": 496})
    assert {a["reason"] for a in attentions} == {"495 tokens, fewer than min_tokens=496"}
    _, attentions = run(model, video, options={"dense_layers": (-1,)})
    assert statuses(attentions) == ["sparse", "dense"]
    assert attentions[1]["reason"] == "kept dense by dense_layers"
    for options, taken in (
        ({"sparsity": 0.6, "patterns": ("temporal",), "arm": "recall", "min_recall": 0.0}, "temporal"),
        ({"sparsity": 0.8, "patterns": ("spatial",), "arm": "recall", "min_recall": 1.0}, "dense"),
        ({"sparsity": (0.8, 0.6), "patterns": ("textural",), "error": 1.0}, "textural"),
        ({"sparsity": (0.8, 0.6), "patterns": ("textural",), "error": 0.0}, "dense"),
    ):
        _, attentions = run(model, video, options=options)
        assert {name for a in attentions for sample in a["patterns"] for name in sample} == {taken}, options


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rule", [{"error": 0.25}, {"arm": "recall", "recall_target": 0.5, "min_recall": 0.25}])
def test_rules_and_ladders_reach_the_operators(model, video, dynamic, rule, monkeypatch):
    """As arguments, in the static and in the dynamic graph: what they are told is all that they know."""
    calls, given_limits = [], []

    def compile_nothing(gm, inputs, *_, **__):
        calls.extend(node for node in gm.graph.nodes if node.op == "call_function")
        return lambda *args: (given_limits.append(args[-1]), gm.forward(*args))[1]

    monkeypatch.setattr(compiled_graphs, "compile_with_inductor", compile_nothing)
    options = {**EVERYTHING, "sparsity": (0.5, 0.8), "patterns": ("textural", "spatial"), **rule}
    with torch.no_grad():
        torch.compile(model, backend="rainfusion", fullgraph=True, dynamic=dynamic, options=options)(video)
    probes = [call for call in calls if call.target is torch.ops.rainfusion.arm_probe.default]
    whole = [call for call in calls if call.target is torch.ops.rainfusion.video_attention.default]
    assert (len(probes), len(whole)) == ((0, 2) if dynamic else (2, 0))
    numbers = (rule.get("error", rule.get("recall_target")), rule.get("min_recall", 0.0))
    never = (float("inf"), float("-inf"))  # no step is dense
    assert torch.equal(given_limits[0], torch.tensor([numbers, never, (-1.0, 2.0)]))
    for call in probes + whole:
        schema = [argument.name for argument in call.target._schema.arguments]
        given = dict(zip(schema, call.args, strict=True))
        assert given["by_error"] == ("error" in rule)
        if dynamic:
            assert (list(given["sparsity"]), given["patterns"]) == ([0.8, 0.5], "textural,spatial")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rule", [{"error": 0.5}, {"arm": "recall", "min_recall": 0.0}])
def test_what_is_reported_of_heads(model, video, dynamic, rule):
    """Pattern, sparsity, density, error and recall of each head, and the error of the layer, agree with each other."""
    options = {**EVERYTHING, "sparsity": (0.8, 0.5), **rule}
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, dynamic=dynamic, options=options)
    with torch.no_grad(), rainfusion_compile.observe() as report:
        compiled(video)
    tables = Options(sparsity=(0.8, 0.5), **rule).tables(VideoLayout(GRID))
    density = dict(zip(zip(tables.patterns, tables.sparsities, strict=True), tables.densities, strict=True))
    density[DENSE, 0.0] = 1.0
    for entry in report.to_dict()["attentions"]:
        for name in ("patterns", "sparsity", "density", "error", "recall"):
            assert [len(sample) for sample in entry[name]] == [2, 2], name
        for patterns, sparsities, found in zip(entry["patterns"], entry["sparsity"], entry["density"], strict=True):
            for name, share, realised in zip(patterns, sparsities, found, strict=True):
                assert realised == pytest.approx(density[name, share])
        for errors, layer in zip(entry["error"], entry["layer_error"], strict=True):
            assert min(errors) - 1e-6 <= layer <= max(errors) + 1e-6  # of all heads together
            assert "error" not in rule or layer <= rule["error"] * (1 + 1e-5)
        dense = [share == 0 for sample in entry["sparsity"] for share in sample]
        assert dense == [error == 0 for sample in entry["error"] for error in sample]
        assert dense == [name == "dense" for sample in entry["patterns"] for name in sample]
        assert "arm" not in rule or not any(dense)
        assert json.loads(json.dumps(entry)) == entry  # plain values
    last, text = report.to_dict()["attentions"][-1], str(report)
    assert all(f"{error:.3f}" in text for error in last["layer_error"])
    assert all(f" {name}" in text for name in chain(*last["patterns"]))


def test_a_given_grid_that_does_not_fit_leaves_it_dense(model):
    x = torch.randn(1, 2, 100, 32)
    compiled = torch.compile(
        lambda x: F.scaled_dot_product_attention(x, x, x),
        backend="rainfusion",
        options={**EVERYTHING, "grid": (3, 5, 7)},
    )
    with torch.no_grad(), rainfusion_compile.observe() as report:
        compiled(x)
    (entry,) = report.to_dict()["attentions"]
    assert entry["status"] == "dense"
    assert entry["reason"]


def test_a_given_text_that_contradicts_the_graph_leaves_it_dense(model, video):
    _, attentions = run(model, video, options={"text": (7, 0)})
    assert {a["reason"] for a in attentions} == {"the graph shows text=(0, 0), not text=(7, 0)"}


@pytest.mark.inductor
def test_inductor_options_pass_through(model, video, monkeypatch):
    import torch._inductor.compile_fx as inductor

    seen: list[dict[str, Any]] = []
    plain = inductor.compile_fx

    def spy(*args, **kwargs):
        if kwargs.get("config_patches"):  # it calls itself again without
            seen.append(kwargs["config_patches"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx", spy)
    run(model, video, options={"inductor": {"epilogue-fusion": False}, "inductor_mode": "max-autotune-no-cudagraphs"})
    assert seen[0]["epilogue_fusion"] is False
    assert seen[0]["max_autotune"] is True
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="rainfusion", mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        compiled(video)
    assert seen[-1]["max_autotune"] is True


def test_explain(model, video):
    report = rainfusion_compile.explain(model, video, options=EVERYTHING)
    assert statuses(report.to_dict()["attentions"]) == ["sparse", "sparse"]
    assert "2 of 2 video self-attentions sparse" in str(report)
    compiled = torch.compile(model, backend="rainfusion", options={**EVERYTHING, "dense_layers": 1})
    attentions = rainfusion_compile.explain(compiled, video).to_dict()["attentions"]
    assert statuses(attentions) == ["dense", "sparse"]
    assert [entry["calls"] for entry in attentions] == [1, 1]
    with pytest.raises(ValueError, match="already compiled"):
        rainfusion_compile.explain(compiled, video, options=EVERYTHING)


def test_a_report_sees_only_what_runs_while_it_is_open(model, video):
    compiled = torch.compile(model, backend="rainfusion", options=EVERYTHING)
    with torch.no_grad():
        compiled(video)
        with rainfusion_compile.observe() as report:
            compiled(video)
            compiled(video)
        compiled(video)
    assert [a["calls"] for a in report.to_dict()["attentions"]] == [2, 2]


def test_logging_tells_what_the_passes_did(model, video, caplog):
    with caplog.at_level(logging.DEBUG, logger="rainfusion_compile"):
        run(model, video, options={"dense_layers": 1})
    text = caplog.text
    assert "Video: 1 of 2 video self-attentions sparse (grid 5x9x11)" in text
    assert "kept dense by dense_layers" in text
