# SPDX-License-Identifier: Apache-2.0
"""Random models: no attention is sparse over a grid that is not the video's.

The same ones in each run, so that a change is judged by what it changes; RAINFUSION_ORDERS_SEED=2 draws others.
Thousands of models: ``PYTHONPATH=.:tests/helpers python tests/test_random_orders.py --models 5000 --seed 5000``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
import torch
from models import capture
from orders import models as drawn
from orders.disturbance import Verdict, judge

CHUNKS, CHUNK = 10, 20
SEED = int(os.environ.get("RAINFUSION_ORDERS_SEED", "1"))


@dataclass
class Outcome:
    """What came of one drawn model."""

    seed: int
    verdicts: list[Verdict] = field(default_factory=list)
    plain: bool = True
    error: str | None = None

    @property
    def failure(self) -> str | None:
        wrong = [f"claims {one.claim.layout}: {one.wrong}" for one in self.verdicts if one.wrong is not None]
        return self.error or "; ".join(wrong) or None


def run(seed: int, skip: frozenset[int] = frozenset()) -> Outcome:
    """Draw, capture and judge a model."""
    model = drawn.draw(seed, skip)
    outcome = Outcome(seed, plain=model.plain)
    built = model.build()
    with torch.no_grad():
        built(*(item.clone() for item in model.inputs))  # what raises here is no fault of the package
    (graph,) = capture(built, *(item.clone() for item in model.inputs))
    try:
        outcome.verdicts = judge(built, model.inputs, model.sources, graph)
    except Exception:
        outcome.error = traceback.format_exc(limit=-3)
    return outcome


def shrink(seed: int) -> tuple[Outcome, frozenset[int]]:
    """The failure of a seed with as few steps as fail."""
    outcome, skip = run(seed), frozenset[int]()
    for number in range(1, drawn.draw(seed).steps + 1):
        try:
            fewer = run(seed, skip | {number})
        except Exception:
            continue
        if fewer.failure is not None:
            outcome, skip = fewer, skip | {number}
    return outcome, skip


def describe(seed: int) -> str:
    outcome, skip = shrink(seed)
    source = drawn.draw(seed, skip).source
    return f"seed {seed}: {outcome.failure}\n{source}"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_grid_is_wrong(chunk: int) -> None:
    first = SEED * 1_000_000 + chunk * CHUNK
    failures = [seed for seed in range(first, first + CHUNK) if run(seed).failure is not None]
    told = "\n".join(describe(seed) for seed in failures[:3])
    assert not failures, f"RAINFUSION_ORDERS_SEED={SEED}: {len(failures)} of {CHUNK} models, {failures}\n{told}"


# --- thousands of models ---------------------------------------------------------------------------------------------


def _run_many(seeds: Iterable[int]) -> list[tuple[int, bool, list[tuple[bool, bool, str]], str | None]]:
    torch.set_num_threads(1)
    done = []
    for seed in seeds:
        try:
            one = run(seed)
        except Exception:
            one = Outcome(seed, error="not captured: " + traceback.format_exc(limit=-1))
        found = [
            (item.truth is not None, item.claim.layout is not None, item.claim.reason or "") for item in one.verdicts
        ]
        done.append((seed, one.plain, found, one.failure))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge random models and print what came of them.")
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first model; the others follow")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--reasons", action="store_true", help="why videos in order stayed dense")
    given = parser.parse_args()
    begun, count, reasons = time.time(), Counter[str](), Counter[str]()
    chunks = [
        range(a, min(a + 25, given.seed + given.models)) for a in range(given.seed, given.seed + given.models, 25)
    ]
    failures: list[int] = []
    with concurrent.futures.ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        for done in pool.map(_run_many, chunks):
            for seed, plain, found, failure in done:
                count["models"] += 1
                for raster, sparse, reason in found:
                    count["attentions"] += 1
                    count["sparse" if sparse else "dense"] += 1
                    count["in order"] += raster
                    count["in order, sparse"] += raster and sparse
                    count["in order, plainly spelled"] += raster and plain
                    count["in order, plainly spelled, sparse"] += raster and plain and sparse
                    if raster and plain and not sparse:
                        reasons[reason] += 1
                        if given.reasons:
                            print(f"dense  {seed}: {reason}", flush=True)
                if failure is not None:
                    failures.append(seed)
                    wrong = failure.startswith("claims")
                    count["wrong grids" if wrong else "exceptions"] += 1
                    print(f"{'WRONG' if wrong else 'RAISED'} {seed}: {failure}", flush=True)
    for name in ("models", "attentions", "sparse", "dense", "wrong grids", "exceptions"):
        print(f"{name:35}{count[name]:6}")
    for name in ("in order", "in order, plainly spelled"):
        print(f"{name:35}{count[name]:6}, sparse {count[name + ', sparse'] / max(count[name], 1):.1%}")
    print(f"seeds {given.seed} to {given.seed + given.models - 1}, {time.time() - begun:.0f} s; failed: {failures}")
    for failed in failures[:10]:
        try:
            print(describe(failed))
        except Exception:
            print(f"seed {failed}: not captured\n{drawn.draw(failed).source}")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
