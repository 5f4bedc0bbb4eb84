# SPDX-License-Identifier: Apache-2.0
"""How benchmarks measure and record: median times, what machine it was, JSON under ``results/``."""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

DEVICE = torch.device("cuda", 0)
RESULTS = Path(__file__).parent / "results"


def median_ms(function: Callable[[], object], *, rep_ms: float = 200.0, least: int = 3) -> float:
    """Median time of a call as a program makes it, launches included, with a cold L2 (`triton.testing.do_bench`).

    Args:
        rep_ms: for how long to repeat the call.
        least: how often to repeat it at least, however long it takes.
    """
    function()  # compiles
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    rep = max(rep_ms, (least + 1) * start.elapsed_time(end))
    return float(triton.testing.do_bench(function, warmup=25, rep=rep, return_mode="median"))


def graph_ms(function: Callable[[], object]) -> float:
    """Median time of a call on the GPU alone: replays of a CUDA graph, as compiled models run it."""
    function()
    torch.cuda.synchronize()
    return float(triton.testing.do_bench_cudagraph(function, rep=20, return_mode="median"))


def cpu_ms(function: Callable[[], object], *, calls: int = 50) -> float:
    """Median time that the CPU takes to launch a call, while the GPU has nothing else to do."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e3 * statistics.median(times)


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """L2 norm of the difference over that of the reference, in float64."""
    reference = reference.double()
    return float((result.double() - reference).norm() / reference.norm())


def needs_gpu() -> None:
    """Raises SystemExit, with what to do, where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU; `make bench` measures attention on a CPU")


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def short_gpu_name() -> str:
    """'NVIDIA H100 80GB HBM3' -> 'h100'."""
    name = gpu_name().lower()
    model = re.search(r"\b[a-z]{1,3}\d{2,4}[a-z]?\b", name)
    return model.group() if model else re.sub(r"\W+", "_", name)


def machine() -> dict[str, Any]:
    """What a figure measured on a GPU depends on besides the code."""
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }


def cpu_machine() -> dict[str, Any]:
    """What a figure measured on a CPU depends on besides the code."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def result_path(benchmark: str) -> Path:
    """``results/<benchmark>_<gpu>.json``."""
    return RESULTS / f"{benchmark}_{short_gpu_name()}.json"


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Record figures measured on a GPU, with what they depend on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**machine(), **result}, indent=1) + "\n")
