# SPDX-License-Identifier: Apache-2.0
"""Calls that begin before it is known what their inputs hold: nothing of a wrong beginning is ever seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compared import carried_by
from torch import Tensor, nn

import rainfusion_compile
from rainfusion_compile.passes.graph.mutation import repeatable
from rainfusion_compile.passes.provenance.known_tokens import NOTHING, CarriedDim, Told
from rainfusion_compile.runtime import outside_knowledge
from rainfusion_compile.runtime.carry import attach
from rainfusion_compile.runtime.compiled_graphs import CompiledGraph
from rainfusion_compile.runtime.contents import Agreement
from rainfusion_compile.runtime.outside_knowledge import Heard, Predictor

GRIDS = ((4, 6, 10), (4, 10, 6))  # as many tokens
pytestmark = pytest.mark.usefixtures("fixed_phases", "fresh_dynamo")
OPTIONS = {"min_tokens": 1, "error": 1.0, "sparsity": 0.7}


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether answers come late, as they do from a GPU."""
    if request.param:
        monkeypatch.setattr(Agreement, "late", property(lambda agreement: bool(agreement._answers)))
    return bool(request.param)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    """What compiled graphs are run for, in order."""
    seen: list[Told] = []
    start = CompiledGraph.start
    monkeypatch.setattr(
        CompiledGraph, "start", lambda self, args, known: seen.append(known) or start(self, args, known)
    )
    return seen


