# SPDX-License-Identifier: Apache-2.0
"""Notes of noise levels on tensors, outside all models: what takes and gives them lets no host wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rainfusion_compile.options import Options
from rainfusion_compile.passes.rewrite.level_flow import LevelFlow, is_condition
from rainfusion_compile.passes.rewrite.notices import Notices
from rainfusion_compile.runtime.changed_options import Limits
from rainfusion_compile.runtime.levels import Levels


class Operators(TorchDispatchMode):
    """Which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_a_device():
    limits = Limits(Options(dense_steps=0.25), [], True, Notices())
    taken = (torch.device("cpu"),)
    embeds = Levels(LevelFlow(timestep=0, made_of=((0, (0,)), (1, (0, 1)))), limits)
    attends = Levels(LevelFlow(takes=taken, made_of=((0, (0, 1)),)), limits)
    times, words = torch.tensor([900.0, 900.0]), torch.randn(2, 8)
    made = torch.randn(2, 16), torch.randn(2, 6, 16), times / 1000
    with Operators() as ran:
        assert len(embeds.tell((times, words), embeds.heard((times, words)), made)) == 2
        args = made[0], made[1].view(2, -1)[:, :16], torch.randn(2, 60, 16)
        heard = attends.heard(args)
        found = attends.inputs(args, heard)
        attends.tell(args, heard, (torch.randn(2, 16),))
    assert not {"_local_scalar_dense.default", "is_nonzero.default", "nonzero.default"} & {*ran.names}
    (level,) = found
    torch.testing.assert_close(level, torch.tensor([0.9]))


def heard_of(output: torch.Tensor, levels: list[float] | None = None, *beside: torch.Tensor) -> list[torch.Tensor]:
    """What a graph takes that is handed an output of one that embeds the timestep, and others."""
    limits = Limits(Options(dense_steps=0.25), [], True, Notices())
    embeds = Levels(LevelFlow(timestep=0, made_of=((0, (0,)),)), limits)
    times = torch.tensor(levels or [0.2])
    embeds.tell((times,), {}, (output, times))
    attends = Levels(LevelFlow(takes=(torch.device("cpu"),)), limits)
    args = (output, *beside)
    return attends.inputs(args, attends.heard(args))


def test_what_else_may_be_a_condition_of_this_step_makes_it_doubtful():
    condition, tokens = torch.randn(2, 16), torch.randn(2, 60, 16)
    assert float(heard_of(condition, None, tokens, torch.randn(60, 8))[0]) == pytest.approx(0.2)
    for doubtful in (torch.randn(2, 16), torch.randn(2, 32), torch.randn(1, 48), torch.randn(2, 6, 16)):
        assert heard_of(condition.clone(), None, tokens, doubtful)[0].isnan().all(), doubtful.shape


def test_levels_that_differ_within_a_call_are_none():
    assert heard_of(torch.randn(2, 16), [0.2, 0.9])[0].isnan().all()
    assert float(heard_of(torch.randn(2, 16), [0.2, 0.2])[0]) == pytest.approx(0.2)


def test_what_is_large_or_quantized_carries_none():
    assert heard_of(torch.randn(2, 1 << 20))[0].isnan().all()
    quantized = torch.quantize_per_tensor(torch.randn(2, 16), 0.1, 0, torch.qint8)
    assert heard_of(quantized)[0].isnan().all()


def test_tokens_with_a_time_each_are_no_samples():
    times, tokens = torch.zeros(240), torch.randn(240, 16)
    assert not is_condition((0, 1), (0,), (times, tokens))
    assert is_condition((0, 1), (0,), (times[:2], tokens[:2]))
