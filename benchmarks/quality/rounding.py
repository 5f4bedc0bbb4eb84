# SPDX-License-Identifier: Apache-2.0
"""What 8-bit numbers would do to the attentions of a trained model, of each kind and where they could stand.

    python -m benchmarks.quality.rounding demo
    python -m benchmarks.quality.rounding scenes

Queries, keys and values are those of a dense run, of every layer at a few steps; all of attention is kept. Queries have
a scale for 64 rows, keys and values one for a head, keys are rounded without their mean, and weights of values are
relative to the row's largest. Errors are relative to the dense output. Beside them stands what the ARM foretells of
queries and keys as integers, which is what ``precision="int8"`` does (at a head_dim that these models do not have, so
the numbers are rounded here and multiplied in float32).

Needs a GPU, for the ARM's part is that of the GPU kernels. Writes ``results/quality_rounding_<model>_<gpu>.json``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.quality.attention_quality import STEPS, Look
from benchmarks.quality.subjects import SUBJECTS, Subject
from rainfusion_compile.kernels.gpu.int8_keys import score_noise
from rainfusion_compile.sparsity.block_tables import SAMPLES
from rainfusion_compile.sparsity.layout import VideoLayout

QUERIES = 256  # of each head, at random
ROWS = 64
FORMATS = {"int8": 127.0, "float8 (e4m3)": 448.0}
WHERE = ("queries and keys", "weights and values", "both")


def rounded(x: Tensor, largest: Tensor | float, kind: str) -> Tensor:
    """To 8 bits, by a scale that makes `largest` the largest number there is."""
    scale = largest / FORMATS[kind]
    steps = x / scale
    return (steps.round() if kind == "int8" else steps.to(torch.float8_e4m3fn).float()) * scale


def round_scores(q: Tensor, k: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    k = k - k.mean(1, keepdim=True)
    blocks = F.pad(q, (0, 0, 0, -q.shape[1] % ROWS)).unflatten(1, (-1, ROWS))
    blocks = rounded(blocks, blocks.abs().amax((2, 3), keepdim=True).clamp_min(1e-9), kind)
    return blocks.flatten(1, 2)[:, : q.shape[1]], rounded(k, k.abs().amax((1, 2), keepdim=True), kind)


def attend(q: Tensor, k: Tensor, v: Tensor, kind: str | None = None) -> Tensor:
    """Dense attention of some queries, with weights and values rounded if a kind is given."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    if kind is not None:
        weights, v = rounded(weights, 1.0, kind), rounded(v, v.abs().amax((1, 2), keepdim=True), kind)
    return weights @ v / total


class Rounding:
    """Looks at attentions (`Look`) and keeps their errors."""

    def __init__(self, layout: VideoLayout) -> None:
        self.layout = layout
        self.errors: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.foretold: list[float] = []
        self.generator = torch.Generator(measure.DEVICE).manual_seed(0)

    def look(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """A sample's queries, keys and values ``[H, S, D]``."""
        q, k, v = (x.float() for x in (q, k, v))
        some = torch.randperm(q.shape[1], generator=self.generator, device=q.device)[:QUERIES]
        dense = attend(q[:, some], k, v)
        for kind in FORMATS:
            queries, keys = round_scores(q, k, kind)
            for where in WHERE:
                scores = (q, k) if where == WHERE[1] else (queries, keys)
                output = attend(scores[0][:, some], scores[1], v, None if where == WHERE[0] else kind)
                self.errors[kind, where].append(float((output - dense).norm() / dense.norm()))
        few = some[:SAMPLES]
        noise = score_noise(q[None].contiguous(), k[None].contiguous(), few.int(), q.shape[-1] ** -0.5)[0]
        squares = (q[:, few] @ k.mT * q.shape[-1] ** -0.5).softmax(-1).square()
        own = dense[:, :SAMPLES]
        spread = squares @ v.square().sum(-1, keepdim=True) - 2 * ((squares @ v) * own).sum(-1, keepdim=True)
        spread += squares.sum(-1, keepdim=True) * own.square().sum(-1, keepdim=True)
        self.foretold.append(float(((noise[..., None] * spread).sum() / own.square().sum()).sqrt()))

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for (kind, where), errors in self.errors.items():
            row: dict[str, Any] = {
                "kind": kind,
                "where": where,
                "error": math.sqrt(statistics.fmean(x * x for x in errors)),
            }
            row |= {"median": statistics.median(errors), "most": max(errors)}
            if (kind, where) == ("int8", WHERE[0]):
                ratios = sorted(a / b for a, b in zip(self.foretold, errors, strict=True))
                middle = ratios[len(ratios) // 2]
                row["foretold_over_true"] = {"least": ratios[0], "median": middle, "most": ratios[-1]}
            rows.append(row)
        return rows


def study(subject: Subject, steps: int) -> dict[str, Any]:
    found = Rounding(subject.layout)
    look = Look(found)
    chosen = {round(share * steps) for share in STEPS}

    def before(step: int) -> None:
        look.on = step in chosen

    with look, torch.no_grad():
        subject.sample(before, steps)
    return {"attentions": look.seen, "rows": found.rows()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(SUBJECTS))
    parser.add_argument("--captions", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    measure.needs_gpu()
    subject = SUBJECTS[args.model](args.captions, measure.DEVICE)
    result = {"model": args.model, "captions": args.captions, "steps": args.steps, **study(subject, args.steps)}
    for row in result["rows"]:
        print(f"{row['kind']:14s} {row['where']:20s} error {row['error']:.4f} most {row['most']:.4f}")
    measure.write_result(args.out or measure.result_path(f"quality_rounding_{args.model}"), result)


if __name__ == "__main__":
    main()
