# SPDX-License-Identifier: Apache-2.0
"""Write ``docs/quality.md`` and its picture from ``results/quality_<model>_<gpu>.json`` and ``quality_attention_...``.

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
from benchmarks.pages.performance_tables import Column, Row, cell
from benchmarks.pages.performance_tables import table as markdown
from rainfusion_compile.sparsity.block_tables import LEAST_KEYS, SAMPLES

ROOT = Path(__file__).parents[2]
PICTURE = "images/quality.png"
PICTURED = ("ours", "recall", "RainFusion+", "two bands", "block means", "heaviest blocks")
MODELS = {
    "demo": "The demo model: diffusers' Wan class, {parameters:.1f} M parameters, {tokens:,} tokens, trained "
    "from scratch on procedural video ([weights](../examples/weights))",
    "scenes": "The scene model: diffusers' HunyuanVideo class, {parameters:.1f} M parameters, {tokens:,} tokens, the "
    "caption's among them, trained from scratch on procedural scenes of moving, textured shapes that hide one another "
    "under a moving camera ([weights](../benchmarks/quality/scenes/weights))",
}

HEAD = """\
# What sparse attention does to a video

Written by `python -m benchmarks.pages.quality_page` from measured figures in
[benchmarks/results](../benchmarks/results), which `make quality` makes.

Each video is compared with the dense one from the same noise. *Density* is kept pairs over all pairs of every
self-attention of the run, dense heads and dense steps included. *Loss* is the change of the validation loss, on
held-out clips, with all steps sparse.

![PSNR over density]({picture})

- **ours**: the default rule under a budget for the error of each attention (`error`), samples outside the windows.
- **recall**: the RainFusion paper's rule (`arm="recall"`, `recall_target=0.95`), windows alone. **RainFusion+**: the
  sparsest bandwidth with 90 % recall, else the widest. **two bands**: Sparse-VideoGen's classes, chosen by the error
  of sampled rows. **block means**: for each query block the key blocks of highest mean score (RainFusion2.0).
  **heaviest blocks**: for each query block those that do hold most, an oracle. All as told in their papers and at
  exact densities, on our blocks, with text and the first frame kept; their own code was not run.
- "ours, ..." are ablations; "three patterns": RainFusion's alone, nothing that heads select; "one sample": these with
  the same keys in every call, instead of others.
- The presets "quality", "balanced" (the default) and "fast" are errors of 0.02, 0.04 and 0.1, without dense steps.
- *Foretold*: the share of (layer, step) pairs whose error, as a root mean square over the videos, is within a factor of
  1.3 of the one that the probe foretold; in parentheses for each video alone, where an error is one draw.
"""

MODEL = """\
## {title}

{what}; {steps} Euler steps, {captions} captions, {dtype} ([figures](../benchmarks/results/{file}): {gpu}, torch
{torch}, {date}).

{table}
"""

ATTENTIONS = """\
### Single attentions

Queries, keys and values of a dense run, {attentions} attentions of all layers at four steps
([figures](../benchmarks/results/{file}), {gpu}, by `python -m benchmarks.quality.attention_quality {model}`). Errors
are relative to the dense output; those of samples are expected ones.

**How many queries the ARM looks at, and how many keys.** It takes {usual}, and all keys of so few: one of two from
{twice:,} tokens on, one of four from {four:,} on. *Density* is what the rule keeps under a budget, *error* what
comes of it, as a root mean square over the attentions.

{rows}
**What better blocks would gain**, if all errors were known. *Profile blocks*: for each head the key blocks that lie
where the sampled queries' error lies, by relative place (frames, cells of 4 x 4). *Oracle*: for each query block those
that do hold most of the error. All are filled up with samples, on the same ladder.

{candidates}
**Patterns**, mean over heads and attentions: with samples, and windows alone as the recall rule has them.

{patterns}"""

ROUNDING = """\
**8-bit numbers.** What rounding alone does to these attentions ([figures](../benchmarks/results/{file}), {gpu}, by
`python -m benchmarks.quality.rounding {model}`; {attentions} attentions; numbers are rounded, then multiplied in
float32). *Error* is a root mean square over the attentions. `precision="int8"` rounds queries and keys to integers. The
ARM foretold {least:.2f} to {most:.2f} times that error, {median:.2f} times in the middle, and takes it from the budget.

{table}
"""

END = """\
## What was not measured

