# SPDX-License-Identifier: Apache-2.0
"""Numbers that change from call to call, the denoising schedule above all: nothing is compiled anew for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from models import wan
from small_video import Block, Video
from torch import Tensor, nn

import rainfusion_compile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID = (8, 14, 15)
OPTIONS: dict[str, Any] = {"min_tokens": 0, "sparsity": 0.6, "error": 1.0}


class Timed(Video):
    """With a timestep, as Wan takes it: a number for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.timesteps, self.time = (
            Timesteps(16, flip_sin_to_cos=True, downscale_freq_shift=0),
            TimestepEmbedding(16, 64),
        )

    def forward(self, video: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        x = self.patch(video).flatten(2).transpose(1, 2) + self.time(self.timesteps(timestep))[:, None]
        for block in self.blocks:
            x = x + block(x)
        return x


def clip(batch: int = 1, grid: tuple[int, int, int] = GRID) -> Tensor:
    t, h, w = grid
    return torch.randn(batch, 3, t, 2 * h, 2 * w)


def at(*levels: float) -> Tensor:
    return torch.tensor(levels) * 1000


def call(model: Any, *args: Any) -> list[bool]:
    """Of each sample, whether all heads of all attentions were dense."""
    with torch.no_grad(), rainfusion_compile.observe() as report:
        model(*args)
    entries = [entry for entry in report.to_dict()["attentions"] if entry["status"] == "sparse"]
    assert len(entries) == 2
    kinds = [[{head == "dense" for head in sample} for sample in entry["patterns"]] for entry in entries]
    assert all(len(heads) == 1 for entry in kinds for heads in entry), "some heads are dense, some are not"
    assert kinds[0] == kinds[1]
    return [heads.pop() for heads in kinds[0]]


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return torch.compile(Timed().eval(), backend="rainfusion", fullgraph=True, options={**OPTIONS, **options})


@pytest.mark.parametrize("rule", [{"error": 1.0}, {"arm": "recall", "error": None, "min_recall": 0.0}])
def test_the_noisy_part_of_the_schedule_is_dense(rule, compiled_count):
    """One call for each guidance, two generations one after the other, the second begins late."""
    model, video = build(dense_steps=0.25, **rule), clip()
    for level in (1.0, 1.0, 0.8, 0.75, 0.74, 0.5, 0.0, 0.999, 0.1, 0.6, 0.3):
        assert call(model, video, at(level)) == [level >= 0.75], level
    assert len(compiled_count) == 1


def test_the_clean_part_too():
    model, video = build(dense_steps=(0.1, 0.2)), clip()
    assert [call(model, video, at(level))[0] for level in (1, 0.91, 0.89, 0.5, 0.21, 0.2, 0.1)] == [
        True, True, False, False, False, True, True,
    ]  # fmt: skip


def test_samples_of_a_batch_stand_for_themselves():
    """Guidance as a batch of two, and samples at noise levels of their own."""
    model, video = build(dense_steps=0.25), clip(2)
    assert call(model, video, at(0.9, 0.9)) == [True, True]
    assert call(model, video, at(0.2, 0.2)) == [False, False]
    assert call(model, video, at(0.2, 0.9)) == [False, True]


class InPlace(Timed):
    """What the angles are made into takes their memory."""

    def forward(self, video: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        angles = timestep[:, None] * torch.exp(-torch.arange(8))
        sine = torch.sin(angles)
        x = self.patch(video).flatten(2).transpose(1, 2)
        x = x + self.time(torch.cat([angles.cos_(), sine], 1))[:, None]
        for block in self.blocks:
            x = x + block(x)
        return x


def test_angles_that_are_written_over():
    model = torch.compile(InPlace().eval(), backend="rainfusion", options={**OPTIONS, "dense_steps": 0.25})
    for level in (0.9, 0.6):
        assert call(model, clip(), at(level)) == [level > 0.75]


def test_one_timestep_for_a_batch():
    model, video = build(dense_steps=0.25), clip(3)
    assert call(model, video, at(0.9)) == [True] * 3
    assert call(model, video, at(0.2)) == [False] * 3


def test_two_experts(compiled_count):
    """One model for noisy steps, another for the rest: both know the noise level."""
    noisy, clean, video = build(dense_steps=0.1), build(dense_steps=0.1), clip()
    steps = [(noisy, 1.0), (noisy, 0.92), (noisy, 0.88), (clean, 0.8), (clean, 0.1)]
    assert [call(expert, video, at(level))[0] for expert, level in steps] == [True, True, False, False, False]
    assert len(compiled_count) == 1  # of two models that differ in their weights alone


def test_graphs_of_many_sizes(compiled_count):
    torch.manual_seed(0)
    options = {**OPTIONS, "dense_steps": 0.25}
    model = torch.compile(Timed().eval(), backend="rainfusion", fullgraph=True, dynamic=True, options=options)
    for grid in (GRID, (9, 12, 16), (7, 15, 17)):
        for batch in (1, 2):
            for level in (0.8, 0.7):
                assert call(model, clip(batch, grid), at(*[level] * batch)) == [level > 0.75] * batch
    assert len(compiled_count) <= 2  # Dynamo makes one of a batch of one


def test_numbers_change_without_compiling(compiled_count):
    model, video = build(), clip()
    assert call(model, video, at(0.9)) == [False]
    with rainfusion_compile.changed_options(dense_steps=0.2):
        assert call(model, video, at(0.9)) == [True]
        with rainfusion_compile.changed_options(error=0.0):
            assert call(model, video, at(0.7)) == [True]
        with rainfusion_compile.changed_options(dense_steps=0):
            assert call(model, video, at(0.9)) == [False]
        assert call(model, video, at(0.7)) == [False]
    with rainfusion_compile.changed_options(error=0):
        assert call(model, video, at(0.9)) == [True]
    assert call(model, video, at(0.9)) == [False]
    assert len(compiled_count) == 1


def test_a_smaller_error_is_kept():
    model, video = build(), clip()
    with torch.no_grad(), rainfusion_compile.changed_options(error=0.03), rainfusion_compile.observe() as report:
        model(video, at(0.5))
    assert all(error <= 0.03 * 1.001 for entry in report.to_dict()["attentions"] for error in entry["layer_error"])


def test_recall_changes_too():
    model, video = build(arm="recall", error=None, min_recall=0.0), clip()
    assert call(model, video, at(0.5)) == [False]
    with rainfusion_compile.changed_options(min_recall=1.0):
        assert call(model, video, at(0.5)) == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"error": -1}, "error must be a number"),
        ({"dense_steps": 3}, "dense_steps must be"),
        ({"error": 0.1, "min_recall": 0.5}, "error belongs to arm='error'"),
    ],
)
def test_numbers_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message), rainfusion_compile.changed_options(**changes):
        pass


