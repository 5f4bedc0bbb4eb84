# SPDX-License-Identifier: Apache-2.0
"""Notes of noise levels on tensors, outside all models: what takes and gives them lets no host wait."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rainfusion_compile.options import Options
from rainfusion_compile.passes.rewrite.level_flow import LevelFlow, LevelInput
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
    taken = tuple(LevelInput(torch.device("cpu"), size) for size in (2, 1, 3))
    embeds = Levels(LevelFlow(timestep=0, made_of=((0, (0,)), (1, (0, 1)))), limits)
    attends = Levels(LevelFlow(takes=taken, made_of=((0, (0, 1)),)), limits)
    times, words = torch.tensor([900.0, 200.0]), torch.randn(2, 8)
    made = torch.randn(2, 16), torch.randn(2, 6, 16), times / 1000
    with Operators() as ran:
        assert len(embeds.tell((times, words), embeds.heard((times, words)), made)) == 2
        args = made[0], made[1].view(2, -1)[:, :16], torch.randn(2, 60, 16)
        heard = attends.heard(args)
        found = attends.inputs(args, heard)
        attends.tell(args, heard, (torch.randn(2, 16),))
    assert not {"_local_scalar_dense.default", "is_nonzero.default", "nonzero.default"} & {*ran.names}
    for level, expected in zip(found, ([0.9, 0.2], [0.9], [0.9] * 3), strict=True):
        torch.testing.assert_close(level, torch.tensor(expected))
