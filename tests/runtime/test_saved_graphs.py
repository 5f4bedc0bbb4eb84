# SPDX-License-Identifier: Apache-2.0
"""What is compiled for a file runs in another process as it did here: sparse, with equal outputs, and reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rainfusion_compile.runtime import saved_graphs

pytestmark = [
    pytest.mark.inductor,
    pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 makes no such files of functions"),
]
HELPERS = str(Path(__file__).parents[1] / "helpers")
RUN = """
import contextlib, json, sys
import torch
from small_video import Block, Video
import rainfusion_compile

def run(call, *cases):
    did = []
    for given, grid in cases:
        told = contextlib.nullcontext() if grid is None else rainfusion_compile.video_layout(grid)
        with torch.no_grad(), told, rainfusion_compile.observe() as report:
            total = float(call(given).double().abs().sum())
        (attention,) = report.to_dict()["attentions"]
        did.append([attention["name"], attention["status"], attention["grid"], total])
    return did

def prepared(kind):
    torch.manual_seed(0)
    if kind == "waiting":  # for a grid, which neither the graph nor its inputs show
        model, given = Block(64, 2), torch.randn(1, 495, 64)
        return model, [(given, (5, 9, 11)), (given, (5, 11, 9)), (given, None)]
    model, videos = Video(layers=1), (torch.randn(1, 3, 5, 18, 22), torch.randn(1, 3, 5, 22, 18))
    return model, [(video, None) for video in videos[: 2 if kind == "dynamic" else 1]]

options = {"min_tokens": 0, "error": 1.0}
for kind in ("static", "dynamic", "waiting"):
    path = f"{sys.argv[1]}/{kind}"
    model, cases = prepared(kind)
"""
SAVE = """
    torch._dynamo.reset()
    if kind == "dynamic":
        torch._dynamo.mark_dynamic(cases[0][0], (3, 4))
    compiled = torch.compile(model.forward, fullgraph=True, backend="rainfusion", options=options)
    with torch.no_grad(), rainfusion_compile.video_layout((5, 9, 11)):
        saved = compiled.aot_compile(((cases[0][0],), {}))
    saved.save_compiled_function(path)
    print(json.dumps([kind, run(lambda x: saved(model, x), *cases)]))
"""
LOAD = """
    with open(path, "rb") as file:
        loaded = torch.compiler.load_compiled_function(file)
    print(json.dumps([kind, run(lambda x: loaded(model, x), *cases)]))
"""


def run(script, folder):
    """What each kind of model did in a process of this script."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([HELPERS, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", RUN + script, folder], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the process that saved did, and what the one that loaded did."""
    folder = str(tmp_path_factory.mktemp("models"))
    return run(SAVE, folder), run(LOAD, folder)


@pytest.mark.parametrize(("kind", "grids"), [("static", [[5, 9, 11]]), ("dynamic", [[5, 9, 11], [5, 11, 9]])])
def test_a_loaded_model_does_what_the_saved_one_did(both, kind, grids):
    saved, loaded = (one[kind] for one in both)
    assert [(name, status, grid) for name, status, grid, _ in loaded] == [("blocks.0", "sparse", g) for g in grids]
    assert loaded == saved


def test_a_loaded_block_is_sparse_for_the_grid_it_was_compiled_for_and_dense_for_others(both):
    saved, loaded = (one["waiting"] for one in both)
    assert [(status, grid) for _, status, grid, _ in saved[:2]] == [("sparse", [5, 9, 11]), ("sparse", [5, 11, 9])]
    assert [status for _, status, _, _ in loaded] == ["sparse", "dense", "dense"]
    assert loaded[0] == saved[0]
    assert loaded[1][-1] == loaded[2][-1] == saved[2][-1]


def test_files_are_for_the_version_that_wrote_them(monkeypatch):
    data = saved_graphs.dump("state")
    assert saved_graphs.load(data) == "state"
    monkeypatch.setattr(saved_graphs, "_versions", lambda: "another version")
    with pytest.raises(RuntimeError, match="compile it again"):
        saved_graphs.load(data)
