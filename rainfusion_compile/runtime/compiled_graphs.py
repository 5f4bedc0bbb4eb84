# SPDX-License-Identifier: Apache-2.0
"""Run time: compiled graphs tell an open report what their heads chose, and each other what their tokens are.

Each rewritten graph returns its choices and recalls as extra outputs, which are dropped here unless someone looks. So
nothing is global, nothing is written from inside a graph, and CUDA graphs and compile caches work as always.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch._guards import TracingContext, tracing

from rainfusion_compile.passes.graph.symbolic_sizes import InputSizes
from rainfusion_compile.passes.provenance.known_tokens import NOTHING, Carried, Told
from rainfusion_compile.report import GraphReport, Observed, Report
from rainfusion_compile.runtime.carry import attach, carried_by
from rainfusion_compile.runtime.outside_knowledge import Listener

MAX_VARIANTS = 64  # of one graph; what comes after stays dense

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


def open_report() -> Report | None:
    """The report that is open in this thread, if one is."""
    return _open_report.get()


class ObservedGraph:
    """A compiled graph whose last ``2 * len(report.sparse)`` outputs are choices and recalls.

    ``heard``: whoever calls it has asked before what its inputs carry.
    """

    def __init__(
        self, compiled: Callable[..., Sequence[Any]], report: GraphReport, carried: Carried = (), heard: bool = False
    ) -> None:
        self.compiled = compiled
        self.report = report
        self.carried = carried if any(carried) else ()
        self.extra = 2 * len(report.sparse)
        self.heard = heard

    def __call__(self, *args: Any) -> Sequence[Any]:
        if self.carried and not self.heard:
            carried_by(args)
        outputs = self.compiled(*args)
        if self.carried:
            attach(outputs, self.carried, args)
        split = len(outputs) - self.extra
        report = open_report()
        if report is not None and self.report.attentions:
            pairs = zip(outputs[split::2], outputs[split + 1 :: 2], strict=True)
            # Copies: a CUDA graph writes its next call over these.
            report.add(self.report, [Observed(choice.clone(), recall.clone()) for choice, recall in pairs])
        return outputs[:split]


class PassingGraph:
    """A compiled graph without sparse attention: what its inputs carry, its outputs carry on.

    ``follow`` tells what that is, for what the inputs carry and the arguments of a call. In a graph with symbolic sizes
    the answer also depends on those of the call. A graph that ``shows`` tokens by itself is always followed.
    """

    def __init__(
        self,
        compiled: Callable[..., Sequence[Any]],
        follow: Callable[[Carried, Sequence[Any]], Carried],
        sizes: InputSizes,
        shows: bool,
    ) -> None:
        self.compiled = compiled
        self.shows = shows
        self.follow = follow
        self.sizes = sizes
        self.followed: dict[tuple[Carried, tuple[int, ...]], Carried] = {}

    def __call__(self, *args: Any) -> Sequence[Any]:
        carried = carried_by(args)
        outputs = self.compiled(*args)
        if self.shows or any(carried):
            known = carried, self.sizes.of(args)
            if known not in self.followed and len(self.followed) < MAX_VARIANTS:
                self.followed[known] = self.follow(carried, args)
            attach(outputs, self.followed.get(known, ()), args)
        return outputs


class OpenGraph:
    """A graph that does not show its grid, compiled anew for everything that its inputs or the context say of it.

    Looked up on every call, so no call runs with another's grid. What is not known stays dense. Such a graph is fixed
    to its sizes; a dynamic one comes here only if nothing was known of its tokens when Dynamo made it.
    """

    def __init__(self, compile_with: Callable[[Told], Callable[..., Sequence[Any]]], listener: Listener) -> None:
        self.compile_with = compile_with
        self.listener = listener
        self.context = TracingContext.try_get()
        self.variants: dict[Told, Callable[..., Sequence[Any]]] = {}
        self.lock = threading.Lock()

    def __call__(self, *args: Any) -> Sequence[Any]:
        told = self.listener.hear(args)
        variant = self.variants.get(told)
        if variant is None:
            variant = self._compile(told)
        return variant(*args)

    def _compile(self, told: Told) -> Callable[..., Sequence[Any]]:
        with self.lock:
            if len(self.variants) >= MAX_VARIANTS:
                told = NOTHING
            if told not in self.variants:
                with tracing(self.context):  # what Dynamo knows of the graph's parameters
                    self.variants[told] = self.compile_with(told)
            return self.variants[told]
