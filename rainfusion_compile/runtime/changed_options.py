# SPDX-License-Identifier: Apache-2.0
"""Options that may change from call to call: what the ARM chooses by, and which steps stay dense.

They are numbers on the device, inputs of every rewritten graph, so that nothing is compiled anew for others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rainfusion_compile.options import DENSE, Options, constant
from rainfusion_compile.passes.rewrite.notices import Notices

Changes = tuple[tuple[str, Any], ...]

_changes: ContextVar[Changes] = ContextVar("rainfusion_changes", default=())


@contextmanager
def changed_options(
    *,
    error: float | None = None,
    recall_target: float | None = None,
    min_recall: float | None = None,
    dense_steps: float | tuple[float, float] | None = None,
) -> Iterator[None]:
    """Other numbers for the calls in this context, in this thread, than the options they were compiled with.

    Nothing is compiled anew. Those that are None stay as they are. ``dense_steps=1`` keeps all calls dense. See
    :class:`rainfusion_compile.Options`.

    Raises:
        ValueError: on a number that cannot be; and in a call, if the model was compiled with another ``arm``.
    """
    given = {"error": error, "recall_target": recall_target, "min_recall": min_recall, "dense_steps": dense_steps}
    given = {name: value for name, value in given.items() if value is not None}
    Options(arm="recall" if {"recall_target", "min_recall"} & {*given} else "error", **given)  # type: ignore[arg-type]
    token = _changes.set(_with(given))
    try:
        yield
    finally:
        _changes.reset(token)


@contextmanager
def dense_first_steps(first: int, last: int = 0) -> Iterator[Callable[..., dict[str, Any]]]:
    """Keep attention dense in the first steps of each generation, and in the last, for a pipeline of diffusers.

    Works however the model is compiled, by blocks too, and with any schedule. Example::

        with rainfusion_compile.dense_first_steps(4) as callback:
            video = pipe(prompt, callback_on_step_end=callback).frames[0]

    Args:
        first, last: how many steps, of those that the pipeline makes.

    Raises:
        ValueError: on a number that cannot be.
    """
    for name, count in (("first", first), ("last", last)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} must be an integer of at least 0; got {count!r}")

    def tell(step: int, steps: int | None) -> None:
        dense = step < first or (steps is not None and step >= steps - last)
        _changes.set(_with({"dense_steps": 1.0 if dense else 0.0}))

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps = pipe.num_timesteps
        tell((step + 1) % steps, steps)  # after the last, another generation may begin
        return tensors

    token = _changes.set(_changes.get())
    tell(0, None)
    try:
        yield callback
    finally:
        _changes.reset(token)


def _with(changes: dict[str, Any]) -> Changes:
    return tuple((dict(_changes.get()) | changes).items())


class Limits:
    """The limits of one graph, as tensors on the devices that it attends on; see :class:`Writer`."""

    def __init__(self, options: Options, devices: Sequence[torch.device], shows_level: bool, tell: Notices) -> None:
        self.options, self.devices, self.shows_level, self.tell = options, devices, shows_level, tell
        self._under = lru_cache(64)(self._make)
        self._steps_under = lru_cache(64)(self._steps)

    def now(self) -> list[Tensor]:
        """Those of a call in this context. Raises ValueError for changes that the graph's options contradict."""
        return self._under(_changes.get()) if self.devices else []

    def ask_level(self) -> bool:
        """Whether noise levels make a difference to a call in this context."""
        steps = self._steps_under(_changes.get())
        return steps != (0.0, 0.0) and 1.0 not in steps

    def miss_level(self) -> None:
        """Tell that attention stays dense for want of a noise level. Raises RuntimeError if that must not be."""
        steps = self._steps_under(_changes.get())
        message = (
            f"dense_steps={steps}: this graph does not show which input is the timestep, so its attention stays dense "
            "at every step; tell the steps with rainfusion_compile.dense_first_steps, or by "
            "changed_options(dense_steps=1 or 0) around each call"
        )
        if self.options.strict:
            raise RuntimeError(f"strict=True, but {message}")
        self.tell(message)

    def _steps(self, changes: Changes) -> tuple[float, float]:
        steps: Any = dict(changes).get("dense_steps", self.options.dense_steps)
        steps = replace(self.options, dense_steps=steps).dense_steps
        assert isinstance(steps, tuple)
        return steps

    def _make(self, changes: Changes) -> list[Tensor]:
        options = replace(self.options, **dict(changes))
        if not self.shows_level and options.dense_steps != (0.0, 0.0):
            if self.ask_level():
                self.miss_level()
            return [constant((DENSE, options.dense_levels, DENSE), device) for device in self.devices]
        return list(map(options.all_limits, self.devices))