def test_numbers_of_another_rule_are_refused_in_the_call():
    model, video = build(), clip()
    call(model, video, at(0.5))
    with (
        torch.no_grad(),
        rainfusion_compile.changed_options(min_recall=0.5),
        pytest.raises(ValueError, match="min_recall belongs to arm='recall'"),
    ):
        model(video, at(0.5))


class Blocks(nn.Module):
    """Compiled block by block, as `compile_repeated_blocks` does: no graph shows the timestep."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(3, 64, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block(64, 2) for _ in range(2))
        for block in self.blocks:
            block.compile(backend="rainfusion", fullgraph=True, options={**OPTIONS, "grid": GRID, **options})

    def forward(self, video: Tensor, timestep: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return x


def dense_calls(model: Any, *args: Any) -> list[bool]:
    with torch.no_grad(), rainfusion_compile.observe() as report:
        model(*args)
    return [head == "dense" for entry in report.to_dict()["attentions"] for head in entry["patterns"][0]]


def test_a_callback_tells_blocks_the_step(compiled_count):
    model, video, pipe = Blocks(), clip(), SimpleNamespace(num_timesteps=5)
    with rainfusion_compile.dense_first_steps(2, last=1) as callback:
        for _ in range(2):  # generations
            for step in range(pipe.num_timesteps):
                dense = step in (0, 1, 4)
                assert set(dense_calls(model, video, at(1 - step / 5))) == {dense}, step
                tensors = {"latents": video}
                assert callback(pipe, step, at(0.5), tensors) is tensors
    assert set(dense_calls(model, video, at(1.0))) == {False}
    assert len(compiled_count) == 1  # both blocks run it


def test_blocks_by_themselves_have_no_numbers():
    model, video = Blocks(dense_layers=1), clip()
    with torch.no_grad(), pytest.raises(ValueError, match=r"dense_layers=\(0,\) cannot tell apart the blocks"):
        model(video, at(0.5))


def test_blocks_of_diffusers_have_no_numbers_at_any_size():
    """Where ``min_tokens`` is less than the channels, the first block hears something else, and has its own graph."""
    case = wan((3, 5, 7))
    case.model.compile_repeated_blocks(backend="rainfusion", options={"min_tokens": 0, "dense_layers": 1})
    with torch.no_grad(), pytest.raises(ValueError, match=r"dense_layers=\(0,\) cannot tell apart the blocks"):
        case.model(**case.inputs)


def test_two_models_of_one_graph_have_numbers():
    for _ in range(2):
        model = torch.compile(Video().eval(), backend="rainfusion", options={**OPTIONS, "dense_layers": 1})
        with torch.no_grad(), rainfusion_compile.observe() as report:
            model(clip())
        assert [entry["status"] for entry in report.to_dict()["attentions"]] == ["dense", "sparse"]


class Broken(Video):
    def forward(self, video: Tensor) -> Tensor:  # type: ignore[override]
        x = self.patch(video).flatten(2).transpose(1, 2)
        x = x + self.blocks[0](x)
        torch._dynamo.graph_break()
        return x + self.blocks[1](x)


class BrokenLoop(Video):
    """Dynamo leaves such a loop to Python, and compiles the blocks by themselves."""

    def forward(self, video: Tensor) -> Tensor:  # type: ignore[override]
        x = self.patch(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
            torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize(
    ("kind", "message"), [(Broken, "breaks into several"), (BrokenLoop, "cannot tell apart the blocks")]
)
def test_a_model_in_pieces_has_no_numbers(kind, message):
    options = {**OPTIONS, "grid": GRID, "dense_layers": 1}
    model = torch.compile(kind().eval(), backend="rainfusion", options=options)
    with torch.no_grad(), pytest.raises((ValueError, torch._dynamo.exc.BackendCompilerFailed), match=message):
        model(clip())


@pytest.mark.parametrize("first", [-1, 0.1, True])
def test_steps_that_are_no_count(first):
    with (
        pytest.raises(ValueError, match="first must be an integer of at least 0"),
        rainfusion_compile.dense_first_steps(first),
    ):
        pass


def test_what_cannot_see_the_step_stays_dense_and_says_so(caplog):
    model, video = Blocks(dense_steps=0.3), clip()
    assert set(dense_calls(model, video, at(0.1))) == {True}
    assert "does not show which input is the timestep" in caplog.text
    assert "dense_first_steps" in caplog.text
    with rainfusion_compile.changed_options(dense_steps=0):
        assert set(dense_calls(model, video, at(0.1))) == {False}
