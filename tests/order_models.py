# SPDX-License-Identifier: Apache-2.0
"""Random small models from a video to attention, written as Python source: a failing one can be read and pasted.

`draw` makes a model of one seed. It patchifies a video in one of many ways, does a few things to the order of its frames,
rows and columns (`order_steps`), flattens it to tokens, adds text, and attends. Half of the models are honest: they do
the same things, but leave everything in order. The other half does what it likes. Steps can be left out by number, which
leaves the others as they are: so a failure shrinks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from disturbance import Source
from torch import Tensor, nn

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
        model = build(self.source)
        return model


def build(source: str) -> nn.Module:
    import order_operators

    names: dict[str, object] = {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor, "operators": order_operators}
    exec(compile(source, "<drawn model>", "exec"), names)
    model = names["M"]
    assert callable(model)
    return model().eval()  # type: ignore[no-any-return]


# --- from a video to y -----------------------------------------------------------------------------------------------

Start = Callable[[Draft], tuple[tuple[int, ...], Source]]
STARTS: list[tuple[float, Start]] = []


def start(weight: float) -> Callable[[Start], Start]:
    def add(function: Start) -> Start:
        STARTS.append((weight, function))
        return function

    return add


def _video(draft: Draft, dims: str, patch: tuple[int, int, int]) -> tuple[tuple[int, ...], Source]:
    """Shape and dims of a latent."""
    sizes = {
        "B": ("sample", draft.size("B")),
        "C": ("", 4),
        "T": ("frame", draft.size("T") * patch[0]),
        "H": ("row", draft.size("H") * patch[1]),
        "W": ("col", draft.size("W") * patch[2]),
    }
    named = tuple(sizes[label] for label in dims)
    return tuple(size for _, size in named), Source(named)


def _patch(draft: Draft, time: bool = True) -> tuple[int, int, int]:
    return draft.rng.choice([(1, 1, 1), (1, 1, 1), (1, 2, 2), (1, 1, 2), (2, 1, 1) if time else (1, 2, 1)])


@start(4)
def conv3d(draft: Draft) -> tuple[tuple[int, ...], Source]:
    patch = _patch(draft)
    dims = draft.rng.choice(["BCTHW", "BCTHW", "BTCHW"])
    shape = _video(draft, dims, patch)
    conv = draft.module(f"nn.Conv3d(4, {WIDTH}, {patch}, {patch})")
    draft(f"y = {conv}(x)" if dims == "BCTHW" else f"y = {conv}(x.transpose(1, 2))")
    draft.dims = "BDTHW"
    return shape


@start(3)
def conv2d_over_frames(draft: Draft) -> tuple[tuple[int, ...], Source]:
    patch = _patch(draft, time=False)
    dims = draft.rng.choice(["BCTHW", "BTCHW"])
    shape = _video(draft, dims, patch)
    conv = draft.module(f"nn.Conv2d(4, {WIDTH}, {patch[1:]}, {patch[1:]})")
    if dims == "BCTHW":
        draft("x = x.transpose(1, 2)")
    b, t = draft.shape("BT")
    draft(f"y = {conv}(x.flatten(0, 1)).unflatten(0, ({b}, {t}))")
    draft.dims = "BTDHW"
    return shape


@start(3)
def conv2d_of_each_frame(draft: Draft) -> tuple[tuple[int, ...], Source]:
    patch = _patch(draft, time=False)
    dims = draft.rng.choice(["BCTHW", "BTCHW"])
    shape = _video(draft, dims, patch)
    conv = draft.module(f"nn.Conv2d(4, {WIDTH}, {patch[1:]}, {patch[1:]})")
    frames, place = draft.order(draft.size("T")), draft.rng.choice([1, 2])
    look = draft.rng.choice(["x[:, :, i]", "x.select(2, i)"] if dims == "BCTHW" else ["x[:, i]", "x.select(1, i)"])
    if draft.coin():
        draft(f"y = torch.stack([{conv}({look}) for i in {frames}], {place})")
    else:
        draft("frames = []", f"for i in {frames}:", f"    frames.append({conv}({look}).unsqueeze({place}))")
        draft(f"y = torch.cat(frames, {place})")
    draft.dims = "BTDHW" if place == 1 else "BDTHW"
    return shape


@start(2)
def conv2d_along_time(draft: Draft) -> tuple[tuple[int, ...], Source]:
    """A convolution over frames and columns of every row, or over frames and rows of every column."""
    shape = _video(draft, "BCTHW", (1, 1, 1))
    conv = draft.module(f"nn.Conv2d(4, {WIDTH}, 1)")
    draft.plain = False
    b, h, w = draft.shape("BHW")
    if draft.coin():
        draft(f"y = {conv}(x.permute(0, 3, 1, 2, 4).flatten(0, 1)).unflatten(0, ({b}, {h}))")
        draft.dims = "BHDTW"
    else:
        draft(f"y = {conv}(x.permute(0, 4, 1, 2, 3).flatten(0, 1)).unflatten(0, ({b}, {w}))")
        draft.dims = "BWDTH"
    return shape


@start(3)
def linear_of_patches(draft: Draft) -> tuple[tuple[int, ...], Source]:
    patch = _patch(draft)
    dims = draft.rng.choice(["BCTHW", "BTCHW", "BTHWC"])
    shape = _video(draft, dims, patch)
    (a, b, c), (t, h, w) = patch, draft.shape("THW")
    linear = draft.module(f"nn.Linear({4 * a * b * c}, {WIDTH})")
    if patch == (1, 1, 1):
        moved = {"BCTHW": ".permute(0, 2, 3, 4, 1)", "BTCHW": ".permute(0, 1, 3, 4, 2)", "BTHWC": ""}[dims]
        draft(f"y = {linear}(x{moved})")
    else:
        split = {"B": [draft.size("B")], "C": [4], "T": [t, a], "H": [h, b], "W": [w, c]}
        names = [name for label in dims for name in (label, label.lower())[: len(split[label])]]
        places = [names.index(name) for name in "BTHWCthw"]
        view = ", ".join(str(size) for label in dims for size in split[label])
        draft(f"y = {linear}(x.reshape({view}).permute({', '.join(map(str, places))}).flatten(4))")
    draft.dims = "BTHWD"
    return shape


@start(2)
def tokens(draft: Draft) -> tuple[tuple[int, ...], Source]:
    """Tokens as they come, with or without a mesh or tables that say over what they run: by convention in that order."""
    b, t, h, w = draft.shape("BTHW")
    dims = (("sample", b), ("frame", t), ("row", h), ("col", w), ("", 4))
    draft.plain = False
    draft(f"y = {draft.module(f'nn.Linear(4, {WIDTH})')}(x)")
    draft.dims = "BND"
    draft.sizes["N"] = t * h * w
    kind = draft.rng.randrange(5)
    if kind < 2:
        arguments = ", ".join(f"torch.arange({n})" for n in (t, h, w))
        mesh = f"torch.stack(torch.meshgrid({arguments}, indexing='ij'), -1)"
        if draft.lie():  # tokens stand in another order than the mesh names its axes in
            order = draft.rng.sample([0, 1, 2], 3)
            dims = (dims[0], *(dims[1 + place] for place in order), dims[4])
            mesh += f".permute({', '.join(map(str, order))}, 3)"
            draft.sizes.update(zip("THW", (dims[1 + place][1] for place in range(3)), strict=True))
            t, h, w = draft.shape("THW")
        elif draft.coin(0.3):
            mesh = f"torch.cartesian_prod({arguments})"
        draft(f"mesh = {mesh}.reshape(-1, 3).to(y)")
        draft(f"y = y + {draft.module(f'nn.Linear(3, {WIDTH})')}(mesh)")
    elif kind == 2:
        draft(f"y = y + {draft.parameter(1, t, h, w, WIDTH)}.flatten(1, 3)")
    elif kind == 3:
        a, b_, c = (draft.parameter(*s, WIDTH) for s in ((t, 1, 1), (1, h, 1), (1, 1, w)))
        draft(f"y = y + ({a} + {b_} + {c}).flatten(0, 2)")
    if draft.coin():
        draft(f"y = y.unflatten(1, ({t}, {h}, {w}))")
        draft.dims = "BTHWD"
    return (b, t * h * w, 4), Source(dims)


@start(2)
def images(draft: Draft) -> tuple[tuple[int, ...], Source]:
    """No frames at all."""
    b, h, w = draft.shape("BHW")
    patch = draft.rng.choice([1, 1, 2])
    if draft.coin(0.7):
        conv = draft.module(f"nn.Conv2d(4, {WIDTH}, {patch}, {patch})")
        draft(f"y = {conv}(x)")
        draft.dims = "BDHW"
    else:
        patch, draft.plain = 1, False
        draft(f"y = {draft.module(f'nn.Linear(4, {WIDTH})')}(x.permute(0, 2, 3, 1))")
        draft.dims = "BHWD"
    draft.sizes["T"] = 1
    dims = (("sample", b), ("", 4), ("row", h * patch), ("col", w * patch))
    return (b, 4, h * patch, w * patch), Source(dims)


# --- a whole model ---------------------------------------------------------------------------------------------------


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
    import order_steps

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
        step(order_steps.GRID_STEPS)
    draft.rng = random.Random(f"{seed} flatten")
    if "N" not in draft.dims:
        order_steps.flatten(draft)
    for _ in range(flats):
        step(order_steps.TOKEN_STEPS)
    draft.rng = random.Random(f"{seed} attend")
    sources, inputs = [source], [shape]
    second = order_steps.second_video(draft)
    before = draft.body
    draft.body = []
    texts = order_steps.attend(draft, second)
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
