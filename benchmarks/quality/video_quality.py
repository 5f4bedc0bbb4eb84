# SPDX-License-Identifier: Apache-2.0
"""What sparse attention does to a model's videos, for our rule and others, at realised density.

    make quality                                                                     # both models, on a GPU
    python -m benchmarks.quality.video_quality scenes --captions 8
    python -m benchmarks.quality.video_quality demo --device cpu --captions 1 --steps 8 --rules ours --out FILE.json

The committed weights, same noise and captions for all, no guidance. Videos are compared with the dense ones; the
validation loss is that of 8 held-out clips. Density is kept pairs over all pairs of every self-attention of the run,
dense steps and dense heads included. Writes ``results/quality_<model>_<gpu>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import measure
from benchmarks.quality.rules import BlockMeans, Heaviest, OneSample, Ours, Rule, TwoBands
from benchmarks.quality.subjects import SUBJECTS, Subject
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS

from similarity import flicker, psnr, ssim  # isort: skip  # beside the examples, whose folder `subjects` names

Make = Callable[[VideoLayout, torch.device], Rule]


def ours(**options: Any) -> Make:
    return lambda layout, device: Ours(layout, device, Options(**options))


# (family, setting, rule, dense first steps of 16)
RUNS: list[tuple[str, str, Make, int]] = [
    *(("ours", f"error {error:g}", ours(error=error), 0) for error in (0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2)),
    *(("ours", f"error {error:g}", ours(error=error), steps) for error in (0.04, 0.1) for steps in (2, 3)),
    *(("ours, three patterns", f"error {error:g}", ours(error=error, patterns=PATTERNS), 0) for error in (0.05, 0.1)),
    (
        "ours, one sample", "error 0.1",
        lambda layout, device: OneSample(layout, device, Options(error=0.1, patterns=PATTERNS)), 0,
    ),
    ("ours, .64 only", "error 0.1", ours(error=0.1, sparsity=0.64), 0),
    ("ours, adaptive", "error 0.1", ours(error=0.1, patterns=("adaptive",)), 0),
    ("ours, spatial and temporal", "error 0.1", ours(error=0.1, patterns=("spatial", "temporal")), 0),
    ("ours, spatial and textural", "error 0.1", ours(error=0.1, patterns=("spatial", "textural")), 0),
    ("ours, textural", "error 0.1", ours(error=0.1, patterns=("textural",)), 0),
    *(
        ("recall", f"sparsity .64, min_recall {least:g}", ours(arm="recall", sparsity=0.64, min_recall=least), steps)
        for least, steps in ((0.8, 0), (0.8, 2), (0.8, 3), (0.6, 0), (0.0, 0))
    ),
    (
        "RainFusion+", "recall .9 of (.5, .25, .125)",
        ours(arm="recall", sparsity=(0.875, 0.75, 0.5), recall_target=0.9, min_recall=0.0), 0,
    ),
    *(
        ("two bands", f"sparsity {s:g}", lambda layout, device, s=s: TwoBands(layout, device, s), 0)
        for s in (0.5, 0.64, 0.8)
    ),
    *(
        ("block means", f"sparsity {s:g}", lambda layout, device, s=s: BlockMeans(layout, device, s), 0)
        for s in (0.3, 0.5, 0.64, 0.8)
    ),
    *(
        ("heaviest blocks", f"sparsity {s:g}", lambda layout, device, s=s: Heaviest(layout, device, s), 0)
        for s in (0.3, 0.5, 0.64, 0.8)
    ),
]  # fmt: skip


def video_operands(args: Any, kwargs: Any, tokens: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v of a call of scaled dot-product attention, if it is a self-attention over so many tokens.

    Raises:
        ValueError: it has a mask, of which no rule is told.
    """
    given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
    q, k, v = given["query"], given["key"], given["value"]
    if not q.shape[2] == k.shape[2] == tokens:
        return None
    if given.get("attn_mask") is not None:
        raise ValueError("the rules are given no mask, but this attention over the video has one")
    return q, k, v


class Attend(TorchFunctionMode):
    """Runs every self-attention over the video by a rule, sample by sample, and records what came of it."""

    def __init__(self, rule: Rule, tokens: int) -> None:
        super().__init__()
        self.rule, self.tokens, self.is_sparse = rule, tokens, True
        self.densities: list[Tensor] = []
        self.errors: list[tuple[Tensor, Tensor | None]] = []  # the layer's, true and foretold

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dense = func(*args, **kwargs)
        if func is not F.scaled_dot_product_attention:
            return dense
        operands = video_operands(args, kwargs, self.tokens)
        if operands is None:
            return dense
        q, k, v = operands
        if not self.is_sparse:
            self.densities += [torch.ones((), device=q.device)] * len(q)
            return dense
        outputs = []
        for sample in range(len(q)):
            done = self.rule.attend(*(x[sample : sample + 1] for x in (q, k, v)))
            own = dense[sample]
            self.errors.append(((done.output[0] - own).norm() / own.norm(), done.predicted))
            self.densities.append(done.density)
            outputs.append(done.output)
        return torch.cat(outputs)


