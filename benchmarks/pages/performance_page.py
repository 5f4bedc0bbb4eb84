# SPDX-License-Identifier: Apache-2.0
"""Writes ``docs/performance.md``, its picture and the README's summary from the figures in ``benchmarks/results``.

    python -m benchmarks.pages.performance_page

The README and ``performance.md`` show one GPU, ``performance_<gpu>.md`` each other one that there are figures of. Every
figure comes from a JSON file; what has no file is listed as not measured. Runs without GPU.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.pages.marked import put_into
from benchmarks.pages.performance_plot import draw, groups
from benchmarks.pages.performance_readme import summary
from benchmarks.pages.performance_tables import (
    ARM_SHARE,
    ASKED,
    DENSITY,
    EFFICIENCY,
    HEADS,
    SHAPE,
    SPARSITY,
    SPEEDUP,
    TOKENS,
    UNMASKED,
    Column,
    Row,
    baselines,
    best_dense,
    cell,
    dense_kernel,
    ms,
    span,
    table,
)
from benchmarks.pages.performance_texts import (
    ARM,
    ARM_DEFAULT,
    ATTENTION,
    DENSE,
    ERRORS,
    FLEX,
    FLOAT32,
    HEAD,
    INT8,
    MASKS,
    PATTERNS,
    RANDOM,
    SCALING,
    UNMEASURED,
    WHOLE,
)
from rainfusion_compile import Options
from rainfusion_compile.sparsity.block_tables import LEAST_KEYS

ROOT, SCRIPT = Path(__file__).parents[2], "benchmarks/pages/performance_page.py"
BENCHMARKS = {
    "gpu_attention": "One attention call at the shapes of real models",
    "gpu_attention_float32": "One attention call in float32",
    "gpu_patterns": "Heads of each kind",
    "gpu_masks": "Key masks",
    "gpu_int8": "Queries and keys as integers",
    "gpu_scaling": "Attention from 4k to 256k tokens",
    "gpu_random_blocks": "Random blocks, beside a published kernel",
    "whole_model": "Whole models",
}

SCRIPTS = {name: f"attention/{name.removesuffix('_float32')}.py" for name in BENCHMARKS}
SCRIPTS["whole_model"] = "models/whole_model.py"
ARGUMENTS = {"gpu_attention_float32": " --dtype float32 --sparsity 0.64 0.8"}


def attention_section(result: Row) -> str:
    rows = result["rows"]
    parts = [_spans(result), ATTENTION, table(_call_columns(), rows), *_dense_part(result)]
    flexed = [row for row in rows if row.get("flex_ms") is not None]
    if flexed:
        noise = max(abs(row["sparse_ms"] / (row["kernel_ms"] + row["arm_ms"]) - 1) for row in rows)
        note = f" {result['note']}." if result.get("note") else ""
        parts += [FLEX.format(noise=noise, note=note), table(_flex_columns(), flexed)]
    parts += [ARM, table(_arm_columns(), rows)]
    if usual := [shape for shape in result["shapes"] if "arm_default_ms" in shape]:
        least = {"first": 2 * LEAST_KEYS, "second": 4 * LEAST_KEYS}
        parts += [ARM_DEFAULT.format(**least), table(_default_arm_columns(), usual)]
    parts += _errors_part(result)
    return "\n".join(parts)


def float32_section(result: Row) -> str:
    parts = [_spans(result), FLOAT32, table(_call_columns(), result["rows"])]
    return "\n".join([*parts, *_dense_part(result), *_errors_part(result)])


def _spans(result: Row) -> str:
    spans = [
        f"{span([row['speedup'] for row in some])} at sparsity {sparsity:g}"
        for sparsity, some in groups(result["rows"], "sparsity").items()
    ]
    return f"**{'; '.join(spans)}**, {result['dtype']}.\n"


def _dense_part(result: Row) -> list[str]:
    """Dense kernels, and ours with all heads dense."""
    shapes = result["shapes"]
    flat = [shape | {f"dense {name}": time for name, time in shape["dense_ms"].items()} for shape in shapes]
    kernels = list(dict.fromkeys(name for shape in shapes for name in shape["dense_ms"]))
    columns: list[Column] = [SHAPE, *((name, ms(f"dense {name}")) for name in kernels)]
    columns += [("ours, all heads dense", ms("all_dense_ms")), ("ours / best", cell("all_dense_ratio", "{:.2f}"))]
    columns += [("FA3 in float8", ms("dense_float8_ms")), ("portable kernel, on this GPU", ms("portable_dense_ms"))]
    return [DENSE, table(columns, flat)]


def _errors_part(result: Row) -> list[str]:
    shapes = result["shapes"]
    errors = [shape["errors"] for shape in shapes]
    worst = max(max(error["all_dense_ratio"], error["sparse_ratio"]) for error in errors)
    facts = {"rows": errors[0]["rows"], "heads": errors[0]["heads"], "limit": result["max_error_ratio"], "worst": worst}
    facts |= {"sparsity": result["rows"][0]["sparsity"], "reference": errors[0].get("reference", "float32 (no TF32)")}
    flat = [shape | shape["errors"] for shape in shapes]
    return [ERRORS.format(**facts), table(_error_columns(), flat)]


def _call_columns() -> list[Column]:
    return [
        *(SHAPE, TOKENS, HEADS, SPARSITY, DENSITY, ("dense heads", lambda row: f"{row['chosen'].get('dense', 0)}")),
        *(("best dense", best_dense), ("sparse", ms("sparse_ms"))),
        *(SPEEDUP, EFFICIENCY, ARM_SHARE),
    ]


def _flex_columns() -> list[Column]:
    return [
        *(SHAPE, SPARSITY, ("FlexAttention", ms("flex_ms")), ("ours, attention alone", ms("kernel_ms"))),
        ("over FlexAttention", lambda row: f"{row['flex_ms'] / row['kernel_ms']:.2f}x"),
        ("ours, ARM included", ms("sparse_ms")),
        ("over FlexAttention", lambda row: f"{row['flex_ms'] / row['sparse_ms']:.2f}x"),
        ("difference", cell("flex_max_difference", "{:.1e}")),
    ]


def _arm_columns() -> list[Column]:
    return [
        *(SHAPE, SPARSITY, ("ARM", ms("arm_ms")), ARM_SHARE, ("ARM, eager call", ms("arm_eager_ms"))),
        ("whole call", ms("sparse_ms")),
        ("whole call, CUDA graph", ms("sparse_graph_ms")),
    ]


def _default_arm_columns() -> list[Column]:
    return [
        *(SHAPE, TOKENS, ("candidates", cell("arm_default_candidates", "{}"))),
        *(("one key of", lambda row: str(row.get("arm_default_one_key_of", 1))), ("ARM", ms("arm_default_ms"))),
        ("ARM / dense", lambda row: f"{row['arm_default_ms'] / min(row['dense_ms'].values()):.2%}"),
    ]


def _error_columns() -> list[Column]:
    return [
        *(SHAPE, ("baseline", cell("baseline", "{}")), ("its error", cell("baseline_error", "{:.2e}"))),
        *(("ours, all heads dense", cell("all_dense_error", "{:.2e}")), ("ratio", cell("all_dense_ratio", "{:.2f}"))),
        *(("ours, sparse", cell("sparse_error", "{:.2e}")), ("ratio", cell("sparse_ratio", "{:.2f}"))),
    ]


def patterns_section(result: Row) -> str:
    columns: list[Column] = [
        *(SHAPE, TOKENS, HEADS, ("pattern", cell("pattern", "{}")), SPARSITY, DENSITY),
        ("best dense", lambda row: f"{ms('dense_ms')(row)} ({row['baseline']})"),
        *(("ours", ms("kernel_ms")), SPEEDUP, EFFICIENCY),
    ]
    return PATTERNS + "\n" + table(columns, result["rows"])


def masks_section(result: Row) -> str:
    columns: list[Column] = [
        *(SHAPE, TOKENS, SPARSITY, DENSITY, ("hidden", cell("hidden", "{} keys"))),
        ("dense", best_dense),
        ("dense, no mask", lambda row: best_dense({"dense_ms": row["dense_without_mask_ms"]})),
        *(("sparse", ms("sparse_ms")), ("sparse, no mask", ms("sparse_without_mask_ms")), SPEEDUP),
        ("over dense without mask", cell("speedup_over_dense_without_mask", "{:.2f}x")),
        *(("ARM", ms("arm_ms")), ("ARM, no mask", ms("arm_without_mask_ms")), ARM_SHARE),
        ("ARM / dense without mask", cell("arm_share_of_dense_without_mask", "{:.2%}")),
    ]
    return MASKS.format(**result) + "\n" + table(columns, result["rows"])


def int8_section(result: Row) -> str:
    columns: list[Column] = [
        *(SHAPE, TOKENS, HEADS, SPARSITY, DENSITY),
        *(("bfloat16", ms("call_full_ms")), ("kernel", ms("kernel_full_ms")), ("ARM", ms("arm_full_ms"))),
        *(("int8", ms("call_int8_ms")), ("kernel", ms("kernel_int8_ms")), ("ARM", ms("arm_int8_ms"))),
        *(SPEEDUP, ("difference", cell("difference", "{:.4f}"))),
    ]
    dense = "; ".join(
        f"{row['shape']} {row['best_dense']} {row['best_dense_ms']:.1f} ms"
        + (f", in float8 {row['flash_attention_3_float8_ms']:.1f} ms" if row["flash_attention_3_float8_ms"] else "")
        for row in result["rows"]
        if row.get("best_dense")
    )
    return INT8.format(dense=dense) + "\n" + table(columns, result["rows"])


def scaling_section(result: Row) -> str:
    columns: list[Column] = [
        *(("grid", lambda row: "x".join(map(str, row["grid"]))), TOKENS, SPARSITY, DENSITY),
        ("dense", lambda row: f"{ms('dense_ms')(row)} ({row['baseline']})"),
        *(("sparse", ms("sparse_ms")), ("sparse, CUDA graph", ms("sparse_graph_ms"))),
        *(("CPU's time", ms("sparse_cpu_ms")), ("ARM", ms("arm_ms"))),
        *(SPEEDUP, EFFICIENCY, ARM_SHARE),
    ]
    return SCALING.format(min_tokens=Options().min_tokens, **result) + "\n" + table(columns, result["rows"])


def random_section(result: Row) -> str:
    columns: list[Column] = [
        ("dtype", cell("dtype", "{}")),
        *(("published", ms("published_ms")), ("TFLOP/s", cell("published_tflops", "{:.1f}"))),
        *(("ours", ms("ms")), ("TFLOP/s", cell("tflops", "{:.1f}"))),
        ("published / ours", cell("speedup_over_published", "{:.2f}x")),
        ("our error, relative L2", cell("relative_error", "{:.1e}")),
    ]
    return RANDOM.format(**{**result, **result["published"]}) + "\n" + table(columns, result["rows"])


def whole_section(result: Row) -> str:
    for row in result["rows"]:
        keys = ("attentions", "attentions_rewritten", "layers", "attentions_expected")
        counts = [str(row[key]) for key in keys if row.get(key) is not None]
        row["of_layers"] = "/".join(counts) or None
    columns: list[Column] = [
        *(("model", cell("model", "{}")), TOKENS, ASKED, DENSITY, ("attentions / layers", cell("of_layers", "{}"))),
        *(("dense", dense_kernel), ("sparse", ms("sparse_ms")), SPEEDUP),
        ("attention's share", cell("attention_share", "{:.1%}")),
        ("attention's speed-up", cell("attention_speedup", "{:.2f}x")),
        ("Amdahl's limit", cell("amdahl_limit", "{:.2f}x")),
        ("reached", cell("of_amdahl", "{:.1%}")),
        ("ARM / dense attention", cell("arm_share", "{:.2%}")),
        *(UNMASKED, ("date", cell("date", "{}"))),
    ]
    notes = [result["note"], *(f"{row['model']}: {row['note']}" for row in result["rows"] if row.get("note"))]
    return WHOLE + "\nNote: " + "; ".join(notes) + ".\n\n" + table(columns, result["rows"])


SECTIONS: dict[str, Callable[[Row], str]] = {
    "gpu_attention": attention_section,
    "gpu_attention_float32": float32_section,
    "gpu_patterns": patterns_section,
    "gpu_masks": masks_section,
    "gpu_int8": int8_section,
    "gpu_scaling": scaling_section,
    "gpu_random_blocks": random_section,
    "whole_model": whole_section,
}


def machines(results: dict[str, Row], gpu: str) -> str:
    """Where and when each file was measured."""
    rows = [{"file": f"{name}_{gpu}.json", "script": SCRIPTS[name], **result} for name, result in results.items()]
    for row in rows:
        dates = sorted({part.get("date", row["date"]) for part in row["rows"]})
        row["date"] = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    columns: list[Column] = [
        ("figures", lambda row: f"[{row['file']}](../benchmarks/results/{row['file']})"),
        ("script", lambda row: f"[{Path(row['script']).name}](../benchmarks/{row['script']})"),
        *((key, cell(key, "{}")) for key in ("date", "gpu", "torch", "triton", "cudnn", "diffusers")),
    ]
    return table(columns, rows)


def page(found: dict[str, dict[str, Row]], gpu: str, pages: dict[str, str], picture: str) -> str:
    """The page of one GPU; `pages` are the names of all."""
    results = found[gpu]
    parts = [HEAD.format(gpu=gpu.upper(), flash_attention_3=baselines(results, BENCHMARKS))]
    links = " and ".join(f"[{other.upper()}]({name})" for other, name in pages.items() if other != gpu)
    if links:
        parts.append(f"This page: {gpu.upper()}. Also measured: {links}.\n")
    parts.append(machines(results, gpu))
    if {"gpu_attention", "gpu_scaling"} & results.keys():
        parts.append(f"![Speed-up against sparsity, and time against tokens]({picture})\n")
    parts += [f"## {title}\n\n{SECTIONS[name](results[name])}" for name, title in BENCHMARKS.items() if name in results]
    lines = "\n".join(f"- {line}" for line in (*missing(found, gpu), *UNMEASURED))
    parts.append(f"## Not measured\n\n{lines}\n")
    return "\n".join(parts)


def missing(found: dict[str, dict[str, Row]], gpu: str) -> list[str]:
    """What another GPU's page or another table has, or a benchmark of ours would measure, but this page lacks."""
    lines = []
    for name, title in BENCHMARKS.items():
        if name not in found[gpu]:
            lines.append(f"{title}, on this GPU: run `{command(name)}`.")
            continue
        known = [entry for results in found.values() for entry in entries(name, results)]
        if name.startswith(("gpu_attention", "gpu_masks")):
            known += [row["shape"] for row in found[gpu].get("gpu_attention", {"rows": []})["rows"]]
        lacking = [entry for entry in dict.fromkeys(known) if entry not in entries(name, found[gpu])]
        if lacking:
            lines.append(f"{title}, on this GPU: {'; '.join(lacking)}.")
    return lines


