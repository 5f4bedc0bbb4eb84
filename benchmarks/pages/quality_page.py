# SPDX-License-Identifier: Apache-2.0
"""Write ``docs/quality.md`` and its picture from ``results/quality_demo_<gpu>.json``.

python -m benchmarks.pages.quality_page
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.pages.performance_plot import groups

ROOT = Path(__file__).parents[2]
PICTURE = "images/quality.png"
PICTURED = ("ours", "recall", "RainFusion+", "two bands", "block means", "heaviest blocks")

PAGE = """\
# What sparse attention does to a video

Written by `python -m benchmarks.pages.quality_page` from [measured figures](../benchmarks/results/{file}), which
`make quality` makes ({gpu}, torch {torch}, {date}).

The committed demo model (diffusers' Wan class, 3.6 M parameters, 8,736 tokens, trained from scratch on procedural
video), {steps} Euler steps, {captions} captions, {dtype}. Each video is compared with the dense one from the same
noise. *Density* is kept pairs over all pairs of every self-attention of the run, dense heads and dense steps
included. *Loss* is the change of the validation loss, on held-out clips, with all steps sparse.

![PSNR over density]({picture})

{table}

- **ours**: the default rule under a budget for the error of each attention (`error`), samples outside the windows.
- **recall**: the RainFusion paper's rule (`arm="recall"`, `recall_target=0.95`), windows alone. **RainFusion+**: the
  sparsest bandwidth with 90 % recall, else the widest. **two bands**: Sparse-VideoGen's classes, chosen by the error
  of sampled rows. **block means**: for each query block the key blocks of highest mean score (RainFusion2.0).
  **heaviest blocks**: for each query block those that do hold most, an oracle. All as told in their papers and at
  exact densities, on our blocks, with text and the first frame kept; their own code was not run.
- "ours, ..." are ablations at an error of 10 %; "one sample": the same keys in every call, instead of others.
- The presets "quality", "balanced" (the default) and "fast" are errors of 0.03, 0.05 and 0.1, without dense steps.

## What was foretold

The share of (layer, step) pairs whose error, as a root mean square over the videos, is within a factor of 1.3 of the
one that the probe foretold, and the same for each video alone:

{foretold}

## What was not measured

{missing}Big models: no weights were at hand, and this model's heads look more evenly everywhere than those of big
models are said to. VBench. With the weights, `python examples/compare_pipeline.py MODEL --prompts ...` samples
dense and sparse from the same seeds and tells PSNR, SSIM, densities and foretold errors.
"""


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| rule | setting | dense first steps | density | PSNR (least) | SSIM | flicker | loss |",
        "|---" * 8 + "|",
    ]
    lines += [
        f"| {row['rule']} | {row['setting']} | {row['dense_steps']} | {row['density']:.3f} | {row['psnr_db']:.1f} dB"
        f" ({row['psnr_db_least']:.1f}) | {row['ssim']:.3f} | {row['flicker_change']:+.1%}"
        f" | {row['validation_loss_change']:+.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def foretold(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| setting | dense first steps | over the videos | each video | true over foretold, median |",
        "|---" * 5 + "|",
    ]
    lines += [
        f"| {row['setting']} | {row['dense_steps']} | {row['predicted_within_1.3']:.0%}"
        f" | {row['predicted_within_1.3_each_video']:.0%} | {row['error_over_predicted']:.2f} |"
        for row in rows
        if row["rule"] == "ours" and "predicted_within_1.3" in row
    ]
    return "\n".join(lines)


def draw(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """PSNR over density, a line for each rule without dense steps."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    for rule, own in groups([row for row in rows if not row["dense_steps"]], "rule").items():
        if rule in PICTURED:
            points = sorted((row["density"], row["psnr_db"]) for row in own)
            style = {"linewidth": 2.4, "color": "black", "zorder": 3} if rule == "ours" else {"linewidth": 1.2}
            axis.plot(*zip(*points, strict=True), "o-", markersize=4, label=rule, **style)
    axis.set_xlabel("density of all self-attention")
    axis.set_ylabel("PSNR against the dense video, dB")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def newest() -> Path:
    """The results of the GPU (or CPU) that were written last, by the date in them."""
    found = sorted((ROOT / "benchmarks" / "results").glob("quality_demo_*.json"))
    return max(found, key=lambda path: json.loads(path.read_text())["date"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=newest(), help="by default the newest of all GPUs")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    result = json.loads(args.results.read_text())
    rows = result["rows"]
    draw(args.docs / PICTURE, rows, f"Demo model, {result['steps']} steps, mean of {result['captions']} captions")
    measured = {row["rule"] for row in rows}
    missing = [rule for rule in ("ours, one sample",) if rule not in measured]
    text = PAGE.format(
        **result, file=args.results.name, picture=PICTURE, table=table(rows), foretold=foretold(rows),
        missing="".join(f"The rule \"{rule}\" of the benchmark in this run. " for rule in missing),
    )  # fmt: skip
    (args.docs / "quality.md").write_text(text)


if __name__ == "__main__":
    main()
