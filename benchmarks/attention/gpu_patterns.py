# SPDX-License-Identifier: Apache-2.0
"""What heads of each kind cost on a CUDA GPU: all heads take one candidate of the default options, or stay dense.

    python -m benchmarks.attention.gpu_patterns

bfloat16, random queries, keys and values, attention alone, without the ARM; shapes as in ``gpu_attention.py``. There,
heads take three patterns in turn and all draw the same samples, so that FlexAttention can be given their mask. Here
they draw and select as in users' models. Outputs are compared with the portable kernel's. Writes
``results/gpu_patterns_<gpu>.json`` after every shape.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.attention import flash_attention_3
from benchmarks.attention.baselines import best_dense
from benchmarks.attention.call import AttentionCall, make_call
from benchmarks.attention.gpu_attention import SHAPES
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.layout import VideoLayout

MAX_DIFFERENCE = 1e-2  # relative L2, of two kernels that both round to bfloat16


def measure_shape(name: str, sparsities: list[float]) -> list[dict[str, Any]]:
    """A row for each candidate of each sparsity, and one for dense heads."""
    grid, text, heads, head_dim = SHAPES[name]
    layout = VideoLayout(grid, text)
    facts: dict[str, Any] = {"shape": name, "grid": grid, "text": text, "tokens": layout.tokens}
    facts |= {"heads": heads, "head_dim": head_dim}
    rows: list[dict[str, Any]] = []
    for sparsity in sparsities:
        tables = Options(sparsity=sparsity).tables(layout, measure.DEVICE)
        call = make_call(layout, heads, head_dim, sparsity, tables=tables)
        kinds: list[tuple[str, float | None, float]] = [
            (pattern, sparsity, density) for pattern, density in zip(tables.patterns, tables.densities, strict=True)
        ]
        if not rows:
            facts["baseline"], facts["dense_ms"] = best_dense(call.q, call.k, call.v)
            kinds.append(("dense", None, 1.0))
        for number, (pattern, asked, density) in enumerate(kinds):
            took = milliseconds(call, number)
            row = {"pattern": pattern, "sparsity": asked, "density": density, "kernel_ms": took}
            speedup = facts["dense_ms"] / took
            rows.append(facts | row | {"speedup": speedup, "efficiency": speedup * density})
            print_row(rows[-1])
    return rows


def milliseconds(call: AttentionCall, number: int) -> float:
    """The time of attention if all heads take a candidate, once its output is checked."""
    choice = torch.full_like(call.choice, number)
    found = call.attend(choice)
    difference = measure.relative_error(found, call.attend(choice, portable=True))
    if not difference < MAX_DIFFERENCE:  # NaN fails too
        raise SystemExit(f"candidate {number} of {call.layout}: {difference:.1e} from the portable kernel")
    return measure.median_ms(lambda: call.attend(choice))


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['shape']:24s} {row['pattern']:9s} {row['sparsity'] or 0:5.2f} {row['density']:7.3f}"
        f" {row['dense_ms']:9.3f} ({row['baseline']}) {row['kernel_ms']:9.3f} {row['speedup']:6.2f}x"
        f" {row['efficiency']:6.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.64, 0.8])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measure.needs_gpu()
    rows: list[dict[str, Any]] = []
    print("shape, pattern, sparsity, density, dense ms, attention's ms, speed-up, efficiency")
    for name in args.shapes:
        rows.extend(measure_shape(name, args.sparsity))
        head = {"dtype": "bfloat16", "flash_attention_3": flash_attention_3.version(), "rows": rows}
        measure.write_result(args.out or measure.result_path("gpu_patterns"), head)


if __name__ == "__main__":
    main()