Big models: no weights were at hand, and these models' heads look more evenly everywhere than those of big models are
said to. VBench. With the weights, `python examples/compare_pipeline.py MODEL --prompts ...` samples dense and sparse
from the same seeds and tells PSNR, SSIM, densities and foretold errors.
"""


def videos(rows: list[Row]) -> str:
    def foretold(row: Row) -> str:
        if "predicted_within_1.3" not in row or row["rule"] != "ours":
            return "-"
        return f"{row['predicted_within_1.3']:.0%} ({row['predicted_within_1.3_each_video']:.0%})"

    columns: list[Column] = [
        *(("rule", cell("rule", "{}")), ("setting", cell("setting", "{}"))),
        *(("dense first steps", cell("dense_steps", "{}")), ("density", cell("density", "{:.3f}"))),
        ("PSNR (least)", lambda row: f"{row['psnr_db']:.1f} dB ({row['psnr_db_least']:.1f})"),
        *(("SSIM", cell("ssim", "{:.3f}")), ("flicker", cell("flicker_change", "{:+.1%}"))),
        *(("loss", cell("validation_loss_change", "{:+.1%}")), ("foretold", foretold)),
    ]
    return markdown(columns, rows)


def attentions(result: Row, file: str) -> str:
    """What single attentions told; of the patterns, those with the widest window at each sparsity."""
    asked: list[Column] = [("budget", cell("budget", "{:g}")), ("density", cell("density", "{:.3f}"))]
    rows = [
        ("queries", cell("sampled_queries", "{}")),
        ("one key of", cell("one_key_of", "{}")),
        *asked,
        ("error", cell("error", "{:.4f}")),
    ]
    rows.append(("foretold within 1.3", cell("foretold_within_1.3", "{:.0%}")))
    rows.append(("most over foretold", cell("error_over_foretold_most", "{:.2f}x")))
    candidates = [("candidates", cell("candidates", "{}")), *asked]
    patterns: list[Column] = [
        *(("keys", cell("kind", "{}")), ("pattern", cell("pattern", "{}")), ("sparsity", cell("sparsity", "{:g}"))),
        *(
            ("density", cell("density", "{:.3f}")),
            ("error", cell("error", "{:.3f}")),
            ("recall", cell("recall", "{:.3f}")),
        ),
    ]
    kinds = {"samples": "windows and samples", "alone": "windows alone"}
    named = [row | {"kind": kinds[row["kind"]]} for row in result["patterns"]]
    asked_of = {"usual": SAMPLES, "twice": 2 * LEAST_KEYS, "four": 4 * LEAST_KEYS}
    tables = {
        "rows": markdown(rows, [{"one_key_of": 1, **row} for row in result["rows"]]),
        "candidates": markdown(candidates, result["candidates"]),
    }
    return ATTENTIONS.format(**{**result, "file": file, **asked_of, **tables, "patterns": markdown(patterns, named)})


def rounding(result: Row, file: str) -> str:
    columns: list[Column] = [("rounded", cell("where", "{}")), ("to", cell("kind", "{}"))]
    columns += [
        ("error", cell("error", "{:.4f}")),
        ("median", cell("median", "{:.4f}")),
        ("most", cell("most", "{:.4f}")),
    ]
    (ratios,) = (row["foretold_over_true"] for row in result["rows"] if "foretold_over_true" in row)
    return ROUNDING.format(**{**result, **ratios, "file": file, "table": markdown(columns, result["rows"])})


def draw(path: Path, results: dict[str, Row]) -> None:
    """PSNR over density, a panel for each model, a line for each rule without dense steps."""
    figure, axes = plt.subplots(1, len(results), figsize=(6.4 * len(results), 4.4), squeeze=False)
    for axis, (model, result) in zip(axes[0], results.items(), strict=True):
        for rule, own in groups([row for row in result["rows"] if not row["dense_steps"]], "rule").items():
            if rule in PICTURED:
                points = sorted((row["density"], row["psnr_db"]) for row in own)
                style = {"linewidth": 2.4, "color": "black", "zorder": 3} if rule == "ours" else {"linewidth": 1.2}
                axis.plot(*zip(*points, strict=True), "o-", markersize=4, label=rule, **style)
        axis.set_xlabel("density of all self-attention")
        axis.set_ylabel("PSNR against the dense video, dB")
        title = f"{model.capitalize()} model, {result['tokens']:,} tokens, {result['steps']} steps"
        axis.set_title(f"{title}, mean of {result['captions']} captions", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def newest(folder: Path, name: str) -> Path | None:
    """The results of the GPU (or CPU) that were written last, by the date in them."""
    found = sorted(folder.glob(f"{name}_*.json"))
    return max(found, key=lambda path: str(json.loads(path.read_text())["date"]), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    results: dict[str, Row] = {}
    parts: list[str] = []
    for model, what in MODELS.items():
        if (path := newest(args.results, f"quality_{model}")) is None:
            continue
        result: dict[str, Any] = json.loads(path.read_text())
        results[model] = result
        what = what.format(parameters=result["parameters"] / 1e6, tokens=result["tokens"])
        facts = {"title": f"The {model.removesuffix('s')} model", "what": what, "file": path.name}
        parts.append(MODEL.format(**{**result, **facts, "table": videos(result["rows"])}))
        if (path := newest(args.results, f"quality_attention_{model}")) is not None:
            parts.append(attentions(json.loads(path.read_text()), path.name))
        if (path := newest(args.results, f"quality_rounding_{model}")) is not None:
            parts.append(rounding(json.loads(path.read_text()), path.name))
    draw(args.docs / PICTURE, results)
    text = "\n".join([HEAD.format(picture=PICTURE), *parts, END])
    (args.docs / "quality.md").write_text(text)


if __name__ == "__main__":
    main()
