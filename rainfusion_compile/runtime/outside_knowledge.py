# SPDX-License-Identifier: Apache-2.0
"""What is known of a call's tokens from outside its graph: what inputs carry or show, what a context says.

Whether inputs still hold what they held is asked of the device, in front of the call's own work. Most likely they do:
the call runs for that, and the host waits for the answer when the device is busy already. Where the answer is another,
what was computed is dropped, and the call runs again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rainfusion_compile.options import Options, constant
from rainfusion_compile.passes.normalize.spelling import Asked
from rainfusion_compile.passes.provenance.known_tokens import Carried, CarriedDim, FromTable, Told
from rainfusion_compile.passes.rewrite.summary import Given
from rainfusion_compile.runtime.carry import carried_by, claims
from rainfusion_compile.runtime.contents import Agreement, capturing
from rainfusion_compile.runtime.tables import Read, read_pairs, read_table, whole_of
from rainfusion_compile.sparsity.layout import Grids

Outputs = Sequence[Any]
Last = dict[int, tuple[Tensor, Read]]  # by number of an input: a copy of the table that it was, and what that said
Places = Mapping[str, tuple[int, tuple[int, ...]]]  # by name of a group: this process's number in it, and its ranks

_layout: ContextVar[Given] = ContextVar("rainfusion_layout", default=(None, None))


@contextmanager
def video_layout(grid: Grids, text: tuple[int, ...] | None = None) -> Iterator[None]:
    """Say what the tokens of the videos are that run in this context, in this thread, for graphs that cannot know.

    What a graph shows by itself holds against this, and a warning names both.

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


class Heard:
    """What is known of a call from outside its graph, by what its inputs are asked to hold still.

    `claims`: tensors and what they are said to hold, compared from here on, without waiting. `told`: what is known if
    these keys of the claims agree. It forgets what is said by others.
    """

    def __init__(self, claims: Mapping[Any, tuple[Tensor, Tensor]], told: Callable[[set[Any]], Told]) -> None:
        self._agreement, self._told = Agreement(claims), told
        self.expected = told(self._agreement.possible)

    @property
    def late(self) -> bool:
        """Whether there is an answer to be waited for."""
        return self._agreement.late

    def wait(self) -> Told:
        """What is known indeed. Waits for the device, if there is anything to be compared."""
        true = self._agreement.wait()
        return self.expected if true == self._agreement.possible else self._told(true)


class Predictor:
    """Runs the calls of one graph for what is expected of them while that comes true, where a run may be dropped."""

    def __init__(self, allowed: bool) -> None:
        self.allowed, self.right = allowed, True

    def __call__(
        self, heard: Heard, seen: Callable[[Told], bool], start: Callable[[Told], Callable[[], Outputs]]
    ) -> Outputs:
        """The outputs of a call of which this was heard.

        `seen`: whether it can be run for that without compiling or analysing anything. `start` runs it for that, and
        returns what finishes it: all that may be seen of a run from outside. It raises if the run was right.
        """
        expected = heard.expected
        finish: Callable[[], Outputs] | None = None
        if self.allowed and self.right and heard.late and seen(expected):
            try:
                finish = start(expected)
            except Exception:
                if heard.wait() == expected:
                    raise
        known = heard.wait()
        self.right = known == expected
        if finish is None or not self.right:
            finish = None  # frees what it would have returned
            finish = start(known)
        return finish()


