# SPDX-License-Identifier: Apache-2.0
"""What users are told of each model: one line, once, that names it; and the errors that `strict` asks for."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_video import Block, Video
from torch._dynamo.utils import counters

import rainfusion_compile
from rainfusion_compile.passes.rewrite import writer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID, PIXELS = (5, 6, 7), (5, 12, 14)


def told(caplog, model, *args, context=None, grad=False, **options):
    """Level and text of what is said while a model is compiled and called."""
    caplog.clear()
    compiled = torch.compile(model, backend="rainfusion", options={"min_tokens": 0, "sparsity": 0.0, **options})
    with torch.set_grad_enabled(grad), context or nullcontext(), caplog.at_level(logging.INFO, "rainfusion_compile"):
        compiled(*args)
    return [(one.levelname, one.getMessage()) for one in caplog.records if one.name == "rainfusion_compile"]


@pytest.fixture
def video():
    return torch.randn(1, 3, *PIXELS)


def test_traces_have_the_graph_before_and_after_and_a_report(video, monkeypatch):
    artifacts = {}

    def trace(kind, metadata, payload_fn):
        assert kind == "artifact"
        artifacts.setdefault(metadata()["name"], []).append(payload_fn())

    monkeypatch.setattr(writer, "trace_structured", trace)
    compiled = torch.compile(Video(), backend="rainfusion", options={"min_tokens": 0, "dense_layers": 1})
    with torch.no_grad():
        compiled(video)
    (before,), (after,), (report,) = (artifacts[f"rainfusion_{name}"] for name in ("before", "after", "report"))
    dense, probe = " = torch._C._nn.scaled_dot_product_attention(", " = torch.ops.rainfusion.arm_probe.default("
    assert (before.count(dense), before.count(probe)) == (2, 0)
    assert (after.count(dense), after.count(probe)) == (1, 1)
    dense, sparse = json.loads(report)["attentions"]
    assert (dense["status"], sparse["status"]) == ("dense", "sparse")
    assert "dense_layers" in dense["reason"]
    assert sparse["grid"] == [*GRID]


def test_what_was_compiled_is_counted(caplog, video):
    counters["rainfusion"].clear()
    told(caplog, Video(), video, dense_layers=1)
    told(caplog, Video(), video, grad=True)
    told(caplog, torch.nn.Conv3d(3, 3, 1), video)
    assert counters["rainfusion"] == {"graphs": 3, "sparse": 1, "dense: asked": 1, "dense: derivatives": 2}


def test_all_sparse_is_no_alarm(caplog, video):
    line = "rainfusion: Video: 2 of 2 video self-attentions sparse (grid 5x6x7)"
    assert told(caplog, Video().eval(), video) == [("INFO", line)]


def test_what_stays_dense_is_a_warning_with_a_remedy(caplog, video):
    line = "rainfusion: Video: 0 of 2 video self-attentions sparse: "
    few = "210 tokens, fewer than min_tokens=211; set the option min_tokens to at most that many"
    assert told(caplog, Video().eval(), video, min_tokens=211) == [("WARNING", line + few)]
    torch._dynamo.reset()
    training = "needs gradients; call it under torch.no_grad()"
    assert told(caplog, Video().eval(), video, grad=True) == [("WARNING", line + training)]


def test_what_stays_dense_as_asked_is_none(caplog, video):
    asked = "1 dense: kept dense by dense_layers; take its number out of dense_layers"
    line = f"rainfusion: Video: 1 of 2 video self-attentions sparse (grid 5x6x7); {asked}"
    assert told(caplog, Video().eval(), video, dense_layers=1) == [("INFO", line)]


def test_each_model_is_told_of_once(caplog, video):
    one, other = Video().eval(), Video().eval()
    assert len(told(caplog, one, video, min_tokens=211)) == 1
    assert told(caplog, one, video.double().float().repeat(2, 1, 1, 1, 1), min_tokens=211) == []  # compiled anew
    torch._dynamo.reset()
    assert len(told(caplog, other, video, min_tokens=211)) == 1


def test_functions_have_no_name(caplog):
    q = torch.randn(1, 2, 210, 16)
    ((_, line),) = told(caplog, lambda q: F.scaled_dot_product_attention(q, q, q), q)
    assert line.startswith(
        "rainfusion: 0 of 1 video self-attentions sparse: tokens: 210 in one unstructured axis; give"
    )


@pytest.mark.parametrize("way", ["option", "context"])
@pytest.mark.parametrize("grid", [PIXELS, (6, 6, 7)])
@pytest.mark.parametrize("shown", [True, False])
def test_a_grid_that_is_not_that_of_the_tokens_is_told(caplog, video, way, grid, shown):
    """By an option or a context, where the graph shows another, or nothing but the number of tokens."""
    model, args = (Video().eval(), video) if shown else (Block(64, 2).eval(), torch.randn(1, 210, 64))
    options = {"grid": grid} if way == "option" else {}
    context = None if options else rainfusion_compile.video_layout(grid)
    warnings = [line for level, line in told(caplog, model, args, context=context, **options) if level == "WARNING"]
    number = grid[0] * grid[1] * grid[2]
    wrong = "the graph shows grid=(5, 6, 7) with text=(0, 0), not" if shown else "210 tokens do not fit"
    (line,) = warnings
    assert f"{wrong} grid={grid}" in line
    assert shown or f"which makes {number}" in line
    dense = way == "option" and grid[1:] != GRID[1:]  # other rows and columns
    happened = "; attention is sparse over what the graph shows" if shown and not dense else ""
    assert line.endswith(f"they count tokens, not pixels{happened}")


@pytest.mark.parametrize(
    ("layers", "line"),
    [
        (7, "dense_layers=7 names more attentions than the 2 of this graph; give at most 2"),
        ((1, -3), "dense_layers=(1, -3) names [-3], and this graph has 2 video attentions, numbered from 0"),
    ],
)
def test_numbers_of_layers_that_there_are_not_are_told(caplog, video, layers, line):
    assert ("WARNING", f"rainfusion: Video: {line}") in told(caplog, Video().eval(), video, dense_layers=layers)


@pytest.mark.parametrize("dynamic", [False, True])
def test_strict_names_what_stays_dense(video, dynamic):
    model = torch.compile(
        Video().eval(), backend="rainfusion", dynamic=dynamic, options={"min_tokens": 0, "strict": True}
    )
    wanted = r"strict=True, but blocks.0 stays dense: needs gradients; call it under torch.no_grad\(\) \(and 1 more\)"
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=wanted):
        model(video)
    with torch.no_grad():
        model(video)


def test_strict_in_a_graph_that_waits_for_its_grid():
    model = torch.compile(Block(64, 2).eval(), backend="rainfusion", options={"min_tokens": 0, "strict": True})
    x = torch.randn(1, 210, 64)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"stays dense: tokens: 210 in one .* give options grid="):
            model(x)
        with rainfusion_compile.video_layout(GRID):
            model(x)


def test_strict_lets_be_what_is_asked_for_or_short(video):
    for options in ({"dense_layers": 2}, {"min_tokens": 211}):
        torch._dynamo.reset()
        options = {"min_tokens": 0, "strict": True, **options}
        with torch.no_grad():
            torch.compile(Video().eval(), backend="rainfusion", options=options)(video)


def test_strict_and_steps_that_no_graph_shows(video):
    options = {"min_tokens": 0, "strict": True, "dense_steps": 0.1}
    model = torch.compile(Video().eval(), backend="rainfusion", options=options)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"strict=True, but dense_steps=.* does not show"):
        model(video)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch reads TORCH_LOGS before it looks for entry points")
@pytest.mark.parametrize("name", ["+rainfusion", "rainfusion,rainfusion_compile"])
def test_the_log_has_the_names_of_backend_and_package(name, tmp_path):
    root = Path(__file__).parents[1]
    group = re.search(r'\[project.entry-points."(torch.backends)"\]\n(.*)\n', (root / "pyproject.toml").read_text())
    assert group is not None
    info = tmp_path / "names-0.dist-info"  # for an installation may be older than the project's file
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: names\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{group[1]}]\n{group[2].replace(chr(34), '')}\n")
    code = (
        "import logging, torch\n"
        "from rainfusion_compile.passes.rewrite.notices import Notices, logger\n"
        "Notices()('line', logging.INFO)\n"
        "logger.debug('details')\n"
    )
    env = os.environ | {"TORCH_LOGS": name, "PYTHONPATH": os.pathsep.join([str(root), str(tmp_path)])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rainfusion: line" in done.stderr
    assert ("details" in done.stderr) is ("+" in name)
