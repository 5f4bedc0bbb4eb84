# SPDX-License-Identifier: Apache-2.0
"""One attention call on a CUDA GPU at real shapes: ours, ARM included, against the best dense kernel of the same run.

    python -m benchmarks.attention.gpu_attention
    python -m benchmarks.attention.gpu_attention --dtype float32 --sparsity 0.64 0.8

Random queries, keys and values, medians. Heads take the candidates of the spatial, temporal and textural patterns in
turn, whatever the ARM, which runs in every call, would choose. For each shape it also times our kernels with every head
dense, compares errors with those of PyTorch's kernel, and, in bfloat16, times FlexAttention on the same block mask.
Kernel efficiency is (best dense time * realised density) / sparse time. Writes ``results/gpu_attention_<gpu>.json``, or
``gpu_attention_float32_<gpu>.json``, after every shape.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.attention import flash_attention_3
from benchmarks.attention.accuracy import errors
from benchmarks.attention.baselines import (
    SparseFlex,
    dense_flex_ms,
    dense_times,
    flex_columns,
    flex_mask,
    flex_tensors,
    float8_ms,
)
from benchmarks.attention.call import GRAPH_TOKENS, AttentionCall, make_call, tables_of
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.layout import VideoLayout

SHAPES = {
    "Wan2.1 1.3B 480p": ((21, 30, 52), (0, 0), 12, 128),
    "Wan2.1 14B 720p": ((21, 45, 80), (0, 0), 40, 128),
    "HunyuanVideo 720p": ((33, 45, 80), (0, 256), 24, 128),
    "CogVideoX-5B": ((13, 30, 45), (226, 0), 48, 64),
    "Open-Sora-Plan 1.2 720p": ((24, 45, 80), (0, 0), 24, 96),
}
MAX_ERROR_RATIO = 2.0


@dataclass
class Dense:
    """What is measured once for a shape, and its best dense time."""

    facts: dict[str, Any]

    @property
    def times(self) -> dict[str, float]:
        return self.facts["dense_ms"]

    @property
    def best(self) -> str:
        return min(self.times, key=self.times.__getitem__)

    @property
    def best_ms(self) -> float:
        return self.times[self.best]


def measure_dense(name: str, call: AttentionCall) -> Dense:
    """Every dense kernel, ours with all heads dense, the ARM at the default options, and errors."""
    _, heads, tokens, head_dim = call.q.shape
    times = dense_times(call.q, call.k, call.v)
    half = call.q.dtype != torch.float32
    usual = replace(call, tables=Options().tables(call.layout, call.q.device))
    if half and (flex_ms := dense_flex_ms(call.q, call.k, call.v)) is not None:
        times["FlexAttention"] = flex_ms
    best = min(times.values())
    every_head = call.all_dense
    all_dense = measure.median_ms(lambda: call.attend(every_head))
    facts = {
        "shape": name,
        "grid": call.layout.grid,
        "text": call.layout.text,
        "tokens": tokens,
        "heads": heads,
        "head_dim": head_dim,
        "dense_ms": times,
        "dense_float8_ms": float8_ms(call.q, call.k, call.v) if half else None,
        "dense_tflops": call.flop / best / 1e9,
        "all_dense_ms": all_dense,
        "all_dense_ratio": all_dense / best,
        "portable_dense_ms": measure.median_ms(lambda: call.attend(every_head, portable=True)) if half else None,
        "arm_default_candidates": len(usual.tables.patterns),
        "arm_default_one_key_of": usual.tables.stride,
        "arm_default_ms": measure.graph_ms(usual.probe),
        "errors": errors(call),
    }
    return Dense(facts)


def measure_sparse(call: AttentionCall, dense: Dense) -> dict[str, Any]:
    """Ours at one sparsity: the whole call, its two kernels, and the ARM's share."""
    names = (*call.tables.patterns, "dense")
    sparse, kernel = measure.median_ms(call.whole), measure.median_ms(call.attend)
    arm = measure.graph_ms(call.probe)
    tokens = call.layout.tokens
    facts = {key: dense.facts[key] for key in ("shape", "grid", "text", "tokens", "heads", "head_dim", "dense_ms")}
    return facts | {
        "sparsity": call.sparsity,
        "chosen": dict(Counter(names[number] for number in call.chosen)),
        "density": call.density,
        "best_dense": dense.best,
        "sparse_ms": sparse,
        "sparse_graph_ms": measure.graph_ms(call.whole) if tokens < GRAPH_TOKENS else None,
        "kernel_ms": kernel,
        "arm_ms": arm,
        "arm_eager_ms": measure.median_ms(call.probe),
        "arm_share_of_dense": arm / dense.best_ms,
        "sparse_tflops": call.flop * call.density / sparse / 1e9,
        "speedup": dense.best_ms / sparse,
        "efficiency": dense.best_ms * call.density / sparse,
    }


