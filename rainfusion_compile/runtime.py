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

from torch import Tensor
from torch._guards import TracingContext, tracing

from rainfusion_compile.grid import Grids
from rainfusion_compile.options import Options
from rainfusion_compile.passes.carrying import NOTHING, Carried, CarriedDim, Told, attach, carried_by
from rainfusion_compile.passes.sizes import InputSizes
from rainfusion_compile.positions import Reading, equal, read_positions, remember, remembered
from rainfusion_compile.report import GraphReport, Observed, Report

GivenLayout = tuple[Grids | None, tuple[int, ...] | None]
MAX_VARIANTS = 64  # of one graph; what comes after stays dense

_layout: ContextVar[GivenLayout] = ContextVar("rainfusion_layout", default=(None, None))
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


@contextmanager
def video_layout(grid: Grids, text: tuple[int, ...] | None = None) -> Iterator[None]:
    """Say what the tokens of the videos are that run in this context, in this thread, for graphs that cannot know.

    What a graph shows by itself holds against this; attention that contradicts it stays dense.

    Args:
        grid: ``(T, H, W)`` in tokens; a tuple of such for several videos in one sequence.
        text: ``(before, after)``, the text tokens around the video (one number more than there are videos); by default
            what the graph shows, or none.

    Raises:
        ValueError: on an impossible grid or text.
    """
    options = Options(grid=grid, text=text)
    token = _layout.set((options.grid, options.text))
    try:
        yield
    finally:
        _layout.reset(token)


def open_report() -> Report | None:
    """The report that is open in this thread, if one is."""
    return _open_report.get()


class ObservedGraph:
    """A compiled graph whose last ``2 * len(report.sparse)`` outputs are choices and recalls."""

    def __init__(self, compiled: Callable[..., Sequence[Any]], report: GraphReport, carried: Carried = ()) -> None:
        self.compiled = compiled
        self.report = report
        self.carried = carried if any(carried) else ()
        self.extra = 2 * len(report.sparse)

    def __call__(self, *args: Any) -> Sequence[Any]:
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


class PositionInputs:
    """Which inputs of a graph are tables of positions, and what they say in each call.

    Inputs are not told apart by name or shape: those that proved a grid once are read in all later calls; until one
    does, all are, later on in few calls only. A copy of each last table is kept, for most models make the same one
    again in every forward, and to compare is quicker than to read.
    """

    TRIES = 64  # of calls in a row, and of calls that are skipped after that

    def __init__(self, min_tokens: int) -> None:
        self.min_tokens = min_tokens
        self.last: dict[int, tuple[Tensor, Reading]] = {}
        self.calls = 0

    def add_to(self, carried: Carried, args: Sequence[Any]) -> Carried:
        """What the inputs of a call carry, with what is read off those that carry nothing."""
        numbers = sorted(self.last)
        if not numbers:
            self.calls += 1
            if self.calls > self.TRIES and self.calls % self.TRIES:
                return carried
            numbers = [number for number, dims in enumerate(carried) if dims is None]
        found = list(carried)
        for number in numbers:
            if found[number] is not None or not isinstance(args[number], Tensor):
                continue
            reading = self._read(number, args[number])
            if reading is not None:
                dim, layout = reading
                tokens = CarriedDim(layout.grid, layout.text, ("positions", number))
                found[number] = tuple(tokens if place == dim else None for place in range(args[number].dim()))
        return tuple(found)

    def _read(self, number: int, arg: Tensor) -> Reading:
        reading = remembered(arg)
        if reading is not None:
            return reading
        table, reading = self.last.get(number, (arg, None))
        if reading is None or not equal(arg, table):
            reading = read_positions(arg, self.min_tokens)
            if reading is not None:
                self.last[number] = arg.clone(), reading
        if reading is not None:
            remember(arg, reading)
        return reading


class Listener:
    """What is known of a call's tokens from outside its graph: what inputs carry or show, what a context says."""

    def __init__(self, options: Options) -> None:
        self.positions = PositionInputs(options.min_tokens)
        self.given = options.grid is not None

    def hear(self, args: Sequence[Any]) -> Told:
        """Of a call with these arguments. A grid among the options goes before the context's."""
        carried = self.positions.add_to(carried_by(args), args)
        return Told(carried) if self.given else Told(carried, *_layout.get())


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
