# SPDX-License-Identifier: Apache-2.0
"""Where a graph shows how noisy its video is: at the sinusoidal embedding of the model's timestep.

A diffusion transformer turns its timestep ``t`` into ``sin(t * f)`` and ``cos(t * f)`` for frequencies ``f`` that fall
from 1 (Ho et al., arXiv 2006.11239). The angle of the first is the timestep in the unit of the embedding, which counts
to 1000, however the model's input counts.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, fx

from rainfusion_compile.passes.graph.made_of import value_inputs
from rainfusion_compile.passes.graph.nodes import emit, example_of, operator_name, tensor_at
from rainfusion_compile.passes.graph.symbolic_sizes import fixed

HIGHEST = 1000.0  # the timestep of pure noise, in the unit of the embedding
# What makes an angle of a timestep: products with what no input has a part in, and what leaves values as they are.
_PASSES = {
    "mul", "outer", "matmul", "einsum", "truediv", "div", "to", "type", "type_as", "float", "double", "half", "long",
    "bfloat16", "getitem", "unsqueeze", "squeeze", "view", "view_as", "reshape", "reshape_as", "flatten", "expand",
    "expand_as", "repeat", "contiguous", "clone",
}  # fmt: skip
_FREQUENCIES = re.compile(r"(^|_)(inv_)?(freqs?|frequency|frequencies)(_|$)")
_KEPT = "frequencies of a module"
_TIME = re.compile(r"(^|_)(t|time|time_?steps?|sigmas?)(_|$)")


def find_timestep_angles(gm: fx.GraphModule) -> fx.Node | None:
    """The angles of the timestep's embedding, ``[n, ..., frequencies]``; None where it is not certain which they are.

    It is an input that is called a time: guidance, frames a second and positions are embedded alike. A vector that is
    called frequencies, as modules keep them, is taken for falling ones of what is called so by more than a letter.
    """
    made: dict[fx.Node, set[str]] = {}  # without any input: by what operators
    moved: dict[fx.Node, tuple[fx.Node, bool]] = {}  # of which input, and whether times falling frequencies
    found: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        name, inputs = operator_name(node), value_inputs(node)
        value = tensor_at(node)
        if node.op == "placeholder":
            if value is None:
                made[node] = set()
            elif _are_frequencies(node, value):
                made[node] = {_KEPT}
            elif _may_be_times(node, value):
                moved[node] = node, False
        elif all(item in made for item in inputs):
            made[node] = {name}.union(*(made[item] for item in inputs))
            if inputs and name.endswith("_"):  # in place: one set for all names of what is written to
                made[inputs[0]].update(made[node], {name.rstrip("_")})
                made[node] = made[inputs[0]]
        elif name.endswith("_") and inputs[0] in made:
            made = {other: way for other, way in made.items() if way is not made[inputs[0]]}
        elif len(sources := {moved[item] for item in inputs if item in moved}) == 1:
            (source, falls) = sources.pop()
            if name == "sin" and falls and value is not None and value.dim() > 1:
                found.setdefault(source, inputs[0])
            elif name in _PASSES and all(item in made or item in moved for item in inputs):
                factors = [made[item] for item in inputs if item in made]
                falls |= any("arange" in way and way & {"exp", "pow"} for way in factors)
                # Positions are vectors like times, and have such frequencies, too.
                falls |= "time" in source.name and any(_KEPT in way for way in factors)
                moved[node] = source, falls
    found = {source: angles for source, angles in found.items() if _is_called_a_time(source)}
    fewest = min((source.name.count("_") for source in found), default=0)  # the time to step to is called by more words
    found = {source: angles for source, angles in found.items() if source.name.count("_") == fewest}
    return next(iter(found.values())) if len(found) == 1 else None


def _are_frequencies(node: fx.Node, value: Tensor) -> bool:
    """As a module keeps them: an input of the graph that is named after what it is there."""
    several = sum(fixed(size) != 1 for size in value.shape)
    return several == 1 and value.is_floating_point() and _FREQUENCIES.search(node.name) is not None


def _may_be_times(node: fx.Node, value: Tensor) -> bool:
    """A number for all samples or for each; if it is called a time, also for each of their frames or tokens."""
    several = sum(fixed(size) != 1 for size in value.shape)
    return several <= 1 or (several == 2 and _is_called_a_time(node))


def _is_called_a_time(node: fx.Node) -> bool:
    return _TIME.search(node.name) is not None


def level_of(like: fx.Node, angles: fx.Node, device: torch.device, *, per_sample: bool) -> fx.Node:
    """How noisy each sample is, or the noisiest: numbers from 0 to 1, float32 ``[B or 1]``, in front of a node."""
    aten = torch.ops.aten
    dims = list(range(1 if per_sample else 0, example_of(angles).dim()))
    level = emit(like, aten.amax.default, emit(like, aten.abs.default, angles), dims)
    level = emit(like, aten.to.device, level, device, torch.float32)
    return emit(like, aten.reshape.default, emit(like, aten.div.Tensor, level, HIGHEST), [-1])


def limits_of_samples(like: fx.Node, limits: fx.Node, level: fx.Node | None) -> fx.Node:
    """What the ARM chooses by in each sample, float32 ``[B or 1, 2]``, written in front of a node.

    ``limits``, float32 ``[3, 2]``: the usual ones; the noise levels from which on, and to which, attention is dense;
    and the limits of dense attention, which a level that is not known has, a NaN.
    """
    aten = torch.ops.aten
    usual, levels, dense = (emit(like, aten.slice.Tensor, limits, 0, row, row + 1) for row in range(3))
    if level is None:
        return usual
    level = emit(like, aten.reshape.default, level, [-1, 1])
    first, last = (emit(like, aten.slice.Tensor, levels, 1, column, column + 1) for column in range(2))
    below, above = emit(like, aten.lt.Tensor, level, first), emit(like, aten.gt.Tensor, level, last)
    return emit(like, aten.where.self, emit(like, aten.logical_and.default, below, above), usual, dense)
