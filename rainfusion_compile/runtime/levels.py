# SPDX-License-Identifier: Apache-2.0
"""Noise levels that pass from one graph of a broken model to the next, with the conditions made of the timestep.

A tensor carries its level as an attribute, as it carries what is known of its tokens (`carry`), and it is gone with the
tensor. Nothing here waits for a device: whether the tensor still holds what it held is part of what the device
computes, and a level of which that is not so is a NaN, with which attention is dense.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rainfusion_compile.options import constant
from rainfusion_compile.passes.rewrite.level_flow import LevelFlow, LevelInput, is_condition
from rainfusion_compile.runtime.changed_options import Limits
from rainfusion_compile.runtime.contents import capturing, fingerprint

_NAME = "_rainfusion_level"
_NONE = 0.5  # a level that makes no difference where none is asked for

HeardLevels = dict[int, Tensor]
"""By number of an input, the noise levels of the samples that it is a condition of, float32 ``[n]``."""


@dataclass(frozen=True)
class _Note:
    """The level that a tensor is made of while it is in some `state` and its `contents` have this fingerprint."""

    level: Tensor
    state: tuple[Any, ...]
    contents: Tensor

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return collections.OrderedDict, ()  # as of the notes that `carry` makes


class Levels:
    """What the inputs of one graph's calls tell of their noise level, and its outputs are to tell."""

    def __init__(self, flow: LevelFlow, limits: Limits) -> None:
        self.flow, self.limits = flow, limits
        self.hears = bool(flow.takes or flow.made_of)

    def heard(self, args: Sequence[Any]) -> HeardLevels:
        """What a call's inputs tell; nothing where nobody asks, or while a CUDA graph is recorded."""
        if not self.hears or capturing() or not self.limits.ask_level():
            return {}
        noted = {number: found for number, arg in enumerate(args) if type(arg) is Tensor and (found := _noted(arg))}
        if noted and not self.flow.takes:
            conditions = (sources for _, sources in self.flow.made_of if is_condition(sources, noted.keys(), args))
            wanted = {number for sources in conditions for number in sources}
            noted = {number: found for number, found in noted.items() if number in wanted}
        return {number: _level(*found) for number, found in noted.items()}

    def inputs(self, args: Sequence[Any], heard: HeardLevels) -> list[Tensor]:
        """What the graph takes besides."""
        if not self.flow.takes:
            return []
        if not self.limits.ask_level():
            return [_sized(constant(((_NONE,),), taken.device)[0], taken, args) for taken in self.flow.takes]
        level = None if _doubtful(args, heard) else _agreed(heard)
        if level is None and not any(isinstance(arg, FakeTensor) for arg in args):
            self.limits.miss_level()
        return [
            _sized(constant(((math.nan,),), taken.device)[0] if level is None else level, taken, args)
            for taken in self.flow.takes
        ]

    def tell(self, args: Sequence[Any], heard: HeardLevels, outputs: Sequence[Any]) -> Sequence[Any]:
        """Let the outputs of a call carry what they are made of. Returns those that the model knows of."""
        if self.flow.timestep is not None:
            *outputs, level = outputs
            if self.limits.ask_level() and type(level) is Tensor and not capturing():
                level = level.detach().clone()  # a CUDA graph writes its next call over it
                heard = {**heard, self.flow.timestep: level}
        for number, sources in self.flow.made_of:
            output = outputs[number]
            if type(output) is not Tensor or output.is_meta:
                continue
            vars(output).pop(_NAME, None)
            if output.dim() and output.layout == torch.strided and is_condition(sources, heard.keys(), args):
                level = _agreed({source: heard[source] for source in sources if source in heard})
                assert level is not None
                note = _Note(_on(output.device, level), _state(output), fingerprint(output, 0))
                setattr(output, _NAME, note)
        return outputs


def _noted(arg: Tensor) -> tuple[Tensor, _Note] | None:
    """A tensor, or what it is a view of, and the note on it."""
    for tensor in (arg, arg._base):
        note = getattr(tensor, _NAME, None)
        if tensor is not None and isinstance(note, _Note) and note.state == _state(tensor):
            return tensor, note
    return None


def _level(tensor: Tensor, note: _Note) -> Tensor:
    """What a note tells of a tensor; NaN where that holds something else by now."""
    return torch.where((fingerprint(tensor, 0) == note.contents).all(), note.level, math.nan)


def _on(device: torch.device, level: Tensor) -> Tensor:
    """A level on another device, for which no host waits, unless it is the host's."""
    return level.to(device, non_blocking=device.type != "cpu")


def _agreed(heard: HeardLevels) -> Tensor | None:
    """The level that all inputs tell; NaN where they differ, None if none does."""
    levels = list(heard.values())
    if not levels:
        return None
    level = levels[0]
    for other in levels[1:]:
        other = _on(level.device, other)
        alike = level == other if level.shape == other.shape else (level.amax() == other).all()
        level = torch.where(alike, level, math.nan)
    return level


def _doubtful(args: Sequence[Any], heard: HeardLevels) -> bool:
    """Whether an input that tells nothing looks like one that tells a level: it may be what counts."""
    kinds = {_kind(args[number]) for number in heard}
    return any(type(arg) is Tensor and _kind(arg) in kinds for n, arg in enumerate(args) if n not in heard)


def _sized(level: Tensor, taken: LevelInput, args: Sequence[Any]) -> Tensor:
    """A level for each sample, or the highest for all."""
    size = taken.size if taken.like is None else args[taken.like].shape[0]
    level = _on(taken.device, level)
    if len(level) not in (1, size):
        level = level.amax(0, keepdim=True)
    return level if len(level) == size else level.repeat(size)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
