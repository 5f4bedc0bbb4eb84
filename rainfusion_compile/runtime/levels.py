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
from rainfusion_compile.passes.rewrite.level_flow import MOST_SAMPLES, LevelFlow, is_condition
from rainfusion_compile.runtime.changed_options import Limits
from rainfusion_compile.runtime.contents import capturing, fingerprint

_NAME = "_rainfusion_level"
_NONE = 0.5  # a level that makes no difference where none is asked for
_MOST = 1 << 20  # elements of a condition: more are those of tokens, whose contents would take time to compare
_CHUNKS = 8  # vectors that the modulation of a block has for a sample, at most

HeardLevels = dict[int, Tensor]
"""By number of an input, the noise level of all samples that it is a condition of, float32 ``[1]``."""


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
            return [constant(((_NONE,),), device)[0] for device in self.flow.takes]
        level = None if _doubtful(args, heard) else _agreed(heard)
        if level is None and not any(isinstance(arg, FakeTensor) for arg in args):
            self.limits.miss_level()
        return [
            constant(((math.nan,),), device)[0] if level is None else _on(device, level) for device in self.flow.takes
        ]

    def tell(self, args: Sequence[Any], heard: HeardLevels, outputs: Sequence[Any]) -> Sequence[Any]:
        """Let the outputs of a call carry what they are made of. Returns those that the model knows of."""
        if self.flow.timestep is not None:
            *outputs, level = outputs
            if self.limits.ask_level() and type(level) is Tensor and not capturing():
                level = _of_all(level.detach())  # not the output itself, which a CUDA graph's next call is written over
                heard = {**heard, self.flow.timestep: level}
        for number, sources in self.flow.made_of:
            output = outputs[number]
            if type(output) is not Tensor or output.is_meta or output.is_quantized:
                continue
            vars(output).pop(_NAME, None)
            plain = output.dim() > 0 and output.layout == torch.strided and output.numel() <= _MOST
            if plain and is_condition(sources, heard.keys(), args):
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


def _of_all(levels: Tensor) -> Tensor:
    """The one level of all samples, ``[1]``; NaN where they differ: which sample is whose is not followed."""
    return torch.where((levels == levels[:1]).all(), levels[:1], math.nan)


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
        level = torch.where(level == other, level, math.nan)
    return level


def _doubtful(args: Sequence[Any], heard: HeardLevels) -> bool:
    """Whether an input that tells nothing may be a condition, of this step, and those that tell a level of another.

    It looks like one of these, or has a few vectors for each sample, as modulations do.
    """
    kinds = {_kind(args[number]) for number in heard}
    others = [arg for n, arg in enumerate(args) if n not in heard and type(arg) is Tensor]
    return any(_kind(arg) in kinds or _has_vectors(arg) for arg in others)


def _has_vectors(tensor: Tensor) -> bool:
    vectors = tensor.dim() == 2 or (tensor.dim() == 3 and tensor.shape[1] <= _CHUNKS)
    return vectors and tensor.is_floating_point() and tensor.shape[0] <= MOST_SAMPLES and tensor.shape[-1] > 1


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
