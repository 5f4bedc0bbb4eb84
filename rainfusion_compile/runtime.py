# SPDX-License-Identifier: Apache-2.0
"""Run time: compiled graphs tell an open report what their heads chose.

Each rewritten graph returns its choices and recalls as extra outputs, which are dropped here unless someone looks. So
nothing is global, nothing is written from inside a graph, and CUDA graphs and compile caches work as always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rainfusion_compile.report import GraphReport, Observed, Report

_open_report: ContextVar[Report | None] = ContextVar("rainfusion_open_report", default=None)


@contextmanager
def observe() -> Iterator[Report]:
    """Collect what every graph compiled by this backend does while the context is open, in this thread.

    Example::

        with rainfusion_compile.observe() as report:
            video = pipe(prompt).frames[0]
        print(report)
    """
    report = Report()
    token = _open_report.set(report)
    try:
        yield report
    finally:
        _open_report.reset(token)


class ObservedGraph:
    """A compiled graph whose last ``2 * len(report.sparse)`` outputs are choices and recalls."""

    def __init__(self, compiled: Callable[..., Sequence[Any]], report: GraphReport) -> None:
        self.compiled = compiled
        self.report = report
        self.extra = 2 * len(report.sparse)

    def __call__(self, *args: Any) -> Sequence[Any]:
        outputs = self.compiled(*args)
        split = len(outputs) - self.extra
        report = _open_report.get()
        if report is not None:
            pairs = zip(outputs[split::2], outputs[split + 1 :: 2], strict=True)
            # Copies: a CUDA graph writes its next call over these.
            report.add(self.report, [Observed(choice.clone(), recall.clone()) for choice, recall in pairs])
        return outputs[:split]
