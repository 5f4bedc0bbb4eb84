# SPDX-License-Identifier: Apache-2.0
"""Which of official repositories' own classes are rewritten, and why the others are not: docs/official.md.

Each class is imported from a checkout of its repository, which has that repository's name and, if it is no clone, a
file `COMMIT` with a commit's hash and date. It runs shrunk, with random weights, in float32 on a CPU, in a process of
its own: eager, compiled by Dynamo alone, and compiled by this backend, whole and block by block, with everything kept
and with half of it. Inductor is left out, as in `model_coverage`. Where some are dense, once more with the grid told.

    python -m benchmarks.coverage.official_coverage FOLDER               write docs/official.md
    python -m benchmarks.coverage.official_coverage FOLDER --only Wan    print the rows of some repositories
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.coverage.measure_model import (
    OPTIONS,
    Compiled,
    Verdict,
    call,
    compile_blocks,
    errors,
    first_line,
    judge,
    recorder,
    same,
    seed_weights,
    without_inductor,
)
from benchmarks.coverage.model_coverage import layout
from benchmarks.coverage.own_process import in_own_process
from benchmarks.pages.marked import head_of, put_into, row_of
from benchmarks.zoo import official, official_wan  # noqa: F401, who enter the builders
from benchmarks.zoo.case import ModelCase
from benchmarks.zoo.checkouts import OFFICIAL, Official
from rainfusion_compile import observe, sparse_eager_attention, video_layout

PAGE = Path(__file__).parents[2] / "docs" / "official.md"
TIMEOUT = 1800
"""Seconds for one class, on a slow machine too."""
GRIDS = ((5, 7, 11), (5, 11, 7))
"""Of tokens: as many of them, in one order and in another."""
HALF = {**OPTIONS, "sparsity": 0.5, "error": 1.0}
OUTSIDE = "in no graph"  # as `judge` says it of attention that no graph has
Context = Callable[[Any, Any], AbstractContextManager[None]]
HEADER = (
    "repository",
    "class",
    "attention",
    "compiled",
    "sparse",
    "grid, text",
    f"sparse at {'x'.join(map(str, GRIDS[1]))}",
    "graphs",
    "error",
)


@dataclass
class Way:
    """One class, compiled in one way.

    Attributes:
        verdicts: on a forward over each of `GRIDS`. again: on another one over the first.
        error: the largest with everything kept, relative to the dense output's largest value.
        differs: whether what is left out shows in the output.
        graphs, graphs_ours: Dynamo's graphs under its own and under this backend, for the first forward.
        told: how many are sparse in a `video_layout`, if some are not without.
        outside: how many outside all graphs are in a `sparse_eager_attention`, if some run there.
        failure: why there is no result.
    """

    name: str
    verdicts: list[Verdict] = field(default_factory=list)
    error: float = 0.0
    differs: bool = False
    graphs: int = 0
    graphs_ours: int = 0
    told: int | None = None
    outside: int | None = None
    failure: str = ""


@dataclass
class Row:
    """One class of one repository: how many attentions over the video it has, and what became of them."""

    repository: str
    name: str
    attention: str
    note: str
    date: str
    video: int = 0
    ways: list[Way] = field(default_factory=list)
    failure: str = ""


def whole(model: Any, **backend: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    function: Callable[..., Any] = torch.compile(model, **backend)
    return function


def blocks(model: Any, **backend: Any) -> Callable[..., Any]:
    compile_blocks(model, **backend)
    function: Callable[..., Any] = model
    return function


def forwards(
    build: Callable[[Any], ModelCase], compile_it: Callable[..., Any], context: Context | None = None, **backend: Any
) -> list[tuple[ModelCase, Compiled]]:
    """One model over the first grid, the second, and the first again; in a context that tells the grid and text."""
    cases = [build(grid) for grid in GRIDS]
    function = compile_it(cases[0].model, **backend)
    counters = torch._dynamo.utils.counters
    done = []
    for case in (*cases, cases[0]):
        counters.clear()
        with observe() as report, context(case.grid, case.text) if context else nullcontext():
            out = call(function, case)
        done.append((case, Compiled(out, report, counters["stats"]["unique_graphs"])))
    return done


def measure_way(name: str, build: Callable[[Any], ModelCase], dense: list[list[Tensor]]) -> Way:
    way, compile_it = Way(name), {"whole": whole, "block by block": blocks}[name]
    try:
        way.graphs = forwards(build, compile_it, backend=recorder(set()))[0][1].graphs
    except Exception as problem:
        way.failure = f"Dynamo alone fails, with any backend: {type(problem).__name__}: {first_line(str(problem))}"
        return way
    with without_inductor():
        full = forwards(build, compile_it, backend="rainfusion", options=OPTIONS)
        half = forwards(build, compile_it, backend="rainfusion", options=HALF)
    way.graphs_ours = full[0][1].graphs
    way.error = max(max(errors(run.out, one)) for (_, run), one in zip(full, dense, strict=True))
    way.differs = all(max(errors(run.out, one)) > 1e-5 for (_, run), one in zip(half, dense, strict=True))
    way.verdicts = [
        judge(case, run, one, case.video or 0)
        for runs in (full, half)
        for (case, run), one in zip(runs, dense, strict=True)
    ]
    if any(verdict.reasons for verdict in way.verdicts):
        with without_inductor():
            runs = forwards(build, compile_it, context=video_layout, backend="rainfusion", options=OPTIONS)
        judged = [judge(case, run, one, case.video or 0) for (case, run), one in zip(runs, dense, strict=True)]
        way.told = min(verdict.rewritten for verdict in judged) if all(verdict.same for verdict in judged) else 0
    if any(why.startswith(OUTSIDE) for verdict in way.verdicts for why in verdict.reasons):
        way.outside = sparse_outside(build, compile_it, dense)
    return way


def sparse_outside(build: Callable[[Any], ModelCase], compile_it: Callable[..., Any], dense: list[list[Tensor]]) -> int:
    """How many attentions outside all graphs are sparse in a `sparse_eager_attention`; 0 if the output is another."""
    with without_inductor():
        context = partial(sparse_eager_attention, **OPTIONS)
        runs = forwards(build, compile_it, context=context, backend="rainfusion", options=OPTIONS)
    if not all(same(run.out, one) for (_, run), one in zip(runs, dense, strict=True)):
        return 0
    entries = [[one for one in run.report.to_dict()["attentions"] if one["eager"]] for _, run in runs]
    return min(sum(one["calls"] for one in each if one["status"] == "sparse") for each in entries)


def measure(entry: Official, folder: Path) -> Row:
    """The row of one class."""
    row = empty_row(entry, folder)
    try:

        def build(grid: Any) -> ModelCase:
            torch.manual_seed(0)
            case = entry.build(folder / entry.folder, grid)
            seed_weights(case.model)
            return case

        eager = [build(grid) for grid in GRIDS]
        row.video = eager[0].video or 0
        dense = [call(eager[0].model, case) for case in (*eager, eager[0])]
        if not all(bool(tensor.isfinite().all()) for tensor in dense[0]):
            return replace(row, failure="this builder is no test: its output is not finite")
        row.ways = [measure_way(name, build, dense) for name in ("whole", "block by block")]
    except Exception as problem:
        traceback.print_exc()
        row.failure = f"{type(problem).__name__}: {first_line(str(problem))}"
    return row


def empty_row(entry: Official, folder: Path) -> Row:
    return Row(entry.repository, entry.name, entry.attention, entry.note, commit_date(folder / entry.folder))


def commit_date(root: Path) -> str:
    """When what is checked out was committed."""
    if (file := root / "COMMIT").exists():
        return file.read_text().split()[-1]
    command = ["git", "-C", str(root), "log", "-1", "--format=%cs"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def measured(entry: Official, folder: Path) -> Row:
    try:
        return in_own_process(partial(measure, entry, folder), TIMEOUT)
    except RuntimeError as problem:
        return replace(empty_row(entry, folder), failure=str(problem))


# --- the page --------------------------------------------------------------------------------------------------------


def lines(row: Row) -> list[str]:
    """A line for each way to compile it."""
    title = [f"{row.repository} ({row.date})", f"`{row.name}`", row.attention]
    if row.failure:
        return [row_of(*title, *"-" * (len(HEADER) - len(title)))]
    return [row_of(*(title if not number else ("", "", "")), *result(row, way)) for number, way in enumerate(row.ways)]


def result(row: Row, way: Way) -> list[str]:
    if way.failure:
        return [way.name, *"-" * 5]
    found = "; ".join(", ".join(layout(*one)) for one in way.verdicts[0].found) or "-"
    error = f"{way.error:.0e}" if way.error else "0"
    return [way.name, count(row, way, 0), found, count(row, way, 1), f"{way.graphs_ours} / {way.graphs}", error]


def count(row: Row, way: Way, number: int) -> str:
    """How many are sparse on a forward over one of `GRIDS`, whatever was compiled before."""
    alike = [verdict for place, verdict in enumerate(way.verdicts) if place % 3 in ((0, 2), (1,))[number]]
    sparse = {verdict.rewritten for verdict in alike}
    text = f"{' or '.join(map(str, sorted(sparse)))} / {row.video}"
    wrong = sum(verdict.wrong for verdict in alike)
    return f"{text}, **{wrong} wrongly**" if wrong else f"**{text}**" if sparse == {row.video} else text


def notes(row: Row) -> list[str]:
    """What the table leaves out: what is otherwise than in the repository, and why attention is dense."""
    found = [row.note] if row.note else []
    found += [f"no result: {row.failure}"] if row.failure else []
    for way in row.ways:
        found += [f"{way.name}: {way.failure}"] if way.failure else []
        reasons = dict.fromkeys((why, number) for verdict in way.verdicts for why, number in verdict.reasons.items())
        outside = "outside all graphs, which no backend of a compiler sees"
        reasons = {(outside if why.startswith(OUTSIDE) else why, number): None for why, number in reasons}
        found += [f"{way.name}: {number} dense: {why}" for why, number in reasons]
        if way.told is not None:
            found += [f"{way.name}: {way.told} / {row.video} sparse in a `video_layout` that tells the grid"]
        if way.outside is not None:
            found += [f"{way.name}: {way.outside} / {row.video} sparse in a `sparse_eager_attention`"]
        sparse = any(verdict.rewritten for verdict in way.verdicts)
        found += [f"{way.name}: **nothing left out shows in the output**"] if sparse and not way.differs else []
    title = f"{row.repository}, {row.attention}"
    return [f"- **{title}**", *(f"  - {line}" for line in found)] if found else []


def table(rows: list[Row]) -> str:
    found = [*head_of(HEADER), *(line for row in rows for line in lines(row)), ""]
    return "\n".join([*found, *(note for row in rows for note in notes(row))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkouts are")
    parser.add_argument(
        "--only", default="", metavar="NAME", help="repositories whose name contains this; printed only"
    )
    parser.add_argument("--processes", type=int, default=1, help="how many at a time")
    options = parser.parse_args()
    chosen = [entry for entry in OFFICIAL if options.only.lower() in f"{entry.repository}, {entry.attention}".lower()]
    with ThreadPoolExecutor(options.processes) as pool:  # its threads do nothing but wait for processes
        rows = []
        for row in pool.map(partial(measured, folder=options.folder.resolve()), chosen):
            print("\n".join([*lines(row), *notes(row)]), file=sys.stderr, flush=True)
            rows.append(row)
    if options.only:
        print(table(rows))
    else:
        facts = f"torch {torch.__version__.split('+')[0]}.\n\n"
        PAGE.write_text(put_into(PAGE.read_text(), "benchmarks/coverage/official_coverage.py", facts + table(rows)))


if __name__ == "__main__":
    main()
