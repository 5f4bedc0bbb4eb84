# SPDX-License-Identifier: Apache-2.0
"""A model while it is written as Python source, and the steps that may write it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

WIDTH = 32
TEXT = 5


@dataclass
class Draft:
    """A model while it is written. `dims` names those of `y`: B, T, H, W, D, each once; or B, N, D."""

    rng: random.Random
    honest: bool
    sizes: dict[str, int] = field(default_factory=dict)
    dims: str = ""
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    plain: bool = True
    """nothing was used that hides the order from whoever reads the graph, such as unknown operators"""
    count: int = 0

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def __call__(self, *lines: str) -> None:
        self.body.extend(lines)

    def module(self, made: str) -> str:
        """A new submodule; returns its name."""
        name = self.name("m")
        self.init.append(f"self.{name} = {made}")
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        name = self.name("p")
        self.init.append(f"self.{name} = nn.Parameter(torch.randn({', '.join(map(str, shape))}))")
        return f"self.{name}"

    def constant(self, made: str) -> str:
        name = self.name("c")
        self.init.append(f"self.register_buffer({name!r}, {made})")
        return f"self.{name}"

    def size(self, label: str) -> int:
        return self.sizes[label]

    def shape(self, dims: str | None = None) -> tuple[int, ...]:
        return tuple(self.sizes[label] for label in dims or self.dims)

    def coin(self, share: float = 0.5) -> bool:
        return self.rng.random() < share

    def lie(self, share: float = 0.5) -> bool:
        """Whether to put something out of order here."""
        return not self.honest and self.coin(share)

    def order(self, count: int) -> list[int]:
        """The indices of an axis: in order in honest models."""
        order = list(range(count))
        if self.lie(0.6) and count > 1:
            kind = self.rng.randrange(4)
            if kind == 0:
                order.reverse()
            elif kind == 1:
                turn = self.rng.randrange(1, count)
                order = order[turn:] + order[:turn]
            elif kind == 2:
                order = order[::2] + order[1::2]
            else:
                self.rng.shuffle(order)
        return order

    def axis(self) -> int:
        """A dim of `y` that holds frames, rows or columns."""
        return self.rng.choice([number for number, label in enumerate(self.dims) if label in "THWN"])

    def permute(self, dims: str) -> None:
        """Bring `y` into another order of dims."""
        if dims == self.dims:
            return
        places = [self.dims.index(label) for label in dims]
        swapped = [number for number, place in enumerate(places) if number != place]
        spelled = [f"y = y.permute({', '.join(map(str, places))})", f"y = torch.permute(y, {tuple(places)})"]
        if len(swapped) == 2:
            spelled.append(f"y = y.transpose({swapped[0]}, {swapped[1]})")
        spelled.append(f"y = torch.movedim(y, {tuple(places)}, {tuple(range(len(places)))})")
        spelled.append(f"y = torch.einsum('{self.dims.lower()}->{dims.lower()}', y)")
        self(self.rng.choice(spelled))
        self.dims = dims
        if self.coin(0.3):
            self("y = y.contiguous()")


Step = Callable[[Draft], None]
GRID_STEPS: list[tuple[float, Step]] = []
TOKEN_STEPS: list[tuple[float, Step]] = []


def step(grid: float = 0, tokens: float = 0) -> Callable[[Step], Step]:
    """Register a step for `y` with a dim each for T, H, W, and for ``[B, N, D]``, with weights."""

    def add(function: Step) -> Step:
        for weight, table in ((grid, GRID_STEPS), (tokens, TOKEN_STEPS)):
            if weight:
                table.append((weight, function))
        return function

    return add


def at(axis: int, index: str) -> str:
    """What selects along `axis` in brackets."""
    return ", ".join([":"] * axis + [index])
