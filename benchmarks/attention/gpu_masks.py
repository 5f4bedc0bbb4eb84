# SPDX-License-Identifier: Apache-2.0
"""One attention call under a key mask on a CUDA GPU: ours, ARM included, against the best dense one that takes it.

    python -m benchmarks.attention.gpu_masks

bfloat16, at the shapes of ``gpu_attention.py`` and one sparsity. A bool mask hides 196 keys: the last ones, as padding
of text does, or the first ones. Writes ``results/gpu_masks_<gpu>.json`` after every shape.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.attention import flash_attention_3
from benchmarks.attention.baselines import best_dense
from benchmarks.attention.call import make_call
from benchmarks.attention.gpu_attention import SHAPES
from rainfusion_compile.sparsity.layout import VideoLayout

HIDDEN = 196  # what padding HunyuanVideo's text leaves of 256 tokens if 60 are real


def key_masks(tokens: int) -> dict[str, Tensor]:
    """Bool masks ``[1, 1, S]`` that hide HIDDEN keys at either end."""
    token = torch.arange(tokens, device=measure.DEVICE)
    return {"last": (token < tokens - HIDDEN)[None, None], "first": (token >= HIDDEN)[None, None]}


def measure_shape(name: str, sparsity: float) -> list[dict[str, Any]]:
    grid, text, heads, head_dim = SHAPES[name]
    call = make_call(VideoLayout(grid, text), heads, head_dim, sparsity)
    unmasked, unmasked_ms = best_dense(call.q, call.k, call.v)
    without_mask = {
        "dense_without_mask_ms": {unmasked: unmasked_ms},
        "sparse_without_mask_ms": measure.median_ms(call.whole),
        "arm_without_mask_ms": measure.graph_ms(call.probe),
    }
    rows = []
    for which, mask in key_masks(call.layout.tokens).items():
        dense, dense_ms = best_dense(call.q, call.k, call.v, mask=mask[:, None])
        sparse, arm = measure.median_ms(partial(call.whole, mask)), measure.graph_ms(partial(call.probe, mask))
        rows.append(
            {
                "shape": name,
                "tokens": call.layout.tokens,
                "heads": heads,
                "head_dim": head_dim,
                "hidden": which,
                "sparsity": sparsity,
                "density": call.density,
                "dense_ms": {dense: dense_ms},
                **without_mask,
                "sparse_ms": sparse,
                "kernel_ms": measure.median_ms(partial(call.attend, None, mask)),
                "arm_ms": arm,
                "arm_share_of_dense": arm / dense_ms,
                "arm_share_of_dense_without_mask": arm / unmasked_ms,
                "speedup": dense_ms / sparse,
                "speedup_over_dense_without_mask": unmasked_ms / sparse,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.64)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measure.needs_gpu()
    rows: list[dict[str, Any]] = []
    print(f"{'shape':24s} hidden  dense ms (no mask)  sparse ms (no mask)   ARM ms (no mask)  speed-up")
    for name in args.shapes:
        more = measure_shape(name, args.sparsity)
        rows.extend(more)
        for row in more:
            (dense,), (unmasked,) = row["dense_ms"].values(), row["dense_without_mask_ms"].values()
            print(
                f"{name:24s} {row['hidden']:6s} {dense:9.3f} {unmasked:9.3f}"
                f" {row['sparse_ms']:10.3f} {row['sparse_without_mask_ms']:9.3f}"
                f" {row['arm_ms']:8.4f} {row['arm_without_mask_ms']:8.4f} {row['speedup']:9.2f}",
                flush=True,
            )
        result = {
            "dtype": "bfloat16",
            "hidden_keys": HIDDEN,
            "flash_attention_3": flash_attention_3.version(),
            "rows": rows,
        }
        measure.write_result(args.out or measure.result_path("gpu_masks"), result)


if __name__ == "__main__":
    main()