def command(name: str) -> str:
    """What to run in the repository's root."""
    module = SCRIPTS[name].removesuffix(".py").replace("/", ".")
    return f"python -m benchmarks.{module}{ARGUMENTS.get(name, '')}"


def entries(name: str, results: dict[str, Row]) -> list[str]:
    """Shapes or models that a benchmark has figures of, and the sparsities of FlexAttention's."""
    rows = results.get(name, {"rows": []})["rows"]
    labels = [row.get("model") or row.get("shape") or f"{row.get('tokens', row.get('dtype'))}" for row in rows]
    labels += [f"FlexAttention at sparsity {row['sparsity']:g}" for row in rows if row.get("flex_ms") is not None]
    return list(dict.fromkeys(labels))


def gpus(folder: Path, first: str) -> list[str]:
    """The GPUs that there are figures of, `first` before all others."""
    matches = (re.fullmatch(r"([a-z0-9_]+)_([a-z0-9]+)\.json", file.name) for file in folder.glob("*.json"))
    names = {match[2] for match in matches if match and match[1] in BENCHMARKS}
    return sorted(names, key=lambda gpu: (gpu != first, gpu))


def measured(folder: Path, files: dict[str, str]) -> dict[str, Row]:
    """What the files of these benchmarks hold, for those that were run."""
    return {name: json.loads((folder / file).read_text()) for name, file in files.items() if (folder / file).exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="h200", help="whose figures the README and performance.md show")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    found = {
        gpu: measured(args.results, {name: f"{name}_{gpu}.json" for name in BENCHMARKS})
        for gpu in gpus(args.results, args.gpu)
    }
    if args.gpu not in found:
        parser.error(f"no results for {args.gpu!r} in {args.results}, only for {', '.join(found) or 'none'}")
    pages = {gpu: "performance.md" if gpu == args.gpu else f"performance_{gpu}.md" for gpu in found}
    args.docs.mkdir(parents=True, exist_ok=True)
    for gpu, name in pages.items():
        picture = Path("images") / name.replace(".md", ".png")
        draw(args.docs / picture, found[gpu].get("gpu_attention"), found[gpu].get("gpu_scaling"))
        (args.docs / name).write_text(page(found, gpu, pages, picture.as_posix()))
    readme = args.docs.parent / "README.md"
    cpu = measured(args.results, {name: f"{name}.json" for name in ("cpu_attention", "compile_time_cpu")})
    readme.write_text(put_into(readme.read_text(), SCRIPT, summary(found[args.gpu] | cpu)))


if __name__ == "__main__":
    main()
