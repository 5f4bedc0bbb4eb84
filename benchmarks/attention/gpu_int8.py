# SPDX-License-Identifier: Apache-2.0
"""One attention call on a Hopper GPU with queries and keys multiplied as integers, against the same call in bfloat16.

    python -m benchmarks.attention.gpu_int8

At the shapes of ``gpu_attention.py`` that have a head_dim of 128. Calls are whole: the ARM, and rounding the keys, are
in both of their times. The last row of a shape has all heads dense. Writes ``results/gpu_int8_<gpu>.json`` after every
shape.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.attention import flash_attention_3
from benchmarks.attention.baselines import best_dense, float8_ms
from benchmarks.attention.call import AttentionCall, make_call
from benchmarks.attention.gpu_attention import SHAPES
from rainfusion_compile.sparsity.layout import VideoLayout


def measure_call(full: AttentionCall, *, dense: bool) -> dict[str, Any]:
    """Times of both, and how far the outputs are from each other."""
    integers = replace(full, tables=replace(full.tables, int8=True))
    choice = full.all_dense if dense else None

    def whole(call: AttentionCall) -> Any:
        call.probe()
        return call.attend(choice)

    times = {
        f"{part}_{name}_ms": measure.median_ms(run)
        for name, call in (("full", full), ("int8", integers))
        for part, run in (("call", partial(whole, call)), ("kernel", partial(call.attend, choice)))
    }
    return {
        "sparsity": 0.0 if dense else full.sparsity,
        "density": 1.0 if dense else full.density,
        **times,
        "arm_full_ms": measure.graph_ms(full.probe),
        "arm_int8_ms": measure.graph_ms(integers.probe),
        "speedup": times["call_full_ms"] / times["call_int8_ms"],
        "difference": measure.relative_error(integers.attend(choice).float(), full.attend(choice).float()),
    }


def measure_shape(name: str, sparsities: list[float]) -> list[dict[str, Any]]:
    grid, text, heads, head_dim = SHAPES[name]
    rows: list[dict[str, Any]] = []
    for sparsity in sparsities:
        call = make_call(VideoLayout(grid, text), heads, head_dim, sparsity)
        measured = [measure_call(call, dense=False)]
        if sparsity == sparsities[-1]:
            measured.append(measure_call(call, dense=True))
            kernel, best = best_dense(call.q, call.k, call.v)
            facts = {"best_dense": kernel, "best_dense_ms": best}
            facts["flash_attention_3_float8_ms"] = float8_ms(call.q, call.k, call.v)
            measured[-1] |= facts
        shape = {"shape": name, "tokens": call.layout.tokens, "heads": heads, "head_dim": head_dim}
        rows += [shape | row for row in measured]
    return rows


def main() -> None:
    shapes = [name for name, (_, _, _, head_dim) in SHAPES.items() if head_dim == 128]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.64, 0.8])
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measure.needs_gpu()
    rows: list[dict[str, Any]] = []
    print(f"{'shape':20s} sparsity  bfloat16 ms (kernel)   int8 ms (kernel)  speed-up  difference")
    for name in args.shapes:
        rows += measure_shape(name, args.sparsity)
        for row in rows[-len(args.sparsity) - 1 :]:
            print(
                f"{name:20s} {row['sparsity']:8.2f} {row['call_full_ms']:9.3f} {row['kernel_full_ms']:9.3f}"
                f" {row['call_int8_ms']:9.3f} {row['kernel_int8_ms']:9.3f} {row['speedup']:8.3f}"
                f" {row['difference']:10.4f}",
                flush=True,
            )
        result = {"dtype": "bfloat16", "flash_attention_3": flash_attention_3.version(), "rows": rows}
        measure.write_result(args.out or measure.result_path("gpu_int8"), result)


if __name__ == "__main__":
    main()
