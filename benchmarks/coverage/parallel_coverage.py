# SPDX-License-Identifier: Apache-2.0
"""Which video transformers of the installed diffusers stay sparse when two ranks share them: docs/scaling.md.

Every class that diffusers has a plan for (`_cp_plan`), shrunk and unmodified, on two processes with gloo: split by
`enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))`, and compiled whole or block by block. Inductor is
left out, as in `model_coverage`.

    python -m benchmarks.coverage.parallel_coverage               write the table in docs/scaling.md
    python -m benchmarks.coverage.parallel_coverage --only Wan    print the rows of some models

A row says what both ranks found; "differs" where it is not the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.coverage.measure_model import (
    Compiled,
    Verdict,
    Watch,
    by_blocks,
    call,
    compiled,
    first_line,
    judge,
    same,
    seed_weights,
    without_inductor,
)
from benchmarks.coverage.model_coverage import layout
from benchmarks.pages.marked import head_of, put_into, row_of
from benchmarks.zoo.classes import BUILDERS, ModelCase

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
HEADER = ("class", "grid found", "whole", "blocks alone")
RANKS = 2
GRIDS = ((5, 8, 12), (5, 9, 13), (4, 9, 13))
"""Of tokens: ranks split each inside a frame, and need an even number of them, with all that is in the sequence."""
TIMEOUT = 900
"""Seconds for one model, on a slow machine too."""
FIXED: dict[str, Any] = {"min_tokens": 1, "arm": "recall", "recall_target": 0.0, "min_recall": 0.0}
"""A rule by which a head's pattern does not depend on which other heads a rank has."""


@dataclass
class Part:
    """What two ranks made of a model that is compiled in one way.

    Attributes:
        full: with everything kept, against one process without this backend. sparse: with half of it left out, against
            one process that leaves out the same.
        differs: whether what is left out shows in the output.
    """

    full: Verdict
    sparse: Verdict
    differs: bool


@dataclass
class Row:
    """One model: how many attentions over the video it has, and what became of them; or why there is no result."""

    name: str
    variant: str
    video: int = 0
    whole: Part | None = None
    blocks: Part | None = None
    note: str = ""
    error: str = ""


def planned() -> list[tuple[str, str]]:
    """The builders of classes that diffusers can split."""
    import diffusers

    return [key for key in sorted(BUILDERS) if getattr(getattr(diffusers, key[0]), "_cp_plan", None)]


@dataclass
class Builder:
    """Makes the same case again: with as many tokens, of the video and of the text, as two ranks can share."""

    key: tuple[str, str]
    mask: bool = True

    def __call__(self) -> ModelCase:
        torch.manual_seed(0)
        for grid in GRIDS:
            case = BUILDERS[self.key](grid)
            if case.tokens % RANKS == 0:
                break
        seed_weights(case.model)
        if "encoder_attention_mask" in case.inputs:  # such split their text, too
            for name, value in case.inputs.items():
                if "encoder" in name and isinstance(value, Tensor):
                    case.inputs[name] = value[:, : value.shape[1] // RANKS * RANKS].contiguous()
            if not self.mask:
                case.inputs = {
                    name: None if name.endswith("attention_mask") else value for name, value in case.inputs.items()
                }
        return case


def split(case: ModelCase) -> ModelCase:
    """The case, its model split over the ranks by the plan that its class has, as far as that is about its layers."""
    from diffusers import ContextParallelConfig

    model: Any = case.model
    names = {name for name, _ in model.named_modules()}
    plan = {name: one for name, one in model._cp_plan.items() if "*" in name or name in names}
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS), cp_plan=plan)
    return case


def part(build: Builder, run: Callable[..., Compiled], dense: list[Tensor], total: int) -> Part:
    """What becomes of a model that `run` compiles."""
    everything, half = ({"backend": "rainfusion", "options": FIXED | {"sparsity": sparsity}} for sparsity in (0.0, 0.5))
    alone = run(build(), **half)
    case = split(build())
    full, sparse = run(case, **everything), run(case, **half)
    return Part(judge(case, full, dense, total), judge(case, sparse, alone.out, total), not same(alone.out, dense))


