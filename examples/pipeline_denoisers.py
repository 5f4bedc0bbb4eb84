# SPDX-License-Identifier: Apache-2.0
"""The denoisers of a diffusers pipeline, each compiled dense and sparse, and the time that their calls take."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

KINDS = ("dense", "sparse")


def find_denoisers(pipe: Any, wanted: Sequence[str] | None = None) -> list[str]:
    """The names of the pipeline's denoisers: those wanted, else all modules whose name starts with "transformer".

    Raises:
        ValueError: if there is none, or what is wanted is no module of the pipeline.
    """
    modules = [name for name, component in pipe.components.items() if isinstance(component, nn.Module)]
    found = list(wanted or (name for name in modules if name.startswith("transformer")))
    for name in found:
        if name not in modules:
            raise ValueError(f"--components: {name!r} is no module of {type(pipe).__name__}; it has {modules}")
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no transformer; name its denoisers by --components: {modules}")
    return found


def compiling(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `torch.compile` is told for each kind. What `options` say of Inductor goes for dense too, to be fair."""
    mode = options.get("inductor_mode")
    inductor = {**(torch._inductor.list_mode_options(mode) if mode else {}), **options.get("inductor", {})}
    dense: dict[str, Any] = {"backend": "inductor", "options": inductor or None}
    return {"dense": dense, "sparse": {"backend": "rainfusion", "options": dict(options)}}


class Denoisers:
    """Takes the place of the `forward` of every denoiser, so that pipelines, hooks and offloading find them as before.

    Raises ValueError where repeated `blocks` are to be compiled and the model has none.

    A step ends with :meth:`end_step`, which is a `callback_on_step_end`; if `every_call`, with each call of a denoiser.

    Attributes:
        steps: of the latest run of each kind, the seconds that the denoisers took in each step.
        first: likewise, of all runs, for steps in which a denoiser was called for the first time, and compiled.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        options: Mapping[str, Any],
        device: torch.device,
        *,
        blocks: bool = False,
        every_call: bool = False,
    ) -> None:
        self.device, self.every_call = device, every_call
        self.kind = ""
        self.steps: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.first: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self._known: set[tuple[str, nn.Module]] = set()
        self._seconds, self._compiled = 0.0, False  # of the step that is running
        for module in modules:
            self._replace(module, compiling(options), blocks)

    @contextmanager
    def running(self, kind: str) -> Iterator[None]:
        """The denoisers are of this kind while the context is open."""
        self.kind, self.steps[kind] = kind, []
        self._seconds, self._compiled = 0.0, False
        yield

    def end_step(self, pipe: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Note the seconds of a step, first ones apart; `tensors` as they are."""
        if self._seconds:  # not where another model made the step
            (self.first if self._compiled else self.steps)[self.kind].append(self._seconds)
        self._seconds, self._compiled = 0.0, False
        return tensors

    def _replace(self, module: Any, ways: Mapping[str, Mapping[str, Any]], blocks: bool) -> None:
        eager = module.forward
        calls: dict[str, Callable[..., Any]] = dict.fromkeys(KINDS, eager)
        compiled: dict[str, dict[nn.Module, Any]] = {kind: {} for kind in KINDS}
        for kind, how in ways.items():
            if not blocks:
                calls[kind] = torch.compile(eager, **how)
                continue
            if not hasattr(module, "compile_repeated_blocks"):
                raise ValueError(f"--blocks: {type(module).__name__} does not tell which of its blocks repeat")
            module.compile_repeated_blocks(**how)  # leaves in each block what runs in its stead
            compiled[kind] = {block: block._compiled_call_impl for block in module.modules() if _is_compiled(block)}

        @functools.wraps(eager)  # pipelines look at the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            for block, call in compiled[self.kind].items():
                block._compiled_call_impl = call
            self._compiled |= (self.kind, module) not in self._known
            self._known.add((self.kind, module))
            start = self._now()
            output = calls[self.kind](*args, **kwargs)
            self._seconds += self._now() - start
            if self.every_call:
                self.end_step(None, 0, None, {})
            return output

        module.forward = forward

    def _now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None
