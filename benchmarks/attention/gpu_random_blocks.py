# SPDX-License-Identifier: Apache-2.0
"""Our kernel on somebody else's block mask: the shape and the figures that a FlashInfer pull request published.

    python -m benchmarks.attention.gpu_random_blocks

Every query block of every head keeps its own random key blocks, so there is no structure to profit from, and no ARM:
one block table for each head, chosen by hand. Random normal data; some rows are checked against float32 attention.
Writes ``results/gpu_random_blocks_<gpu>.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.attention.accuracy import attention_rows
from rainfusion_compile.kernels import operators

TOKENS, HEADS, HEAD_DIM, BLOCK, KEPT = 109_632, 7, 128, 64, 64
MAX_ERROR = 1e-2
PUBLISHED: dict[str, Any] = {
    "source": "flashinfer-ai/flashinfer pull request 5326",
    "url": "https://github.com/flashinfer-ai/flashinfer/pull/5326",
    "kernel": "vsa_sm90_blk64",
    "gpu": "H200",
    "ms": {"bfloat16": 5.077, "float16": 5.106},
}


def random_blocks(blocks: int, device: torch.device) -> Tensor:
    """Kept key blocks, ascending: int64 ``[heads, blocks, KEPT]``."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.rand(HEADS, blocks, blocks, device=device, generator=generator).topk(KEPT, -1).indices.sort(-1).values


def tables_of(kept: Tensor) -> tuple[Tensor, ...]:
    """The tables that depend on the masks, where pattern number h is head h's mask, and one more is dense."""
    blocks = kept.shape[1]
    every = torch.arange(blocks, device=kept.device)
    sparse_rows = torch.arange(HEADS * blocks, device=kept.device).view(HEADS, blocks)
    rows = torch.cat([sparse_rows, torch.full_like(sparse_rows[:1], HEADS * blocks)])
    lengths = torch.cat([torch.full_like(sparse_rows.flatten(), KEPT), every.new_tensor([blocks])])
    row_ptr = torch.cat([every[:1], lengths.cumsum(0)])
    sampled = torch.tensor([0, 1], device=kept.device).expand(len(lengths), 2)
    weight = torch.zeros(len(lengths), device=kept.device)
    return rows.int(), row_ptr.int(), torch.cat([kept.flatten(), every]).int(), sampled.int().contiguous(), weight


def check(out: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, rows: int = 64) -> float:
    """Relative L2 error of some query rows of every head."""
    at = torch.arange(rows, device=q.device) * q.shape[2] // rows
    want = []
    for head in range(HEADS):
        seen = torch.zeros(rows, kept.shape[1], dtype=torch.bool, device=q.device)
        seen.scatter_(1, kept[head, at // BLOCK], True)
        keys = seen.repeat_interleave(BLOCK, 1)[:, : q.shape[2]]
        want.append(attention_rows(q[0, head, at], k[0, head], v[0, head], keys))
    return measure.relative_error(out[0, :, at], torch.stack(want))


def measure_dtype(dtype: torch.dtype) -> dict[str, Any]:
    shape = (1, TOKENS, HEADS, HEAD_DIM)
    device = measure.DEVICE
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, device=device, generator=generator).to(dtype).permute(0, 2, 1, 3) for _ in range(3))
    blocks = TOKENS // BLOCK
    kept = random_blocks(blocks, device)
    order = torch.arange(TOKENS, device=device, dtype=torch.int32)
    choice = torch.arange(HEADS, device=device, dtype=torch.int32)[None]
    tables = tables_of(kept)

    def attend() -> Tensor:
        return operators.block_sparse_attention(
            q, k, v, choice, None, order, order, *tables, BLOCK, BLOCK, HEAD_DIM**-0.5
        )

    name = str(dtype).removeprefix("torch.")
    flop = 4 * HEADS * HEAD_DIM * blocks * BLOCK * KEPT * BLOCK
    ms, published = measure.median_ms(attend), PUBLISHED["ms"][name]
    return {
        "dtype": name,
        "ms": ms,
        "tflops": flop / ms / 1e9,
        "published_ms": published,
        "published_tflops": flop / published / 1e9,
        "speedup_over_published": published / ms,
        "relative_error": check(attend(), q, k, v, kept),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measure.needs_gpu()
    rows = []
    print("dtype     ours ms  TFLOP/s  published ms  TFLOP/s    error")
    for dtype in (torch.bfloat16, torch.float16):
        row = measure_dtype(dtype)
        rows.append(row)
        print(
            f"{row['dtype']:8s} {row['ms']:8.3f} {row['tflops']:8.1f} {row['published_ms']:13.3f}"
            f" {row['published_tflops']:8.1f} {row['relative_error']:8.1e}",
            flush=True,
        )
    shape = {"tokens": TOKENS, "heads": HEADS, "head_dim": HEAD_DIM, "block": BLOCK, "kept_blocks": KEPT}
    result = {**shape, "blocks": TOKENS // BLOCK, "published": PUBLISHED, "rows": rows}
    measure.write_result(args.out or measure.result_path("gpu_random_blocks"), result)
    if not all(row["relative_error"] < MAX_ERROR for row in rows):  # NaN fails too
        raise SystemExit(f"a relative error is more than {MAX_ERROR}: the figures are worthless")


if __name__ == "__main__":
    main()
