# SPDX-License-Identifier: Apache-2.0
"""From 4k to 256k video tokens on a CUDA GPU, at fixed sparsity: ours, ARM included, against the best dense kernel.

    python -m benchmarks.attention.gpu_scaling

bfloat16, 8 heads of 128, no text, ragged grids, random tensors; otherwise as ``gpu_attention.py``.
Writes ``results/gpu_scaling_<gpu>.json`` after every length.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.attention import flash_attention_3
from benchmarks.attention.baselines import best_dense
from benchmarks.attention.call import GRAPH_TOKENS, make_call
from rainfusion_compile.sparsity.layout import VideoLayout

GRIDS = ((21, 14, 14), (21, 17, 23), (21, 23, 34), (21, 30, 52), (19, 45, 76), (36, 45, 80), (73, 45, 80))
HEADS, HEAD_DIM = 8, 128


def measure_length(grid: tuple[int, int, int], sparsities: list[float]) -> list[dict[str, Any]]:
    layout = VideoLayout(grid)
    rows = []
    dense: tuple[str, float] | None = None
    for sparsity in sparsities:
        call = make_call(layout, HEADS, HEAD_DIM, sparsity)
        dense = dense or best_dense(call.q, call.k, call.v)
        baseline, dense_ms = dense
        sparse, arm = measure.median_ms(call.whole), measure.graph_ms(call.probe)
        short = layout.tokens < GRAPH_TOKENS
        graph = measure.graph_ms(call.whole) if short else None
        launch = measure.cpu_ms(call.whole) if short else None
        rows.append(
            {
                "grid": grid,
                "tokens": layout.tokens,
                "sparsity": sparsity,
                "density": call.density,
                "baseline": baseline,
                "dense_ms": dense_ms,
                "dense_tflops": call.flop / dense_ms / 1e9,
                "sparse_ms": sparse,
                "sparse_graph_ms": graph,
                "sparse_cpu_ms": launch,
                "sparse_tflops": call.flop * call.density / sparse / 1e9,
                "arm_ms": arm,
                "arm_share_of_dense": arm / dense_ms,
                "speedup": dense_ms / sparse,
                "efficiency": dense_ms * call.density / sparse,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.64, 0.8])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measure.needs_gpu()
    out = args.out or measure.result_path("gpu_scaling")
    rows: list[dict[str, Any]] = []
    print("tokens sparsity density   dense ms  sparse ms   ARM ms  TFLOP/s speed-up efficiency")
    for grid in GRIDS:
        more = measure_length(grid, args.sparsity)
        rows.extend(more)
        for row in more:
            print(
                f"{row['tokens']:6d} {row['sparsity']:8.2f} {row['density']:7.3f} {row['dense_ms']:10.3f}"
                f" {row['sparse_ms']:10.3f} {row['arm_ms']:8.4f} {row['sparse_tflops']:8.1f} {row['speedup']:8.2f}"
                f" {row['efficiency']:10.3f}",
                flush=True,
            )
        facts = {"dtype": "bfloat16", "heads": HEADS, "head_dim": HEAD_DIM}
        measure.write_result(out, facts | {"flash_attention_3": flash_attention_3.version(), "rows": rows})


if __name__ == "__main__":
    main()
