# SPDX-License-Identifier: Apache-2.0
"""Random small models from a video to attention, written as Python source: a failing one can be read and pasted.

`draw` makes the model of a seed. It patchifies a video in one of many ways (`starts`), does a few things to the order
of frames, rows and columns (`axis_steps`, `grid_steps`), flattens them to tokens, adds text and attends (`attention`).
Half of the models are honest: they do the same things, but leave everything in order. The other half does what it
likes. Steps can be left out by number, which leaves the others as they are: so a failure shrinks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orders.axis_steps
import orders.grid_steps  # noqa: F401
from orders import operators
from orders.attention import attend, flatten, second_video
from orders.disturbance import Source
from orders.draft import GRID_STEPS, TEXT, TOKEN_STEPS, WIDTH, Draft
from orders.starts import STARTS


@dataclass
class Model:
    """A drawn model: its source, its inputs, and what their dims are."""

    seed: int
    source: str
    inputs: list[Tensor]
    sources: list[Source]
    plain: bool
    steps: int

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return build(self.source)


def build(source: str) -> nn.Module:
    names: dict[str, object] = {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor, "operators": operators}
    exec(compile(source, "<drawn model>", "exec"), names)
    model = names["M"]
    assert callable(model)
    return model().eval()  # type: ignore[no-any-return]


def _sizes(rng: random.Random) -> dict[str, int]:
    sizes = rng.sample([2, 3, 4, 4, 5, 6], 3)
    chance = rng.random()
    if chance < 0.08:
        sizes[rng.randrange(3)] = 1
    elif chance < 0.2:
        sizes[rng.randrange(3)] = sizes[rng.randrange(3)]
    return {"B": rng.choice([1, 2, 2]), "D": WIDTH, **dict(zip("THW", sizes, strict=True))}


def _choose(rng: random.Random, table: Sequence[tuple[float, Callable[..., object]]]) -> Callable[..., object]:
    return rng.choices([item for _, item in table], [weight for weight, _ in table])[0]


def draw(seed: int, skip: frozenset[int] = frozenset()) -> Model:
    """The model of a seed, without the steps whose numbers are to be skipped."""
    rng = random.Random(seed)
    draft = Draft(rng, honest=rng.random() < 0.5, sizes=_sizes(rng))
    shape, source = _choose(rng, STARTS)(draft)  # type: ignore[misc]
    start_lines, draft.body = draft.body, []
    grids, flats = rng.choice([0, 1, 1, 2, 3]), rng.choice([0, 0, 1, 2])
    if "N" in draft.dims:
        grids = 0
    number = 0

    def step(table: Sequence[tuple[float, Callable[..., object]]]) -> None:
        nonlocal number
        number += 1
        if number not in skip:
            draft.rng = random.Random(f"{seed} {number}")
            _choose(draft.rng, table)(draft)

    for _ in range(grids):
        step(GRID_STEPS)
    draft.rng = random.Random(f"{seed} flatten")
    if "N" not in draft.dims:
        flatten(draft)
    for _ in range(flats):
        step(TOKEN_STEPS)
    draft.rng = random.Random(f"{seed} attend")
    sources, inputs = [source], [shape]
    second = second_video(draft)
    before = draft.body
    draft.body = []
    texts = attend(draft, second)
    names = ["x"]
    if second:
        sources, inputs, names = [source, source], [shape, shape], ["x", "x2"]
    if texts:
        sources.append(Source((("", draft.size("B")), ("", TEXT), ("", WIDTH))))
        inputs.append((draft.size("B"), TEXT, WIDTH))
        names.append("text")
    lines = ["class M(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += ["        " + line for line in draft.init]
    lines += ["    def tokens(self, x):"]
    lines += ["        " + line for line in [*start_lines, *before, "return y"]]
    lines += [f"    def forward(self, {', '.join(names)}):", "        y = self.tokens(x)"]
    lines += ["        " + line for line in draft.body]
    noise = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*item, generator=noise) for item in inputs]
    return Model(seed, "\n".join(lines) + "\n", tensors, sources, draft.plain, number)