def measure_flex(call: AttentionCall, sparse_flex: SparseFlex, columns: int, *, compare: bool) -> dict[str, Any]:
    """FlexAttention over the same token pairs, if it runs; with `compare`, how far its output is from ours."""
    mask = flex_mask(call.tables, call.chosen, columns)
    tensors = flex_tensors(call.q, call.k, call.v, call.tables, columns)
    flex = sparse_flex.compile(*tensors, mask)
    if flex is None:
        return {}
    result: dict[str, Any] = {
        "flex_ms": measure.median_ms(lambda: flex(*tensors, mask)),
        "flex_options": sparse_flex.options[call.q.shape[-1]],
    }
    if compare:
        theirs = flex(*tensors, mask)[:, :, : call.layout.tokens].float()
        ours = call.attend().index_select(2, call.tables.order).float()
        result["flex_max_difference"] = float((ours - theirs).abs().max())
        result["flex_relative_difference"] = measure.relative_error(ours, theirs)
    return result


def measure_shape(
    name: str, dtype: torch.dtype, sparsities: list[float], sparse_flex: SparseFlex | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is measured once for the shape, and a row for each sparsity, FlexAttention in it unless it is None."""
    torch.compiler.reset()  # another shape compiles FlexAttention again: forget the last one's
    grid, text, heads, head_dim = SHAPES[name]
    layout = VideoLayout(grid, text)
    columns = 0 if sparse_flex is None else flex_columns([tables_of(layout, sparsity) for sparsity in sparsities])
    dense: Dense | None = None
    rows: list[dict[str, Any]] = []
    for sparsity in sparsities:
        call = make_call(layout, heads, head_dim, sparsity, dtype=dtype)
        dense = dense or measure_dense(name, call)
        row = measure_sparse(call, dense)
        if sparse_flex is not None:
            row |= measure_flex(call, sparse_flex, columns, compare=not rows)
        rows.append(row)
        print_row(row)
    assert dense is not None
    print_dense(dense.facts)
    return dense.facts, rows


HEADER = (
    f"{'shape':24s} tokens sparsity density  dense ms sparse ms (graph) kernel ms   flex ms  ARM ms (eager)"
    "  TFLOP/s speed-up efficiency"
)


def print_row(row: dict[str, Any]) -> None:
    graph, flex = row["sparse_graph_ms"] or float("nan"), row.get("flex_ms", float("nan"))
    print(
        f"{row['shape']:24s} {row['tokens']:6d} {row['sparsity']:8.2f} {row['density']:7.3f}"
        f" {row['dense_ms'][row['best_dense']]:9.3f} {row['sparse_ms']:9.3f} {graph:7.3f} {row['kernel_ms']:9.3f}"
        f" {flex:9.3f} {row['arm_ms']:7.4f} {row['arm_eager_ms']:7.4f} {row['sparse_tflops']:8.1f}"
        f" {row['speedup']:8.2f} {row['efficiency']:10.3f}",
        flush=True,
    )


def print_dense(facts: dict[str, Any]) -> None:
    e = facts["errors"]
    print(
        "  dense "
        + ", ".join(f"{name} {ms:.3f} ms" for name, ms in facts["dense_ms"].items())
        + f", ours {facts['all_dense_ms']:.3f} ms ({facts['all_dense_ratio']:.3f} of the best);"
        + f" error over {e['baseline']}'s: dense {e['all_dense_ratio']:.2f}, sparse {e['sparse_ratio']:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.64, 0.8, 0.9])
    parser.add_argument(
        "--flex-options",
        type=Path,
        metavar="JSON",
        help="an earlier run's file: FlexAttention runs with the options that were fastest there, others are not tried",
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measure.needs_gpu()
    benchmark = "gpu_attention" if args.dtype == "bfloat16" else f"gpu_attention_{args.dtype}"
    out = args.out or measure.result_path(benchmark)
    start = time.perf_counter()
    shapes: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    head: dict[str, Any] = {"dtype": args.dtype, "max_error_ratio": MAX_ERROR_RATIO}
    head["flash_attention_3"] = flash_attention_3.version()
    known = {}
    if args.flex_options:
        earlier = json.loads(args.flex_options.read_text())
        known = {row["head_dim"]: row["flex_options"] for row in earlier["rows"] if row.get("flex_options")}
        head["note"] = f"FlexAttention ran with the options that were fastest on {earlier['date']}, {earlier['gpu']}"
    sparse_flex = SparseFlex(known) if args.dtype == "bfloat16" else None
    print(HEADER)
    for name in args.shapes:
        facts, more = measure_shape(name, getattr(torch, args.dtype), args.sparsity, sparse_flex)
        shapes.append(facts)
        rows.extend(more)
        measure.write_result(out, {**head, "shapes": shapes, "rows": rows})
    print(f"{time.perf_counter() - start:.0f} s")
    worst = max(max(s["errors"]["all_dense_ratio"], s["errors"]["sparse_ratio"]) for s in shapes)
    if not worst <= MAX_ERROR_RATIO:  # NaN fails too
        raise SystemExit(f"an error is {worst:.2f} times that of PyTorch's kernel, more than {MAX_ERROR_RATIO}")


if __name__ == "__main__":
    main()