class Bench:
    """A subject and its dense results."""

    def __init__(self, subject: Subject, steps: int) -> None:
        self.subject, self.steps = subject, steps
        self.dense = subject.sample(lambda step: None, steps)
        self.dense_loss = subject.loss()

    def run(self, make: Make, dense_steps: int) -> dict[str, Any]:
        layout = self.subject.layout
        attend = Attend(make(layout, self.dense.device), layout.tokens)

        def before(step: int) -> None:
            attend.is_sparse = step >= dense_steps

        with attend:
            video = self.subject.sample(before, self.steps)
            density = float(torch.stack(attend.densities).mean())
            true = torch.stack([error for error, _ in attend.errors])
            foretold = [error for _, error in attend.errors if error is not None]
            loss = self.subject.loss()
        each = [psnr(*pair) for pair in zip(video, self.dense, strict=True)]
        facts: dict[str, Any] = {
            "density": density,
            "psnr_db": statistics.mean(each),
            "psnr_db_least": min(each),
            "ssim": statistics.mean(ssim(*pair) for pair in zip(video, self.dense, strict=True)),
            "flicker_change": statistics.mean(map(flicker, video)) / statistics.mean(map(flicker, self.dense)) - 1,
            "validation_loss_change": loss / self.dense_loss - 1,
            "layer_error": float(true.mean()),
        }
        if len(foretold) == len(true):  # of the layers and steps, in each video and over all of them
            ratio = true / torch.stack(foretold)
            facts["error_over_predicted"] = float(ratio.median())
            facts["predicted_within_1.3_each_video"] = _within(ratio, 1.3)
            over_videos = [
                x.unflatten(0, (-1, len(video))).square().mean(1).sqrt() for x in (true, torch.stack(foretold))
            ]
            facts["predicted_within_1.3"] = _within(over_videos[0] / over_videos[1], 1.3)
        return facts


def _within(ratio: Tensor, factor: float) -> float:
    return float(((ratio < factor) & (ratio > 1 / factor)).float().mean())


def kept_rows(path: Path, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier run measured of RUNS in this setting, with these versions, on such a GPU: to go on from there."""
    if not path.exists():
        return []
    before, now = json.loads(path.read_text()), measure.machine() | setting
    alike = all(before.get(name) == value for name, value in now.items() if name not in ("date", "dense_loss"))
    known = {(family, name, dense_steps) for family, name, _, dense_steps in RUNS}
    rows: list[dict[str, Any]] = before["rows"] if alike else []
    return [row for row in rows if (row["rule"], row["setting"], row["dense_steps"]) in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(SUBJECTS))
    parser.add_argument("--weights", type=Path, help="folder of the model; by default the committed one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="by default the model's own")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--captions", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rules", nargs="+", help="families to run; all by default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device.type == "cpu":
        print(
            "on the CPU, where each rule takes long: see --captions, --steps and --rules", file=sys.stderr, flush=True
        )
    out = args.out or measure.result_path(f"quality_{args.model}")
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = getattr(torch, args.dtype) if args.dtype else None
    subject = SUBJECTS[args.model](args.captions, args.device, dtype, args.weights)
    bench = Bench(subject, args.steps)
    setting = {
        "captions": args.captions,
        "steps": args.steps,
        "dense_loss": bench.dense_loss,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "parameters": subject.parameters,
        "tokens": subject.layout.tokens,
    }
    rows, order = kept_rows(out, setting), [(family, name, dense_steps) for family, name, _, dense_steps in RUNS]
    print(f"{'rule':28} {'setting':30} dense steps  density   PSNR (least)    SSIM    loss  foretold")
    for family, name, make, dense_steps in RUNS:
        if args.rules and family not in args.rules:
            continue
        start = time.perf_counter()
        facts = bench.run(make, round(dense_steps * args.steps / 16))
        run = {"rule": family, "setting": name, "dense_steps": dense_steps}
        rows = [row for row in rows if not run.items() <= row.items()]
        rows.append(run | facts)
        rows.sort(key=lambda row: order.index((row["rule"], row["setting"], row["dense_steps"])))
        print(
            f"{family:28} {name:30} {dense_steps:11d}  {facts['density']:7.3f}  {facts['psnr_db']:5.1f}  "
            f"{facts['psnr_db_least']:6.1f}  {facts['ssim']:6.3f}  {facts['validation_loss_change']:+6.1%}"
            f"  {facts.get('predicted_within_1.3', float('nan')):5.2f}  ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
        measure.write_result(out, setting | {"rows": rows})


if __name__ == "__main__":
    with torch.no_grad():
        main()
