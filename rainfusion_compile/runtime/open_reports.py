# SPDX-License-Identifier: Apache-2.0
"""Which reports are open, and who hears what runs: all that is global at run time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rainfusion_compile.report import Report

_reports_here: ContextVar[tuple[Report, ...]] = ContextVar("rainfusion_reports", default=())
open_reports: list[tuple[Report, bool]] = []
"""Of all threads, and whether each hears them all."""


@contextmanager
def opened(report: Report, *, all_threads: bool) -> Iterator[None]:
    """Let a report hear what runs in this thread, or in all."""
    token = _reports_here.set((*_reports_here.get(), report))
    open_reports.append((report, all_threads))
    try:
        yield
    finally:
        open_reports.remove((report, all_threads))
        _reports_here.reset(token)


def listening(*, note: bool = True) -> list[Report]:
    """The open reports that hear this thread; the others note that they missed a call, unless it is no loss."""
    here, listening = _reports_here.get(), []
    for report, all_threads in tuple(open_reports):
        if all_threads or report in here:
            listening.append(report)
        elif note:
            report.missed += 1
    return listening