def rotary(grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    places = torch.stack(torch.meshgrid(*(torch.arange(float(size)) for size in grid), indexing="ij"), -1)
    angles = (places.flatten(0, 2)[:, :, None] * 1e4 ** -(torch.arange(4) / 4)).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(48, 144)

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 24)).permute(2, 0, 3, 1, 4)
        if cos is not None:
            q, k = (z * cos + torch.cat([-z[..., 12:], z[..., :12]], -1) * sin for z in (q, k))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Counting(Block):
    """Counts its calls in a tensor that it is given, and leaves its tokens doubled."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, calls: Tensor) -> Tensor:
        calls += 1
        return super().forward(x, cos, sin) + x.mul_(2)


class Noisy(Block):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return super().forward(x, cos, sin) + torch.randn_like(x)


def call(model: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, set[Any], int]:
    """The output; the grids that attention was sparse over, None where it was dense; and how many calls that were."""
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = model(*args)
    entries = report.to_dict()["attentions"]
    grids = {tuple(entry["grid"]) if entry["status"] == "sparse" else None for entry in entries}
    return out, grids, sum(entry.get("calls", 0) for entry in entries if entry["status"] == "sparse")


def expected(block: nn.Module, grid: tuple[int, int, int], *args: Tensor) -> Tensor:
    """What a block gives that is told its grid, in a graph of its own."""
    torch._dynamo.reset()
    return call(torch.compile(block, backend="rainfusion", options={**OPTIONS, "grid": grid}), *args)[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_tables_change_and_nothing_of_the_wrong_run_is_seen(late: bool, runs: list[Told], dynamic: bool):
    model = torch.compile(Block(), backend="rainfusion", dynamic=dynamic, options=OPTIONS)
    tables, x = rotary(GRIDS[0]), torch.randn(1, 240, 48)
    found = []
    for grid in (*GRIDS, GRIDS[1], GRIDS[0], GRIDS[0], GRIDS[0], GRIDS[1], GRIDS[1]):
        for tensor, new in zip(tables, rotary(grid), strict=True):
            tensor.data.copy_(new)
        runs.clear()
        out, grids, calls = call(model, x, *tables)
        assert (grids, calls) == ({grid}, 1)
        found.append((grid, out, [known.carried[-1][0].grid for known in runs if known.carried[-1]]))
    if late:  # where the grid changes, the one before was expected
        assert [len(ran) for _, _, ran in found] == [1, 2, 1, 2, 1, 1, 2, 1]
        assert found[6][2] == [GRIDS[0], GRIDS[1]]
    else:
        assert all(len(ran) == 1 for _, _, ran in found)
    want = {grid: expected(Block(), grid, x, *rotary(grid)) for grid in GRIDS}
    for grid, out, _ in found:
        torch.testing.assert_close(out, want[grid])


def known_grids(x: Tensor) -> set[Any]:
    """Of the dimensions of a tensor whose tokens are those of a video that is known."""
    (dims,) = carried_by([x])
    return {dim.grid for dim in dims or () if dim is not None and dim.grid is not None}


@pytest.mark.parametrize("dynamic", [False, True])
def test_notes_that_are_not_true_any_more(late: bool, dynamic: bool):
    patch = nn.Conv3d(4, 48, 1)
    settings = {"backend": "rainfusion", "dynamic": dynamic, "options": OPTIONS}
    first = torch.compile(lambda x: patch(x).flatten(2).transpose(1, 2).contiguous(), **settings)
    # the graph between has no attention, and hands on what it hears
    between, second = torch.compile(lambda x: x * 2, **settings), torch.compile(Block(), **settings)
    for changed in (False, False, True, False, False, True, True, False):
        with torch.no_grad():
            x = first(torch.randn(1, 4, *GRIDS[0]))
            if changed:
                x.data.copy_(x.flip(1))
            y = between(x)
        assert (carried_by([x]) == (None,)) == changed
        assert known_grids(y) == known_grids(x) == (set() if changed else {GRIDS[0]})
        out, grids, calls = call(second, y)
        assert (grids, calls) == (({None}, 0) if changed else ({GRIDS[0]}, 1))
        assert known_grids(out) == known_grids(x)
        if changed:
            torch.testing.assert_close(out, Block()(y))


@pytest.mark.parametrize("block", [Counting, Noisy])
def test_what_shows_is_not_done_for_nothing(late: bool, runs: list[Told], block: type[Block]):
    torch.manual_seed(0)
    model = torch.compile(block(), backend="rainfusion", options=OPTIONS)
    calls, outs = torch.zeros(()), []
    for number, grid in enumerate((*GRIDS, *GRIDS, GRIDS[1]), 1):
        x = torch.ones(1, 240, 48)
        args = [x, *rotary(grid), calls][: 4 if block is Counting else 3]
        torch.manual_seed(1)
        out, grids, _ = call(model, *args)
        assert grids == {grid}
        assert calls == (number if block is Counting else 0)
        assert torch.equal(x, torch.full_like(x, 2.0 if block is Counting else 1.0))
        outs.append(out)
    assert len(runs) == 5
    torch.testing.assert_close(outs[0], outs[2])
    torch.testing.assert_close(outs[1], outs[4])


def test_nothing_is_compiled_for_what_is_only_expected(late: bool, runs: list[Told]):
    model = torch.compile(Block(), backend="rainfusion", options=OPTIONS)
    x, (cos, sin) = torch.randn(1, 240, 48), rotary(GRIDS[0])
    call(model, x, cos, sin)
    call(model, x, cos, sin)
    with rainfusion_compile.video_layout((3, 8, 10)):  # was never heard together with these tables
        runs.clear()
        cos.copy_(rotary(GRIDS[1])[0])
        sin.copy_(rotary(GRIDS[1])[1])
        assert call(model, x, cos, sin)[1] == {None}
    assert len(runs) == 1


# --- the predictor ---------------------------------------------------------------------------------------------------

A, B = torch.zeros(3), torch.ones(3)
WRONG, RIGHT = Told(grid=(1, 2, 3)), NOTHING


def heard(*, right: bool) -> Heard:
    return Heard({"x": (A, A if right else B)}, lambda true: WRONG if true else RIGHT)


def refusing(told: Told, error: type[Exception] = ValueError) -> Callable[[Told], Callable[[], list[Told]]]:
    def start(known: Told) -> Callable[[], list[Told]]:
        if known == told:
            raise error(f"refused {known}")
        return lambda: [known]

    return start


def test_what_a_wrong_run_raises_is_not_seen(late: bool):
    assert Predictor(allowed=True)(heard(right=False), lambda _: True, refusing(WRONG)) == [RIGHT]
    for right, told in ((True, WRONG), (False, RIGHT)):
        with pytest.raises(ValueError, match="refused"):
            Predictor(allowed=True)(heard(right=right), lambda _: True, refusing(told))
    if late:
        with pytest.raises(KeyboardInterrupt):
            Predictor(allowed=True)(heard(right=False), lambda _: True, refusing(WRONG, KeyboardInterrupt))  # type: ignore[arg-type]


def test_only_what_is_right_is_finished_and_a_wrong_run_is_dropped_first():
    runs: list[Any] = []
    alive: list[int] = []

    class Run:
        def __init__(self, known: Told) -> None:
            self.known = known
            alive.append(1)
            assert len(alive) == 1

        def __del__(self) -> None:
            alive.pop()

        def __call__(self) -> list[Told]:
            runs.append(self.known)
            return [self.known]

    for seen in (True, False):
        assert Predictor(allowed=True)(heard(right=False), lambda _: seen, Run) == [RIGHT]  # noqa: B023
    assert runs == [RIGHT, RIGHT]


def test_after_a_wrong_run_calls_wait_until_one_would_have_been_right(late: bool):
    started: list[Told] = []

    def start(known: Told) -> Callable[[], list[Told]]:
        started.append(known)
        return lambda: [known]

    predictor = Predictor(allowed=True)
    counts = []
    for right in (True, False, False, False, True, True, False):
        started.clear()
        assert predictor(heard(right=right), lambda _: True, start) == [WRONG if right else RIGHT]
        counts.append(len(started))
    assert counts == ([1, 2, 1, 1, 1, 1, 2] if late else [1] * 7)


@pytest.mark.parametrize("known", [False, True])
def test_where_nothing_is_said_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, known: bool):
    monkeypatch.setattr(
        outside_knowledge, "Agreement", lambda pairs: Agreement(pairs) if not pairs else pytest.fail("asked")
    )
    told = Told(grid=(1, 2, 3)) if known else NOTHING
    assert Heard({}, lambda _: told).wait() == told
    assert not Heard({}, lambda _: told).late


# --- graphs that may be run for nothing ------------------------------------------------------------------------------


@torch.library.custom_op("rainfusion_tests::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    return x.clone()


counted.register_fake(torch.empty_like)


def body(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:1] = x[:1].float().to(x.dtype)
    return F.dropout(y.relu_(), 0.1, training=False) + F.dropout(x, 0.0)


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu"):
        return x @ x


BUFFER = torch.zeros(4)
FUNCTIONS: dict[str, tuple[bool, Callable[[Tensor], Any]]] = {
    "writes into its own": (True, body),
    "autocast": (True, autocast),
    "attention": (True, lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])),
    "dense attention by aten": (True, lambda x: torch.ops.aten.scaled_dot_product_attention(x[None], x[None], x[None])),
    "module": (True, nn.Dropout(0.5).eval()),
    "input": (False, lambda x: x.mul_(2)),
    "view of an input": (False, lambda x: x.view(-1)[1:].add_(1)),
    "detached": (False, lambda x: x.detach().copy_(x + 1)),
    "out": (False, lambda x: torch.add(x, 1, out=x)),
    "setitem": (False, lambda x: x.T.__setitem__(0, 1.0)),
    "buffer": (False, lambda x: BUFFER.add_(x.sum())),
    "dropout": (False, lambda x: F.dropout(x, 0.1)),
    "dropout by aten": (False, lambda x: torch.dropout(x, 0.1, True)),
    "attention with dropout": (False, lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], None, 0.5)),
    "noise": (False, lambda x: x + torch.randn(4, 4)),
    "noise of a method": (False, lambda x: torch.empty(4).normal_() + x),
    "bernoulli": (False, lambda x: torch.bernoulli(x.sigmoid())),
    "gumbel": (False, lambda x: F.gumbel_softmax(x)),
    "custom operator": (False, torch.ops.rainfusion_tests.counted),
    "checkpoint": (False, lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)),
}


@pytest.mark.parametrize(("may", "function"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_which_graphs_may_be_run_for_nothing(may: bool, function: Callable[[Tensor], Any]):
    answers = []

    def backend(gm: torch.fx.GraphModule, _: list[Any]) -> Any:
        answers.append(repeatable(gm.graph))
        return gm

    with torch.no_grad():
        torch.compile(lambda x: function(x), backend=backend)(torch.randn(4, 4))
    assert answers == [may]


def test_collectives_are_not_called_for_nothing():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.zeros(4)
    reduced = graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0"))
    graph.output((reduced,))
    assert not repeatable(graph)


def test_attach_is_of_what_was_heard(late: bool):
    """A note on an input that a graph was given does not reach its outputs when it is found untrue after the run."""
    settings = {"backend": "rainfusion", "options": OPTIONS}
    dims = (None, CarriedDim(GRIDS[0], (0, 0), 0), None)
    double = torch.compile(lambda x: x * 2, **settings)
    for changed in (False, False, True, False, False, True):
        x = torch.randn(1, math.prod(GRIDS[0]), 48)
        attach([x], (dims,), ())
        if changed:
            x.data.mul_(2)
        with torch.no_grad():
            out = double(x)
        assert known_grids(out) == (set() if changed else {GRIDS[0]})
        assert ("_rainfusion_note" in vars(x)) != changed