class PositionInputs:
    """Which inputs of a graph are tables of positions, and what they say in each call.

    Inputs that proved a grid once are read in all later calls; until one does, all are, later on in few calls only. A
    copy of each last table is kept, of the whole if a rank has a part of it, for most models make the same one again,
    and to compare is quicker than to read.
    """

    TRIES = 64  # of calls in a row, and of calls that are skipped after that

    def __init__(self, min_tokens: int, places: Places = MappingProxyType({})) -> None:
        self.min_tokens = min_tokens
        self.ranks = sorted({(rank, len(members)) for rank, members in places.values() if len(members) > 1})
        self.last: Last = {}
        self.calls = 0

    def add_to(self, carried: Carried, args: Sequence[Any], true: Mapping[int, Read]) -> Carried:
        """What inputs carry, with what is read off those that carry nothing; none while a CUDA graph is recorded.

        ``true``: what those say that were found to be what they were.
        """
        numbers = sorted(self.last)
        if not numbers:
            self.calls += 1
            if self.calls > self.TRIES and self.calls % self.TRIES:
                return carried
            numbers = [number for number, dims in enumerate(carried) if dims is None]
        if capturing():
            return carried
        open_ones = [number for number in numbers if carried[number] is None and _plain(args[number])]
        reads = {number: true[number] for number in open_ones if number in true}
        rest = [number for number in open_ones if number not in reads]
        pairs = {number for number in rest if number in self.last and self.last[number][1].sines is not None}
        for number in (number for number in rest if number not in pairs):
            if (read := read_table(args[number], self.min_tokens, self.ranks)) is not None:
                reads[number] = read
        if pairs or not reads:
            beside = {self.last[number][1].sines for number in pairs}
            among = [number for number in (*rest, *beside) if number is not None and _plain(args[number])]
            reads.update(read_pairs(args, dict.fromkeys(among), self.min_tokens))
        found = list(carried)
        for number, read in reads.items():
            if number not in true:
                self.last[number] = whole_of(args, number, read).clone(), read
            tokens = CarriedDim(read.layout.grid, read.layout.text, FromTable(number), run=read.run)
            for place in (number,) if read.sines is None else (number, read.sines):
                if found[place] is None:
                    found[place] = tuple(tokens if dim == read.dim else None for dim in range(args[place].dim()))
        return tuple(found)


class Listener:
    """Hears of one graph's calls. A grid among the options goes before the context's.

    `asks`: of which inputs it is asked whether they hold what, by their numbers.
    """

    def __init__(self, options: Options, places: Places = MappingProxyType({})) -> None:
        self.positions = PositionInputs(options.min_tokens, places)
        self.options = options
        self.asks: Mapping[int, Asked] = {}
        self._module: Callable[[], Any] = lambda: None  # that was called last, by one of its parameters

    def of_another_module(self, parameter: Tensor) -> bool:
        """Whether a call of the module that has this parameter follows one of another, whatever was compiled for it."""
        before = self._module()
        if before is not None and before is not parameter:
            return True
        self._module = weakref.ref(parameter)
        return False

    def given(self) -> Given:
        """The grid and text that a user tells of a call."""
        return (self.options.grid, self.options.text) if self.options.grid is not None else _layout.get()

    def listen(self, args: Sequence[Any]) -> Heard:
        """Of a call with these arguments; does not wait for the device where nothing has to be read."""
        last = dict(self.positions.last)  # another thread may read other tables meanwhile

        def told(true: set[Any]) -> Told:
            still = {number: reading for number, (_, reading) in last.items() if number in true}
            carried = self.positions.add_to(carried_by(args, true), args, still)
            given = (None, None) if self.options.grid is not None else _layout.get()
            return Told(carried, *given, frozenset(number for number in asks if (number,) in true))

        asks = {} if capturing() else {number: asked for number, asked in self.asks.items() if _plain(args[number])}
        answers = {(number,): (_within(args[number], asked), args[number]) for number, asked in asks.items()}
        return Heard({**claims(args), **_still(last, args), **answers}, told)


def _still(last: Last, args: Sequence[Any]) -> dict[Any, tuple[Tensor, Tensor]]:
    """By number: inputs that may be what they were when they were read last, to be compared with that."""
    last = {} if capturing() else last
    return {
        number: (whole_of(args, number, read), table)
        for number, (table, read) in last.items()
        if _plain(args[number]) and (read.sines is None or _plain(args[read.sines]))
    }


def _within(x: Tensor, asked: Asked) -> Tensor:
    """What is there, if it is what was asked; else something else."""
    if asked.high is None:
        return x.clamp(min=asked.low[0])
    low, high = constant((asked.low, asked.high), x.device, torch.int64)
    return x.clamp(low, high).to(x.dtype) if x.shape == low.shape else x.new_empty(0)


def _plain(arg: Any) -> bool:
    return type(arg) is Tensor and not arg.is_meta
