# SPDX-License-Identifier: Apache-2.0
"""Numbers for the symbolic sizes of a graph.

The analysis of a graph for many resolutions works on numbers: on those of the call that is being compiled (Dynamo's
hints), or, inside `at_sizes`, on those of any other call. Some sizes no input shows: how many elements `nonzero` finds
(an *unbacked* symbol). For them there are stand-ins; sizes that follow are computed, not chosen. What holds for these
need not hold for others, so it is asked twice, with small ones and large ones: primes, which are no product of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from rainfusion_compile.passes.graph.nodes import example_of, tensor_at

SMALL, LARGE = 1, 10_000  # where stand-ins begin


class Sizes:
    """Numbers for symbols: those given, primes for what only a run can tell, and what follows from both."""

    def __init__(self, values: Mapping[sympy.Symbol, int], stand_ins: int | None = None) -> None:
        self.values = {symbol: sympy.Integer(number) for symbol, number in values.items()}
        self.last = stand_ins
        self._numbers: dict[sympy.Basic, int] = {}

    def number(self, expression: sympy.Expr) -> int | None:
        """The number of an expression; None if it has a symbol without one."""
        if expression not in self._numbers:
            number = expression.xreplace(self.values)
            if not number.is_Integer:
                return None
            self._numbers[expression] = int(number)
        return self._numbers[expression]


_sizes: ContextVar[Sizes | None] = ContextVar("rainfusion_sizes", default=None)


@contextmanager
def at_sizes(sizes: Sizes | None) -> Iterator[None]:
    """Let `hint_of` answer for these sizes, in this thread; for those of the call that is being compiled, if None."""
    token = _sizes.set(sizes)
    try:
        yield
    finally:
        _sizes.reset(token)


def hint_of(size: int | torch.SymInt | torch.SymBool) -> int | None:
    """A size as a number, without a guard on it; None if it is known at run time only."""
    if isinstance(size, int):
        return size
    sizes = _sizes.get()
    return size.node.hint if sizes is None else sizes.number(size.node.expr)


def shape_of(node: Any) -> tuple[Any, ...]:
    """The sizes of a node's tensor as numbers, without guards; () if it is no tensor."""
    example = tensor_at(node)
    return () if example is None else tuple(map(hint_of, example.shape))


def fixed(size: int | torch.SymInt) -> int | None:
    """A size as a number, if it is the same in every call."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else None


def learn(example: Any, value: Any) -> None:
    """A node whose sizes Dynamo knows as those of `example` came out as `value`."""
    sizes = _sizes.get()
    pairs: Iterable[tuple[Any, Any]] = [(example, value)] if isinstance(value, int) else ()
    if isinstance(value, Tensor) and isinstance(example, Tensor) and example.dim() == value.dim():
        pairs = zip(example.shape, value.shape, strict=True)
    for size, number in pairs:
        if sizes is not None and isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            sizes.values.setdefault(size.node.expr, sympy.Integer(number))


def stand_in(example: Any) -> None:
    """A node that is not run has sizes that nothing tells: give each of their symbols a stand-in."""
    sizes = _sizes.get()
    if sizes is None or sizes.last is None:
        return
    for size in _symbolic(example):
        for symbol in sorted(size.node.expr.free_symbols - sizes.values.keys(), key=str):
            sizes.last = int(sympy.nextprime(sizes.last))
            sizes.values[symbol] = sympy.Integer(sizes.last)


class InputSizes:
    """Where the arguments of a graph show the numbers of its symbols.

    ``hints``: these of the call that is being compiled; None for what it does not tell.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._places: dict[sympy.Symbol, tuple[int, int | None]] = {}
        self.hints: dict[sympy.Symbol, int | None] = {}
        for number, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            value = example_of(node)
            for dim, size in ((None, value), *enumerate(value.shape if isinstance(value, Tensor) else ())):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    self._places.setdefault(size.node.expr, (number, dim))
                    self.hints.setdefault(size.node.expr, size.node.hint)

    def of(self, args: Sequence[Any]) -> tuple[int, ...]:
        """The numbers of a call."""
        places = self._places.values()
        return tuple(int(args[number] if dim is None else args[number].shape[dim]) for number, dim in places)

    def named(self, numbers: tuple[int, ...] | None) -> dict[sympy.Symbol, int]:
        """These numbers by their symbols; by default those of the call that is being compiled."""
        pairs = zip(self._places, self.hints.values() if numbers is None else numbers, strict=True)
        return {symbol: number for symbol, number in pairs if number is not None}

    def hide(self, value: Any) -> bool:
        """Whether the inputs do not tell some sizes of a value."""
        return any(size.node.expr.free_symbols - self._places.keys() for size in _symbolic(value))


def is_symbolic(gm: fx.GraphModule) -> bool:
    """Whether some sizes of a graph differ from call to call."""
    return any(fixed(size) is None for node in gm.graph.nodes for size in _symbolic(example_of(node)))


def _symbolic(value: Any) -> Iterator[torch.SymInt]:
    """The symbolic sizes of a value: of a tensor, or of several, or the value itself."""
    if isinstance(value, Tensor):
        value = (*value.shape, *(value.stride() if value.layout == torch.strided else ()))
    if isinstance(value, torch.SymInt):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _symbolic(item)
