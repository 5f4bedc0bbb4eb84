# SPDX-License-Identifier: Apache-2.0
"""Noise levels over graph breaks: every graph is dense at those it is asked to be, and where none is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

import rainfusion_compile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID = (4, 6, 10)
OPTIONS: dict[str, Any] = {"min_tokens": 0, "sparsity": 0.6, "error": 1.0, "dense_steps": 0.25}
LEVELS = (1.0, 1.0, 0.8, 0.76, 0.74, 0.5, 0.0, 0.999, 0.1, 0.6, 0.3)  # two generations, the second begins late
WIDTH = 32


class Block(nn.Module):
    """Modulated by what is made of the timestep, as adaptive norms do it."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.qkv, self.out = (nn.Linear(WIDTH, WIDTH * many) for many in (2, 3, 1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        qkv = self.qkv(F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift)
        q, k, v = qkv.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Broken(nn.Module):
    """Breaks between embeddings and blocks and between blocks, where something may happen to the condition."""

    def __init__(self, between: Callable[[Tensor], Tensor] | None = None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.between = between
        self.patch = nn.Conv3d(4, WIDTH, 1)
        self.timesteps = Timesteps(16, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time, self.words = TimestepEmbedding(16, WIDTH), nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.eval()

    def forward(self, video: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        condition = self.time(self.timesteps(timestep)) + self.words(words)
        torch._dynamo.graph_break()
        if self.between is not None:
            condition = outside(self.between, condition)
        x = self.blocks[0](x, condition)
        torch._dynamo.graph_break()
        return self.blocks[1](x, condition)


@torch._dynamo.disable
def outside(change: Callable[[Tensor], Tensor], condition: Tensor) -> Tensor:
    return change(condition)


def inputs(*levels: float, grid: tuple[int, int, int] = GRID) -> tuple[Tensor, Tensor, Tensor]:
    batch = len(levels)
    return torch.randn(batch, 4, *grid), torch.tensor(levels) * 1000, torch.randn(batch, 8)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="rainfusion", options={**OPTIONS, **options})


def dense(model: Any, *args: Tensor) -> list[list[bool]]:
    """Of each attention and each sample, whether all heads were dense."""
    with torch.no_grad(), rainfusion_compile.observe() as report:
        model(*args)
    entries = [entry for entry in report.to_dict()["attentions"] if entry["status"] == "sparse"]
    kinds = [[{head == "dense" for head in sample} for sample in entry["patterns"]] for entry in entries]
    assert sum(entry["calls"] for entry in entries) == 2
    assert all(len(heads) == 1 for entry in kinds for heads in entry), "some heads are dense, some are not"
    return [[heads == {True} for heads in entry] for entry in kinds]


def same(samples: list[bool]) -> list[list[bool]]:
    return [samples, samples]


def test_the_noisy_part_of_the_schedule_is_dense_in_every_graph(compiled_count, caplog):
    """Guidance by two calls at each step."""
    model = compiled(Broken())
    for level in LEVELS:
        for _ in range(2):
            assert dense(model, *inputs(level)) == same([level >= 0.75]), level
    assert compiled_count == [False, True, True]
    assert "dense_steps" not in caplog.text


def test_the_clean_part_too():
    model = compiled(Broken(), dense_steps=(0.1, 0.2))
    for level, is_dense in ((1, True), (0.91, True), (0.89, False), (0.21, False), (0.19, True), (0.0, True)):
        assert dense(model, *inputs(level)) == same([is_dense]), level


def all_alike(levels: Sequence[float]) -> list[bool]:
    """Which samples are dense: all of them, where their levels differ."""
    return [len({*levels}) > 1 or level > 0.75 for level in levels]


def test_samples_of_a_batch_have_one_level_or_are_dense(compiled_count):
    model = compiled(Broken())
    for levels in ((0.9, 0.9), (0.2, 0.2), (0.2, 0.9), (0.9, 0.2)):
        assert dense(model, *inputs(*levels)) == same(all_alike(levels))
    assert len(compiled_count) == 3


def test_one_timestep_for_a_batch():
    model = compiled(Broken())
    for level in (0.9, 0.2):
        video, _, words = inputs(level, level, level)
        assert dense(model, video, torch.tensor([1000 * level]), words[:1]) == same([level > 0.75] * 3)


@pytest.mark.parametrize("dynamic", [True, None])
def test_graphs_of_many_sizes(dynamic):
    model = torch.compile(Broken(), backend="rainfusion", dynamic=dynamic, options=OPTIONS)
    for batch, grid in ((2, GRID), (3, GRID), (2, (5, 6, 8)), (1, GRID), (1, (7, 5, 6))):
        for levels in ([0.9] * batch, [0.2] * batch, [0.2] * (batch - 1) + [0.9]):
            assert dense(model, *inputs(*levels, grid=grid)) == same(all_alike(levels))


def test_numbers_change_without_compiling(compiled_count):
    model = compiled(Broken())
    for steps, level, is_dense in (
        (0.25, 0.9, True), (0.05, 0.9, False), (0.5, 0.6, True), (0, 0.9, False), (1, 0.1, True), (0.5, 0.4, False),
    ):  # fmt: skip
        with rainfusion_compile.changed_options(dense_steps=steps):
            assert dense(model, *inputs(level)) == same([is_dense]), (steps, level)
    assert len(compiled_count) == 3


def test_without_dense_steps_nothing_is_added(compiled_count, caplog):
    model = compiled(Broken(), dense_steps=0.0)
    assert dense(model, *inputs(0.9)) == same([False])
    with rainfusion_compile.changed_options(dense_steps=0.5):  # no graph passes it on
        assert dense(model, *inputs(0.1)) == same([True])
    assert "does not show which input is the timestep" in caplog.text
    assert len(compiled_count) == 3


def unseen(condition: Tensor) -> Tensor:
    condition.data.add_(1)
    return condition


def part(condition: Tensor) -> Tensor:
    condition[:, :1].neg_()
    return condition


KEEP: dict[str, Callable[[Tensor], Tensor]] = {
    "the same tensor": lambda condition: condition,
    "a view": lambda condition: condition[None].squeeze(0),
    "other memory of it": lambda condition: condition.view(-1, 2, WIDTH // 2).flatten(1),
    "written back": lambda condition: condition.mul_(2).mul_(0.5),
}
LOSE: dict[str, Callable[[Tensor], Tensor]] = {
    "written into": lambda condition: condition.add_(1),
    "written into unseen": unseen,
    "a part written into": part,
    "another tensor": lambda condition: condition + 1,
    "a copy": lambda condition: condition.clone(),
}


@pytest.mark.parametrize("between", KEEP.values(), ids=KEEP)
def test_views_have_the_level(between):
    model = compiled(Broken(between))
    for level in (0.9, 0.2, 0.6):
        assert dense(model, *inputs(level)) == same([level > 0.75])


@pytest.mark.parametrize("between", LOSE.values(), ids=LOSE)
def test_what_has_other_contents_has_none(between):
    """So attention is dense; written back, it is known again."""
    model = compiled(Broken(between))
    for level in (0.9, 0.2, 0.6):
        assert dense(model, *inputs(level)) == same([True])


def test_what_is_not_known_is_told(caplog):
    model = compiled(Broken(torch.clone))
    assert dense(model, *inputs(0.2)) == same([True])
    assert caplog.text.count("does not show which input is the timestep") == 1
    assert "dense_first_steps" in caplog.text


def test_strict_is_an_error():
    model = compiled(Broken(torch.clone), strict=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="strict=True, but dense_steps"):
        model(*inputs(0.2))


class Cached(nn.Module):
    """A step cache that hands hidden states, or the condition, of an earlier step to the second block."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.model, self.what, self.kept = Broken(), what, dict[str, Tensor]()

    def forward(self, video: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
        model = self.model
        x = model.patch(video).flatten(2).transpose(1, 2)
        condition = model.time(model.timesteps(timestep)) + model.words(words)
        torch._dynamo.graph_break()
        x = model.blocks[0](x, condition)
        torch._dynamo.graph_break()
        if self.what == "hidden states":
            return model.blocks[1](self.of_before("x", x), condition)
        if self.what == "a condition beside":
            before = self.of_before("condition", condition)
            return model.blocks[1](x, condition) + before[:, None]
        return model.blocks[1](x, self.of_before("condition", condition))

    @torch._dynamo.disable
    def of_before(self, name: str, now: Tensor) -> Tensor:
        before = self.kept.get(name, now)
        self.kept[name] = now
        return before


def test_old_hidden_states_bring_no_old_level():
    model, clip = compiled(Cached("hidden states")), inputs(0.0)
    for level in (0.9, 0.6, 0.9, 0.2):
        assert dense(model, clip[0], torch.tensor([1000 * level]), clip[2]) == same([level > 0.75])


def test_conditions_of_two_levels_are_of_none():
    model, clip, before = compiled(Cached("a condition beside")), inputs(0.0), None
    for level in (0.9, 0.6, 0.6, 0.2, 0.2):
        unknown = before not in (level, None)
        first, second = dense(model, clip[0], torch.tensor([1000 * level]), clip[2])
        assert (first, second) == ([level > 0.75], [level > 0.75 or unknown])
        before = level


def test_a_condition_of_before_is_what_attention_is_made_under():
    model, clip, before = compiled(Cached("condition")), inputs(0.0), 0.9
    for level in (0.9, 0.6, 0.9, 0.2):
        first, second = dense(model, clip[0], torch.tensor([1000 * level]), clip[2])
        assert (first, second) == ([level > 0.75], [before > 0.75])
        before = level


def test_two_models_interleaved(compiled_count):
    """Steps of one between steps of the other, and the blocks of one between those of the other."""
    one, two = Broken(seed=0), Broken(seed=1)
    first, second = compiled(one), compiled(two)
    for level, other in ((0.9, 0.1), (0.1, 0.9), (0.8, 0.8), (0.3, 0.2)):
        assert dense(first, *inputs(level)) == same([level > 0.75])
        assert dense(second, *inputs(other)) == same([other > 0.75])
    assert len(compiled_count) == 3

    states = {}
    embed, attend = compiled(Embed(one)), compiled(one.blocks[1], grid=GRID)
    with torch.no_grad():
        for level in (0.9, 0.2):
            states[level] = embed(*inputs(level))
        for level, state in states.items():
            with rainfusion_compile.observe() as report:
                attend(*state)
            (entry,) = report.to_dict()["attentions"]
            assert {head == "dense" for head in entry["patterns"][0]} == {level > 0.75}


class Embed(nn.Module):
    def __init__(self, model: Broken) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor, timestep: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        x = model.patch(video).flatten(2).transpose(1, 2)
        return x, model.time(model.timesteps(timestep)) + model.words(words)


class PassedOn(Broken):
    """A graph between makes another condition of the first, and of a vector; not of the video."""

    def __init__(self, of_video: bool) -> None:
        super().__init__()
        self.more, self.of_video = nn.Linear(WIDTH, WIDTH), of_video

    def forward(self, video: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        condition = self.time(self.timesteps(timestep))
        torch._dynamo.graph_break()
        condition = self.more(F.silu(condition)) + self.words(words)
        if self.of_video:
            condition = condition + x.mean(1)
        torch._dynamo.graph_break()
        x = self.blocks[0](x, condition)
        torch._dynamo.graph_break()
        return self.blocks[1](x, condition)


def test_a_graph_between_passes_it_on():
    model = compiled(PassedOn(False))
    for level in (0.9, 0.2, 0.6):
        assert dense(model, *inputs(level)) == same([level > 0.75])


def test_what_is_made_of_the_video_has_none():
    model = compiled(PassedOn(True))
    for level in (0.9, 0.2):
        assert dense(model, *inputs(level)) == same([True])


class Seconded(Broken):
    """With another vector of the same shape, of which nothing is known: it may be the real condition."""

    def forward(self, video: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        condition = self.time(self.timesteps(timestep))
        torch._dynamo.graph_break()
        other = outside(torch.ones_like, condition)
        x = self.blocks[0](x, condition)
        torch._dynamo.graph_break()
        return self.blocks[1](x, condition + other)


def test_beside_another_that_looks_alike_it_is_not_believed():
    model = compiled(Seconded())
    for level in (0.9, 0.2):
        first, second = dense(model, *inputs(level))
        assert (first, second) == ([level > 0.75], [True])


def test_a_timestep_for_each_frame():
    """The highest counts."""
    model = compiled(PerFrame())
    for levels in ((0.9, 0.1, 0.1), (0.1, 0.1, 0.1), (0.1, 0.1, 0.9)):
        video, _, words = inputs(0.0)
        assert dense(model, video, torch.tensor([levels]) * 1000, words) == same([max(levels) > 0.75])


class PerFrame(Broken):
    def forward(self, video: Tensor, timestep: Tensor, words: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        condition = self.time(self.timesteps(timestep.flatten())).unflatten(0, timestep.shape)
        torch._dynamo.graph_break()
        x = self.blocks[0](x, condition.mean(1))
        torch._dynamo.graph_break()
        return self.blocks[1](x, condition.mean(1))


def test_gradients_flow():
    eager, model = Broken(), Broken()
    model.load_state_dict(eager.state_dict())
    fast = compiled(model, sparsity=0.0)
    args = inputs(0.2)
    for one in (eager, fast):
        one(*args).square().sum().backward()
    for one, other in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.inductor
def test_under_inductor():
    model = compiled(Broken())
    for levels in ((0.9, 0.2), (0.2, 0.2), (0.9, 0.9)):
        assert dense(model, *inputs(*levels)) == same(all_alike(levels))
