# SPDX-License-Identifier: Apache-2.0
"""How the noise level of a model's calls gets from one of its graphs to the others.

Where Dynamo breaks a model into graphs, one embeds the timestep, and others attend. What these are handed besides the
video is mostly made of that embedding: so a graph that shows the timestep returns its noise level, too, the run time
notes it for those outputs, and graphs that do not show it take it as one more input. Only *conditions* have a level:
what is made of the timestep, of parameters and of what else is one number or vector for each sample. What is made of
the video has none, for caches bring such back in later steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from rainfusion_compile.options import Options
from rainfusion_compile.passes.graph.made_of import inputs_of_nodes
from rainfusion_compile.passes.graph.nodes import example_of, tensor_at
from rainfusion_compile.passes.graph.symbolic_sizes import fixed
from rainfusion_compile.passes.match.noise_level import find_timestep_angles, level_of
from rainfusion_compile.passes.rewrite.analysis import same_sizes

MOST_SAMPLES = 32


class LevelFlow(NamedTuple):
    """How a graph's noise level comes in, and which outputs tell it to other graphs.

    ``takes``: devices of inputs for it, float32 ``[1]``, after all others. ``timestep``: number of the input whose
    level is the last output, if there is one. ``made_of``: numbers of an output, and of the inputs that it is made of,
    parameters left out.
    """

    takes: tuple[torch.device, ...] = ()
    timestep: int | None = None
    made_of: tuple[tuple[int, tuple[int, ...]], ...] = ()


def find_level_flow(gm: fx.GraphModule, options: Options) -> LevelFlow:
    """What a Dynamo graph's outputs may tell, if any attention may depend on that."""
    if options.dense_steps == (0.0, 0.0):
        return LevelFlow()
    made_of, inputs = inputs_of_nodes(gm.graph), list(map(tensor_at, gm.graph.find_nodes(op="placeholder")))
    (output,) = gm.graph.find_nodes(op="output")
    outputs = [(number, made_of[node]) for number, node in enumerate(output.args[0]) if tensor_at(node) is not None]
    flows = tuple((number, tuple(sorted(sources))) for number, sources in outputs if sources)
    angles = find_timestep_angles(gm)
    times = [] if angles is None else sorted(made_of[angles])
    told = len(times) == 1 and any(is_condition(sources, times, inputs) for _, sources in flows)
    return LevelFlow(timestep=times[0] if told else None, made_of=flows)


def is_condition(sources: Iterable[int], noted: Collection[int], inputs: Sequence[Any]) -> bool:
    """Whether what is made of these inputs, by number, is made of some whose level is known and of nothing with tokens.

    The others are numbers or vectors, one for all samples or one for each. Samples are few; where there are many, they
    may be tokens of packed samples, with a time for each.
    """
    known = [number for number in sources if number in noted]
    batches = [(1,), *(tuple(inputs[number].shape[:1]) for number in known)]
    shapes = (inputs[number].shape for number in sources if number not in noted)
    return bool(known) and all(
        len(shape) < 2
        or (len(shape) == 2 and any(same_sizes(shape[:1], batch) for batch in batches) and not _are_many(shape[0]))
        for shape in shapes
    )


def _are_many(samples: int | torch.SymInt) -> bool:
    size = fixed(samples)
    return size is not None and size > MOST_SAMPLES


def return_level(gm: fx.GraphModule, flow: LevelFlow) -> None:
    """Let a graph return its timestep's noise level, if that is to be told: float32 ``[n]``, where its outputs are."""
    if flow.timestep is None:
        return
    angles = find_timestep_angles(gm)
    assert angles is not None
    (output,) = gm.graph.find_nodes(op="output")
    inputs = list(map(tensor_at, gm.graph.find_nodes(op="placeholder")))
    told = next(number for number, sources in flow.made_of if is_condition(sources, (flow.timestep,), inputs))
    with gm.graph.inserting_before(angles.next):  # where they are made, for they may be written over
        level = level_of(angles, angles, example_of(output.args[0][told]).device, per_sample=True)
    output.args = ((*output.args[0], level),)
    gm.graph.lint()
    gm.recompile()
