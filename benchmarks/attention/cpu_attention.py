# SPDX-License-Identifier: Apache-2.0
"""Sparse video attention on CPU against ``scaled_dot_product_attention``: the whole path, ARM and reordering included.

    python -m benchmarks.attention.cpu_attention

bfloat16, two threads, about 8k and 16k tokens, head_dim 64 and 128, random tensors. The ARM runs in every call, and the
heads take the spatial, the temporal and the textural pattern in turn. Writes ``results/cpu_attention.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import RESULTS, cpu_machine
from rainfusion_compile.kernels import operators
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.layout import VideoLayout

GRIDS = ((16, 22, 24), (16, 30, 34))
OUT = RESULTS / "cpu_attention.json"


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(grid: tuple[int, int, int], head_dim: int, sparsity: float, heads: int, repeats: int) -> dict[str, Any]:
    layout = VideoLayout(grid)
    options = Options(sparsity=sparsity)
    tables, scale = options.tables(layout), head_dim**-0.5
    q, k, v = torch.randn(3, 1, layout.tokens, heads, head_dim, dtype=torch.bfloat16).transpose(2, 3)
    choice = (torch.arange(heads, dtype=torch.int32) % len(tables.patterns))[None]

    def probe() -> Tensor:
        return operators.arm_probe(q, k, v, None, *tables.probe_arguments, scale, *options.rule(q.device))[0]

    def sparse() -> Tensor:
        probe()
        return operators.block_sparse_attention(q, k, v, choice, None, *tables.attention_arguments, scale)

    dense_s = median_seconds(lambda: F.scaled_dot_product_attention(q, k, v), repeats)
    sparse_s, arm_s = median_seconds(sparse, repeats), median_seconds(probe, repeats)
    density = statistics.mean(tables.densities[number] for number in choice[0].tolist())
    return {
        "grid": grid,
        "tokens": layout.tokens,
        "heads": heads,
        "head_dim": head_dim,
        "sparsity": sparsity,
        "chosen": [tables.patterns[number] for number in choice[0].tolist()],
        "density": density,
        "dense_ms": 1e3 * dense_s,
        "sparse_ms": 1e3 * sparse_s,
        "speedup": dense_s / sparse_s,
        "efficiency": dense_s * density / sparse_s,
        "arm_share_of_dense": arm_s / dense_s,
        "arm_share_of_sparse": arm_s / sparse_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.64, 0.8])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    print("tokens  head_dim  sparsity  density  dense ms  sparse ms  speed-up  ARM/dense  ARM/sparse")
    for grid in GRIDS:
        for head_dim in (64, 128):
            for sparsity in args.sparsity:
                row = measure(grid, head_dim, sparsity, args.heads, args.repeats)
                rows.append(row)
                print(
                    f"{row['tokens']:6d}  {head_dim:8d}  {sparsity:8.2f}  {row['density']:7.3f}  {row['dense_ms']:8.1f}"
                    f"  {row['sparse_ms']:9.1f}  {row['speedup']:8.2f}  {row['arm_share_of_dense']:9.2%}"
                    f"  {row['arm_share_of_sparse']:10.2%}",
                    flush=True,
                )
    result = {
        **cpu_machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "baseline": "torch.nn.functional.scaled_dot_product_attention, CPU flash kernel",
        "dtype": "bfloat16",
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