def failure(build: Builder) -> str:
    """What goes wrong in eager mode, without this backend."""
    try:
        call(split(build()).model, build())
    except Exception as problem:
        return first_line(str(problem))
    return ""


def measure(key: tuple[str, str]) -> Row:
    """The row of one model, by one of two ranks."""
    row, build = Row(*key), Builder(key)
    try:
        if (problem := failure(build)) and "encoder_attention_mask" in build().inputs:
            row.note = f"with a mask of the text diffusers itself fails ({problem}), so without"
            build.mask = False
        case = build()
        with Watch(case.tokens) as watch:
            dense = call(case.model, case)
        row.video = len(watch.masks)
        shared = call(split(build()).model, case)
        if not same(shared, dense):
            row.error = "eager, two ranks compute something else than one"
            return row
        with without_inductor():
            row.whole = part(build, compiled, dense, row.video)
            row.blocks = part(build, by_blocks, dense, row.video)
    except Exception as problem:
        traceback.print_exc()
        row.error = f"{type(problem).__name__}: {first_line(str(problem))}"
    return row


def work(rank: int, key: tuple[str, str], folder: str) -> None:
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers counts no CPUs
    meeting = f"file://{folder}/meeting"
    wait = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=wait)
    torch.save(measure(key), f"{folder}/{rank}")


def measured(key: tuple[str, str]) -> Row:
    """The row of one model, by ranks that each are a process."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [get_context("fork").Process(target=work, args=(rank, key, folder)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
            process.kill()
        files = [Path(folder, str(rank)) for rank in range(RANKS)]
        if not all(file.exists() for file in files):
            return Row(*key, error=f"no result in {TIMEOUT} s")
        first, *others = [torch.load(file, weights_only=False) for file in files]
    if any(other != first for other in others):
        first.note = "; ".join(filter(None, (first.note, "ranks differ in what they make sparse")))
    return first


def count(row: Row, part: Part | None) -> str:
    """How many are sparse, and whether the output is that of one process."""
    if part is None:
        return "-"
    sparse, wrong = part.sparse, part.full.wrong + part.sparse.wrong
    found = f"{sparse.rewritten} / {row.video}" + (f", **{wrong} wrongly**" if wrong else "")
    exact = part.full.same and sparse.same and part.differs
    return found + (", the same" if exact else ", **another output**" if sparse.rewritten else "")


def line(row: Row) -> str:
    title = f"`{row.name}`" + (f", {row.variant}" if row.variant else "")
    parts = [part for part in (row.whole, row.blocks) if part is not None]
    found = dict.fromkeys(layout(*one) for part in parts for one in part.sparse.found)
    grids = ", ".join(f"{grid}, text {text}" for grid, text in found) or "-"
    return row_of(title, grids, count(row, row.whole), count(row, row.blocks))


def notes(row: Row) -> list[str]:
    """What the table leaves out: why some are dense, and what diffusers itself does."""
    title = f"`{row.name}`" + (f", {row.variant}" if row.variant else "")
    found = [row.note] if row.note else []
    found += [f"diffusers itself fails on two ranks, without this backend: {row.error}"] if row.error else []
    for name, part in (("", row.whole), ("blocks alone: ", row.blocks)):
        found += [f"{name}{number} dense: {why}" for why, number in (part.sparse.reasons if part else {}).items()]
    return [f"- {title}: {'; '.join(found)}"] if found else []


def table(rows: list[Row]) -> str:
    lines = [*head_of(HEADER), *map(line, rows), ""]
    return "\n".join([*lines, *(note for row in rows for note in notes(row))]) + "\n"


def with_table(text: str, rows: list[Row]) -> str:
    """The page with this table in its place."""
    import diffusers

    facts = f"torch {torch.__version__.split('+')[0]}, diffusers {diffusers.__version__}, gloo, float32 on a CPU.\n\n"
    return put_into(text, "benchmarks/coverage/parallel_coverage.py", facts + table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help="models whose name contains this; printed only")
    options = parser.parse_args()
    rows = []
    for key in planned():
        if options.only.lower() in ", ".join(key).lower():
            rows.append(measured(key))
            print("\n".join([line(rows[-1]), *notes(rows[-1])]), file=sys.stderr, flush=True)
    if options.only:
        print(table(rows))
    else:
        PAGE.write_text(with_table(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
