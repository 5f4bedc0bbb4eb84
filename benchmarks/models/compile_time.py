# SPDX-License-Identifier: Apache-2.0
"""How long a 40-layer video transformer takes to compile, by Inductor alone and by this backend.

    python -m benchmarks.models.compile_time

A Wan transformer of real depth, narrow, on CPU. Each measurement is a process of its own with caches of its own,
empty; the two backends take turns. What the first call takes more than the second is compile time: that of Dynamo, our
passes, Inductor and the C++ compiler. Wall time wants an idle machine; CPU time, child processes included, depends on
that less. Writes ``results/compile_time_cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BACKENDS = ("inductor", "rainfusion")
GRID = (6, 30, 52)
"""Of tokens: 480p, a few frames; enough for attention to become sparse with default options."""
OUT = Path(__file__).parents[1] / "results" / "compile_time_cpu.json"


def measured_here(backend: str, layers: int) -> dict[str, Any]:
    """Compile in this process; seconds, and how many attentions became sparse."""
    import torch
    from diffusers import WanTransformer3DModel

    from rainfusion_compile import observe

    torch.manual_seed(0)
    frames, rows, columns = GRID
    model = WanTransformer3DModel(
        num_layers=layers,
        num_attention_heads=2,
        attention_head_dim=16,
        ffn_dim=64,
        text_dim=64,
        freq_dim=64,
        in_channels=16,
        out_channels=16,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, 2 * rows, 2 * columns),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 64, 64),
    }
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    calls = []
    with torch.no_grad(), observe() as report:
        for _ in range(2):
            wall, cpu = time.perf_counter(), cpu_seconds()
            compiled(**inputs)
            calls.append((time.perf_counter() - wall, cpu_seconds() - cpu))
    (first_wall, first_cpu), (second_wall, second_cpu) = calls
    sparse = sum(entry["status"] == "sparse" for entry in report.to_dict()["attentions"])
    return {"wall": first_wall - second_wall, "cpu": first_cpu - second_cpu, "sparse": sparse}


def cpu_seconds() -> float:
    """Of this process and of its children that have ended: the C++ compiler's."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measured(backend: str, layers: int) -> dict[str, Any]:
    """The same in a process of its own, with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        # compile in the process itself, where every child is waited for and so counted
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.models.compile_time", "--one", backend, "--layers", str(layers)]
        done = subprocess.run(command, env={**os.environ, **caches}, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each backend")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured_here(options.one, options.layers)))
        return
    runs: dict[str, list[dict[str, Any]]] = {backend: [] for backend in BACKENDS}
    for _ in range(options.repeats):
        for backend in BACKENDS:
            run = measured(backend, options.layers)
            assert run["sparse"] == (options.layers if backend == "rainfusion" else 0), run
            print(f"{backend}: {run['wall']:.1f} s, {run['cpu']:.1f} s of CPU", flush=True)
            runs[backend].append({**run, "load": os.getloadavg()[0]})
    medians = {
        backend: {kind: statistics.median(run[kind] for run in runs[backend]) for kind in ("wall", "cpu")}
        for backend in BACKENDS
    }
    overhead = {kind: medians["rainfusion"][kind] / medians["inductor"][kind] - 1 for kind in ("wall", "cpu")}
    print(f"on top of Inductor: {overhead['wall']:.1%} of the time, {overhead['cpu']:.1%} of the CPU time")
    import diffusers

    from benchmarks.measure import cpu_machine

    model = {"class": "WanTransformer3DModel", "layers": options.layers, "grid": GRID}
    found = {
        **cpu_machine(),
        "diffusers": diffusers.__version__,
        "model": model,
        "overhead": overhead,
        "median_seconds": medians,
        "runs": runs,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
