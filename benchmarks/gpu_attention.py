# SPDX-License-Identifier: Apache-2.0
"""One attention call on a CUDA GPU at real shapes: ours, ARM included, against the best dense kernel of the same run.

    python benchmarks/gpu_attention.py

bfloat16, random and structured data, medians of `triton.testing.do_bench`. Heads follow spatial, temporal and textural
patterns in turn; the ARM must find out which. Kernel efficiency is (dense time * realised density) / sparse time.
Writes ``results/gpu_attention.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from structured import structured_qk
from torch.nn.attention import SDPBackend, sdpa_kernel

import rainfusion_compile
from rainfusion_compile.grid import VideoLayout
from rainfusion_compile.kernels import operators
from rainfusion_compile.patterns import PATTERNS
from rainfusion_compile.tables import block_tables

SHAPES = {
    "Wan2.1 1.3B 480p": ((21, 30, 52), (0, 0), 12, 128),
    "Wan2.1 14B 720p": ((21, 45, 80), (0, 0), 40, 128),
    "HunyuanVideo 720p": ((33, 45, 80), (0, 256), 24, 128),
    "CogVideoX-5B": ((13, 30, 45), (226, 0), 48, 64),
    "Open-Sora-Plan 1.2 720p": ((24, 45, 80), (0, 0), 24, 96),
}
OUT = Path(__file__).parent / "results" / "gpu_attention.json"


def median_ms(function: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median"))


def dense_ms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, float]:
    """Time of each dense SDPA backend that runs here."""
    times = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("Flash", SDPBackend.FLASH_ATTENTION)):
        try:
            with sdpa_kernel([backend], set_priority=True):
                times[name] = median_ms(lambda: F.scaled_dot_product_attention(q, k, v))
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
    return times


def measure(name: str, sparsities: list[float]) -> list[dict[str, Any]]:
    grid, text, heads, head_dim = SHAPES[name]
    layout = VideoLayout(grid, text)
    rows = []
    dense: dict[str, float] = {}
    v = torch.randn(1, layout.tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16).permute(0, 2, 1, 3)
    for sparsity in sparsities:
        tables = block_tables(layout, sparsity=sparsity, patterns=PATTERNS, device=v.device)
        kinds = [PATTERNS[number % len(PATTERNS)] for number in range(heads)]
        q, k = structured_qk(layout, kinds, head_dim=head_dim, classes=tables.radii.classes)
        q, k = (x.permute(0, 2, 1, 3).contiguous().to(v).permute(0, 2, 1, 3) for x in (q, k))
        dense = dense or dense_ms(q, k, v)
        t, scale = tables, head_dim**-0.5
        keep = (t.order, t.samples, t.sample_keep, t.key_keep)
        probe = partial(operators.arm_probe, q, k, None, *keep, len(t.patterns), t.block_k, scale, 0.9, 0.5)
        choice, _ = probe()
        table = (t.order, t.key_order, t.rows, t.row_ptr, t.indices)
        attend = partial(operators.block_sparse_attention, q, k, v, choice, None, *table, t.block_q, t.block_k, scale)
        both = partial(
            rainfusion_compile.attention,
            *(q, k, v),
            grid=grid,
            text=text,
            sparsity=sparsity,
            recall_target=0.9,
            min_recall=0.5,
        )
        names, densities = (*tables.patterns, "dense"), (*tables.densities, 1.0)
        chosen = choice[0].tolist()
        density = statistics.mean(densities[number] for number in chosen)
        best = min(dense.values())
        sparse, arm, kernel = median_ms(both), median_ms(probe), median_ms(attend)
        flop = 4 * heads * layout.tokens**2 * head_dim
        rows.append(
            {
                "shape": name,
                "grid": grid,
                "text": text,
                "tokens": layout.tokens,
                "heads": heads,
                "head_dim": head_dim,
                "sparsity": sparsity,
                "chosen": {pattern: sum(names[c] == pattern for c in chosen) for pattern in names},
                "density": density,
                "dense_ms": dense,
                "dense_tflops": flop / best / 1e9,
                "sparse_ms": sparse,
                "kernel_ms": kernel,
                "arm_ms": arm,
                "arm_share_of_dense": arm / best,
                "sparse_tflops": flop * density / sparse / 1e9,
                "speedup": best / sparse,
                "efficiency": best * density / sparse,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.64, 0.8])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [row for name in args.shapes for row in measure(name, args.sparsity)]
    print(f"{'shape':24s} tokens sparsity density  dense ms  sparse ms  ARM ms  TFLOP/s  speed-up  efficiency")
    for row in rows:
        best = min(row["dense_ms"], key=row["dense_ms"].__getitem__)
        print(
            f"{row['shape']:24s} {row['tokens']:6d} {row['sparsity']:8.2f} {row['density']:7.3f}"
            f" {row['dense_ms'][best]:9.3f} {row['sparse_ms']:10.3f} {row['arm_ms']:7.3f} {row['sparse_tflops']:8.1f}"
            f" {row['speedup']:9.2f} {row['efficiency']:11.3f}  ({best})"
        )
    result = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": "bfloat16",
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
