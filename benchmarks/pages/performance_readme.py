# SPDX-License-Identifier: Apache-2.0
"""The README's part with measured figures, which `performance_page.py` writes between two markers."""

from __future__ import annotations

from benchmarks.pages.performance_tables import (
    ARM_SHARE,
    ASKED,
    DENSITY,
    HEADS,
    SHAPE,
    SPARSITY,
    SPEEDUP,
    TOKENS,
    UNMASKED,
    Column,
    Row,
    best_dense,
    cell,
    dense_kernel,
    ms,
    table,
)

MASKED = """\
{model} gives every attention a mask, which keeps dense attention from its best time: {masked} a call with it,
{unmasked} without (each the fastest of three runs).
"""

WHOLE = """\
**Whole forwards**, same GPU, random weights: with a sparsity every head takes a pattern, with a preset heads are chosen
by error, of what random weights attend to. Neither says what density yours come to."""

SUMMARISED = (0.64, 0.8)  # sparsities in the README

PICTURE = "![Speed-up against sparsity, and time against tokens](docs/images/performance.png)\n"
CPU = """\
**CPU**, one attention call, {dtype}, {heads} heads, {threads} threads of an {cpu} with {cpu_capability}, torch {torch},
{date} (`make bench`, [raw figures](benchmarks/results/cpu_attention.json)):
"""
COMPILING = """\
**Compiling** a Wan transformer of {model[layers]} layers for CPU took {median_seconds[rainfusion][wall]:.0f} s, by
Inductor alone {median_seconds[inductor][wall]:.0f} s ({date}, `benchmarks/models/compile_time.py`,
[raw figures](benchmarks/results/compile_time_cpu.json)).
"""

WHOLE_SUMMARY: list[Column] = [
    ("model", cell("model", "{}")),
    TOKENS,
    ASKED,
    DENSITY,
    ("dense", dense_kernel),
    ("sparse", ms("sparse_ms")),
    SPEEDUP,
    ("of Amdahl's limit", cell("of_amdahl", "{:.0%}")),
    UNMASKED,
]


def summary(results: dict[str, Row]) -> str:
    """The README's tables: one attention call at two sparsities, whole models, and what was measured on CPU."""
    parts = []
    if "gpu_attention" in results:
        result = results["gpu_attention"]
        rows = [row for row in result["rows"] if row["sparsity"] in SUMMARISED]
        columns: list[Column] = [SHAPE, TOKENS, HEADS, SPARSITY, DENSITY, ("best dense", best_dense)]
        columns += [("sparse", ms("sparse_ms")), SPEEDUP, ARM_SHARE]
        facts = f"{result['gpu']}, torch {result['torch']}, Triton {result['triton']}, {result['dtype']}"
        parts.append(f"**One attention call**, {facts}:\n\n{table(columns, rows)}")
    if "whole_model" in results:
        rows = results["whole_model"]["rows"]
        parts.append(f"{WHOLE}\n\n{table(WHOLE_SUMMARY, rows)}")
        masked = {row["model"]: row for row in rows if row.get("attention_without_mask_ms")}  # the last of each model
        parts += map(without_mask, masked.values())
    parts.append(PICTURE)
    if "cpu_attention" in results:
        parts.append(cpu_summary(results["cpu_attention"]))
    if "compile_time_cpu" in results:
        parts.append(COMPILING.format(**results["compile_time_cpu"]))
    return "\n".join(parts)


def cpu_summary(result: Row) -> str:
    columns: list[Column] = [TOKENS, ("head_dim", cell("head_dim", "{}")), SPARSITY, DENSITY]
    columns += [("dense", ms("dense_ms")), ("sparse", ms("sparse_ms")), SPEEDUP, ARM_SHARE]
    return CPU.format(heads=result["rows"][0]["heads"], **result) + "\n" + table(columns, result["rows"])


def without_mask(row: Row) -> str:
    """What a model's mask costs the dense side."""
    masked, unmasked = (f"{min(row[key].values()):.0f} ms" for key in ("attention_ms", "attention_without_mask_ms"))
    return MASKED.format(model=row["model"], masked=masked, unmasked=unmasked)
