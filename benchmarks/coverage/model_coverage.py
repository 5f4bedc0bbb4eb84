# SPDX-License-Identifier: Apache-2.0
"""Which video transformers of the installed diffusers are rewritten, and why the others are not: docs/models.md.

Each model runs shrunk and unmodified, in a process of its own: eager, compiled by Dynamo alone, and compiled by this
backend with ``sparsity=0``, which must not change what comes out. Inductor is left out unless asked for: what counts
here happens before it.

    python -m benchmarks.coverage.model_coverage               write docs/models.md
    python -m benchmarks.coverage.model_coverage --check       exit 1 and say what differs, if docs/models.md is stale
    python -m benchmarks.coverage.model_coverage --only Wan    print the rows of some models
    python -m benchmarks.coverage.model_coverage --inductor    the same through Inductor, which takes longer
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.coverage.measure_model import Row, Verdict, measure
from benchmarks.coverage.own_process import in_own_process
from benchmarks.pages.marked import head_of, row_of
from benchmarks.zoo.classes import BUILDERS, IMAGE_OR_OTHER, installed_classes, without_builder
from rainfusion_compile.sparsity.layout import Grids, as_grids

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
IMPORTED = ("torch._inductor.compile_fx", "rainfusion_compile.backend", "diffusers.models.transformers.transformer_wan")
"""What every model waits for, half of the seconds that some take; diffusers imports its own when they are asked for."""
TIMEOUT = 1800
"""Seconds that one model may take, on a slow machine too: what takes longer hangs."""
HEADER = (
    "class",
    "grid found",
    "text",
    "mask",
    "graphs",
    "fullgraph",
    "rewritten",
    "blocks alone",
    "sparsity 0 = dense",
)
INTRODUCTION = """\
# Video transformers of diffusers

<!-- from benchmarks/coverage/model_coverage.py -->
Every class in `diffusers.models.transformers` that attends over video, unmodified, shrunk to a layer or two with random
weights and a grid of {grid} tokens, float32 on a CPU; torch {torch}, diffusers {diffusers}. Made by `make coverage`.
Classes of official repositories have [a page of their own](official.md).

{whole} of {tried} classes are rewritten whole in every variant tried: each attention over the video found, with the
right grid and text, and with `sparsity=0` the output of the dense model (to {tolerance:g} of its largest value). Of the
{video} attentions over the video in one forward of each row, {rewritten} are rewritten; {wrong} were rewritten that
should not have been.

- **grid found**, **text**: in tokens, as the backend reports them; text before + after the grid. Several videos in
  one sequence have a grid each, and text before + between + after them.
- **mask**: of the attentions over the video, in the eager model.
- **graphs**, **fullgraph**: how many graphs Dynamo makes, and whether `fullgraph=True` works; under Dynamo alone /
  under this backend.
- **rewritten**: attentions over the video that became sparse / that one eager forward makes. Attention to text, sound
  or a face is none of them, and stays as it is. "With fullgraph": by default Dynamo leaves these frames to Python
  under any backend; `fullgraph=True` compiles them.
- **blocks alone**: the same with each block compiled by itself and the rest not at all: by
  `model.compile_repeated_blocks(backend="rainfusion")`; `block.compile(backend="rainfusion")` where a class has none.

