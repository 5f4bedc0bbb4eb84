# SPDX-License-Identifier: Apache-2.0
"""What heads of each kind cost on a CUDA GPU: all heads take one candidate of the default options, or stay dense.

    python -m benchmarks.attention.gpu_patterns

bfloat16, random queries, keys and values, attention alone, without the ARM; shapes as in ``gpu_attention.py``. There,
heads take three patterns in turn and all draw the same samples, so that FlexAttention can be given their mask. Here
they draw and select as in users' models. Each output is finite, and one head's equal to the portable kernel's. Writes
``results/gpu_patterns_<gpu>.json`` after every shape.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.attention import flash_attention_3
from benchmarks.attention.baselines import best_dense
from benchmarks.attention.gpu_attention import SHAPES
from rainfusion_compile.kernels import operators
from rainfusion_compile.kernels.gpu.attention import block_sparse_attention
from rainfusion_compile.kernels.gpu.configs import attention_config
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.block_tables import BlockTables
from rainfusion_compile.sparsity.layout import VideoLayout

MAX_DIFFERENCE = 1e-2  # relative L2, of two kernels that both round to bfloat16


def measure_shape(name: str, sparsities: list[float]) -> list[dict[str, Any]]:
    """A row for each candidate of each sparsity, and one for dense heads."""
    grid, text, heads, head_dim = SHAPES[name]
    layout, generator = VideoLayout(grid, text), torch.Generator(measure.DEVICE).manual_seed(1)
    shape = (3, 1, layout.tokens, heads, head_dim)
    q, k, v = torch.randn(shape, device=measure.DEVICE, dtype=torch.bfloat16, generator=generator).transpose(2, 3)
    baseline, dense_ms = best_dense(q, k, v)
    facts = {"shape": name, "grid": grid, "text": text, "tokens": layout.tokens, "heads": heads, "head_dim": head_dim}
    facts |= {"baseline": baseline, "dense_ms": dense_ms}
    rows: list[dict[str, Any]] = []
    for sparsity in sparsities:
        tables = Options(sparsity=sparsity).tables(layout, q.device)
        kinds = [(number, pattern, tables.densities[number]) for number, pattern in enumerate(tables.patterns)]
        for number, pattern, density in [*kinds, *([] if rows else [(len(kinds), "dense", 1.0)])]:
            took = _milliseconds(q, k, v, tables, number)
            asked = None if pattern == "dense" else sparsity
            row = {"pattern": pattern, "sparsity": asked, "density": density, "kernel_ms": took}
            rows.append(facts | row | {"speedup": dense_ms / took, "efficiency": dense_ms * density / took})
            print_row(rows[-1])
    return rows


def _milliseconds(q: Tensor, k: Tensor, v: Tensor, tables: BlockTables, number: int) -> float:
    """The time of attention if all heads take a candidate, once its output is checked."""
    choice = torch.full(q.shape[:2], number, dtype=torch.int32, device=q.device)
    arguments, scale = tables.attention_arguments, q.shape[-1] ** -0.5

    def attend() -> Tensor:
        return operators.block_sparse_attention(q, k, v, choice, None, *arguments, scale)

    found, config = attend(), attention_config(q.shape[-1], q.dtype, None)
    portable = block_sparse_attention(
        q[:, :1], k[:, :1], v[:, :1], choice[:, :1], None, arguments, scale, config=config
    )
    difference = measure.relative_error(found[:, :1], portable)
    if not (difference < MAX_DIFFERENCE and bool(found.isfinite().all())):
        raise SystemExit(f"candidate {number} of {tables.layout}: {difference:.1e} from the portable kernel")
    return measure.median_ms(attend)


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
    rows: list[dict[str, Any]] = []
    print("shape, pattern, sparsity, density, dense ms, attention's ms, speed-up, efficiency")
    for name in args.shapes:
        rows.extend(measure_shape(name, args.sparsity))
        head = {"dtype": "bfloat16", "flash_attention_3": flash_attention_3.version(), "rows": rows}
        measure.write_result(args.out or measure.result_path("gpu_patterns"), head)


if __name__ == "__main__":
    main()
