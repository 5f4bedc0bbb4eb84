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
import torch, torch._functorch.config
import rainfusion_compile
from rainfusion_compile.kernels import operators
from small_video import Video

options, fingerprint = json.loads(sys.argv[1]), sys.argv[2]
if fingerprint:
    operators.source_hash = lambda: fingerprint
torch._functorch.config.strict_autograd_cache = True  # an uncacheable graph is an error
torch.manual_seed(0)
model, video = Video(layers=1), torch.randn(1, 3, 5, 18, 22)
compiled = torch.compile(model, backend="rainfusion", fullgraph=True, options={"min_tokens": 0, **options})
with torch.no_grad(), rainfusion_compile.observe() as report:
    out = compiled(video)
counters = torch._dynamo.utils.counters
print(json.dumps({
    "aot_hit": counters["aot_autograd"]["autograd_cache_hit"],
    "aot_miss": counters["aot_autograd"]["autograd_cache_miss"],
    "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
    "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
    "sparse": [entry["status"] for entry in report.to_dict()["attentions"]],
    "sum": float(out.double().abs().sum()),
}))
"""
HELPERS = str(Path(__file__).parent / "helpers")
HIT = {"aot_hit": 1, "aot_miss": 0, "fx_hit": 1, "fx_miss": 0}
MISS = {"aot_hit": 0, "aot_miss": 1, "fx_hit": 0, "fx_miss": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cache = tmp_path_factory.mktemp("inductor")

    def run(options, fingerprint=""):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": HELPERS}
        command = [sys.executable, "-c", SCRIPT, json.dumps(options), fingerprint]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_a_second_process_hits_and_other_options_or_operators_miss(run):
    options = {"sparsity": 0.6, "error": 1.0}
    first = run(options)
    assert first.items() >= MISS.items()
    second = run(options)
    assert second.items() >= HIT.items()
    assert second["sparse"] == ["sparse"]  # a warm cache still reports what was rewritten
    assert second["sum"] == pytest.approx(first["sum"])
    for other in ({"sparsity": [0.6, 0.8]}, {"error": 0.5}, {"arm": "recall", "error": None}):
        assert run({**options, **other}).items() >= MISS.items(), other
    assert run(options, fingerprint="another version of the operators").items() >= MISS.items()