"""


def measured(name: str, variant: str, *, inductor: bool) -> Row:
    """The row of one model, made in a process of its own: a crash there is a row too.

    Processes are forks of this one, which has imported everything already but computed nothing.
    """
    try:
        return in_own_process(partial(measure, name, variant, inductor=inductor), TIMEOUT)
    except RuntimeError as problem:
        return Row(name, variant, error=str(problem))


def all_rows(pattern: str, *, inductor: bool) -> list[Row]:
    """The rows of the models whose name contains ``pattern``, a model for each core at a time."""
    rows = []
    for module in IMPORTED:
        importlib.import_module(module)
    chosen = [key for key in sorted(BUILDERS) if pattern.lower() in ", ".join(key).lower()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # its threads do nothing but wait for processes
        for row in pool.map(lambda key: measured(*key, inductor=inductor), chosen):
            print(f"{row.title}: {row.error or f'{row.normal.rewritten} of {row.video}'}", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def table(rows: list[Row]) -> list[str]:
    """The rows in Markdown."""
    return [*head_of(HEADER), *map(line, rows)]


def line(row: Row) -> str:
    title = f"`{row.name}`" + (f", {row.variant}" if row.variant else "")
    if row.error:
        return f"| {title} " + "| - " * (len(HEADER) - 1) + "|"
    verdict = row.shown
    grids, texts = zip(*(layout(*found) for found in verdict.found or [((), ())]), strict=True)
    count = f"{verdict.rewritten} / {row.video}" + (", with fullgraph" if verdict is row.whole else "")
    cells = (
        title,
        ", ".join(dict.fromkeys(grids)),
        ", ".join(dict.fromkeys(texts)),
        row.mask or "-",
        f"{row.graphs} / {row.graphs_ours}",
        f"{yes(row.fullgraph)} / {yes(row.fullgraph_ours)}",
        f"**{count}**" if row.complete else count,
        "-" if row.blocks is None else f"{row.blocks.rewritten} / {row.video}",
        yes(verdict.same),
    )
    return row_of(*cells)


def layout(grid: Grids | tuple[()], text: tuple[int, ...]) -> tuple[str, str]:
    """A grid, or several, and text in Markdown."""
    grids = "; ".join("x".join(map(str, one)) for one in as_grids(grid)) if grid else "-"
    return grids, "+".join(map(str, text)) or "-"


def yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def explanations(rows: list[Row]) -> list[str]:
    """Notes, why attentions over the video stay dense, and why there are several graphs: a paragraph for each model."""
    lines = []
    for row in rows:
        alone = row.blocks is not None and row.blocks.complete(row.video)
        if row.complete and alone and not row.breaks and not row.note:
            continue
        lines += [f"- **{row.title}**" + (f": {row.note}" if row.note else "")]
        lines += [f"  - no result: {row.error}"] if row.error else []
        lines += [f"  - {problem}" for problem in problems(row, row.normal)]
        lines += [f"  - graph break: {reason}" for reason in row.breaks]
        if row.whole is not None:
            found = f"{row.whole.rewritten} of {row.video} rewritten"
            lines += [f"  - with `fullgraph=True`: {'; '.join([found, *problems(row, row.whole)])}"]
        if row.blocks is not None and not alone and row.complete:
            lines += [f"  - blocks alone: {'; '.join(problems(row, row.blocks))}"]
    return lines


def problems(row: Row, verdict: Verdict) -> list[str]:
    """What is not as it could be, in sentences."""
    expected = " with text ".join(layout(row.grid or (), row.text))
    found = " and ".join(" with text ".join(layout(*one)) for one in verdict.found)
    wrong = [f"**{verdict.wrong} made sparse wrongly**: expected {expected}, found {found}"] if verdict.wrong else []
    changed = ["**`sparsity=0` changes the output**"] if verdict.same is False else []
    return [*wrong, *changed, *(f"{count} dense: {reason}" for reason, count in verdict.reasons.items())]


def page(rows: list[Row]) -> str:
    """The whole of docs/models.md."""
    import diffusers
    import torch

    from benchmarks.coverage.measure_model import TOLERANCE
    from benchmarks.zoo.case import GRID

    complete = {name: all(row.complete for row in rows if row.name == name) for name in {row.name for row in rows}}
    totals: Counter[str] = Counter()
    for row in rows:
        wrong = row.normal.wrong + (row.blocks.wrong if row.blocks else 0)
        totals.update(video=row.video, rewritten=row.shown.rewritten, wrong=wrong)
    introduction = INTRODUCTION.format(
        grid="x".join(map(str, GRID)),
        torch=torch.__version__.split("+")[0],
        diffusers=diffusers.__version__,
        whole=sum(complete.values()),
        tried=len(complete),
        tolerance=TOLERANCE,
        video=totals["video"],
        rewritten=totals["rewritten"],
        wrong=totals["wrong"],
    )
    unknown = without_builder()
    others = [f"`{name}`" for name in installed_classes() if name in IMAGE_OR_OTHER]
    lines = [
        *table(rows),
        "",
        "## Notes; what is not rewritten, and why",
        "",
        *explanations(rows),
        "",
        "## Classes without a row",
        "",
        f"No builder yet: {', '.join(f'`{name}`' for name in unknown) or 'none'}.",
        "",
        f"Image or other, not tried ({len(others)}): {', '.join(others)}.",
    ]
    return introduction + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare docs/models.md, do not write it")
    parser.add_argument("--only", default="", metavar="NAME", help="models whose name contains this; printed only")
    parser.add_argument("--inductor", action="store_true", help="compile by Inductor, too")
    options = parser.parse_args()
    rows = all_rows(options.only, inductor=options.inductor)
    if options.only:
        print("\n".join([*table(rows), "", *explanations(rows)]))
        return 0
    new = page(rows)
    if not options.check:
        PAGE.write_text(new)
        return 0
    old = PAGE.read_text() if PAGE.exists() else ""
    names = "docs/models.md", "docs/models.md as it should be"
    difference = "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm=""))
    print(difference or "docs/models.md is up to date")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
