# SPDX-License-Identifier: Apache-2.0
"""Inductor's and AOTAutograd's caches keep working with our backend, and never serve what they should not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch, torch._dynamo, torch._functorch.config
import rainfusion_compile
from rainfusion_compile.kernels import operators
from small_video import Video

torch._functorch.config.strict_autograd_cache = True  # an uncacheable graph is an error
precompile, dynamic = json.loads(sys.argv[2])
torch._dynamo.config.caching_precompile = precompile
for options, fingerprint in json.loads(sys.argv[1]):
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    if fingerprint:
        operators.source_hash = lambda: fingerprint
    torch.manual_seed(0)
    model, video = Video(layers=1), torch.randn(1, 3, 5, 18, 22)
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, dynamic=dynamic,
                             options={"min_tokens": 0, **options})
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = compiled(video)
    print(json.dumps({
        "aot_hit": counters["aot_autograd"]["autograd_cache_hit"],
        "aot_miss": counters["aot_autograd"]["autograd_cache_miss"],
        "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
        "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
        "sparse": [entry["status"] for entry in report.to_dict()["attentions"]],
        "sum": float(out.double().abs().sum()),
    }))
if precompile:
    torch.compiler.save_cache_artifacts()
"""
HELPERS = str(Path(__file__).parent / "helpers")
HIT = {"aot_hit": 1, "aot_miss": 0, "fx_hit": 1, "fx_miss": 0}
MISS = {"aot_hit": 0, "aot_miss": 1, "fx_hit": 0, "fx_miss": 1}


def run(cache, *compilations, precompile=False, dynamic=None):
    """In a process of its own, one compilation after the other, (options, what stands for the operators' source)."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": HELPERS}
    command = [sys.executable, "-c", SCRIPT, json.dumps(compilations), json.dumps([precompile, dynamic])]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_second_process_hits_and_other_options_or_operators_miss(tmp_path):
    options = {"sparsity": 0.6, "error": 1.0}
    (first,) = run(tmp_path, (options, ""))
    assert first.items() >= MISS.items()
    others = ({"sparsity": [0.6, 0.8]}, {"error": 0.5}, {"arm": "recall", "error": None})
    compilations = [(options, ""), *(({**options, **other}, "") for other in others), (options, "other operators")]
    second, *missing = run(tmp_path, *compilations)
    assert second.items() >= HIT.items()
    assert second["sparse"] == ["sparse"]  # a warm cache still reports what was rewritten
    assert second["sum"] == pytest.approx(first["sum"])
    for result, asked in zip(missing, compilations[1:], strict=True):
        assert result.items() >= MISS.items(), asked


@pytest.mark.parametrize("dynamic", [False, True])
def test_packages_of_dynamo_do_not_serve_graphs_without_their_tables_or_of_other_options(tmp_path, dynamic):
    options = {"sparsity": 0.6, "error": 1.0}
    each = (options, options, {**options, "error": 0.0})
    first, again, other = (run(tmp_path, (one, ""), precompile=True, dynamic=dynamic)[0] for one in each)
    assert first["sparse"] == again["sparse"] == other["sparse"] == ["sparse"]
    assert first["sum"] == again["sum"] != other["sum"]
    assert again["aot_hit"] == 1  # Dynamo traces again, nothing else is done again
    assert other["aot_hit"] == 0
