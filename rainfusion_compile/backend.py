# SPDX-License-Identifier: Apache-2.0
"""The backend: ``torch.compile(model, backend="rainfusion")``.

An entry point of the group ``torch_dynamo_backends``, so the name works wherever the package is installed. Our passes
run on Dynamo's graph, before AOTAutograd; then Inductor gets the graph as it would have without us. Working before
Inductor, rather than in its pass hooks, keeps its caches sound: the rewritten graph is what they key on, and the passes
run on every compilation, warm cache or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from rainfusion_compile.options import Options

if TYPE_CHECKING:
    from rainfusion_compile.passes.provenance.known_tokens import Told
    from rainfusion_compile.passes.rewrite.dynamic import DynamicAnalysis
    from rainfusion_compile.passes.rewrite.writer import Analysis
    from rainfusion_compile.runtime.outside_knowledge import Listener


def rainfusion(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Sequence[Any]]:
    """Compile a Dynamo graph: video self-attention made sparse, everything by Inductor.

    Args:
        gm, example_inputs: as Dynamo hands them to a backend.
        mode: Inductor's mode, from ``torch.compile(mode=...)``.
        options: see :class:`rainfusion_compile.Options`.

    Raises:
        ValueError: on an unknown or impossible option.
    """
    from rainfusion_compile.passes.graph.symbolic_sizes import is_symbolic
    from rainfusion_compile.passes.normalize import spell_out
    from rainfusion_compile.passes.provenance.trace import example_of
    from rainfusion_compile.passes.rewrite.dynamic import DynamicAnalysis
    from rainfusion_compile.passes.rewrite.guards import (
        fix_floats,
        fix_head_dims,
        guard_self_attention,
        guard_sizes,
        specialise,
    )
    from rainfusion_compile.passes.rewrite.writer import analyse, copy_graph
    from rainfusion_compile.runtime.compiled_graphs import OpenGraph
    from rainfusion_compile.runtime.outside_knowledge import Listener

    settings = Options.parse(options, mode)
    spelled = spell_out(gm)
    listener = Listener(settings)
    if is_symbolic(gm) and not spelled.written:  # another spelling is understood at the sizes of this call only
        dynamic = DynamicAnalysis(gm, settings, spelled.refused)
        if dynamic.chosen and not dynamic.here.open:
            return _compiled_dynamic(example_inputs, settings, dynamic)
        if dynamic.here.open and (told := listener.hear(example_inputs)):
            fix_head_dims(dynamic.matches)
            knowing = DynamicAnalysis(gm, settings, spelled.refused, told)
            if knowing.chosen and not knowing.here.open and not knowing.varies:
                guard_self_attention(knowing.matches[number] for number in knowing.chosen)
                guard_sizes(knowing.matches, settings)
                return _compiled_dynamic(example_inputs, settings, knowing, listener)
        analysis = dynamic.here
    else:
        analysis = analyse(gm, settings, spelled=spelled)
    if not analysis.open:
        return _compiled(gm, example_inputs, settings, analysis)
    analysis.spelled.settle(())
    fix_floats(gm)
    specialise(gm)
    # Not the inputs of this call: they would be kept, and Inductor would take their sizes for symbols of its own, for
    # by the time it sees them, Dynamo has forgotten what it knew of them.
    examples = [example_of(node) for node in gm.graph.find_nodes(op="placeholder")]

    def compile_with(told: Told) -> Callable[..., Sequence[Any]]:
        known, graph = told.added_to(settings), copy_graph(gm)
        return _compiled(graph, examples, known, analyse(graph, known, told.carried), heard=True)

    return OpenGraph(compile_with, listener)


def _compiled_dynamic(
    example_inputs: list[Any], settings: Options, analysis: DynamicAnalysis, listener: Listener | None = None
) -> Callable[..., Sequence[Any]]:
    from rainfusion_compile.runtime.dynamic_graph import DynamicGraph

    gm, report, layouts = analysis.rewrite()
    inductor: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")
    config = _inductor_config(settings, rewritten=True)
    return DynamicGraph(inductor(gm, [*example_inputs, layouts], config_patches=config), report, analysis, listener)


def _compiled(
    gm: fx.GraphModule, example_inputs: list[Any], settings: Options, analysis: Analysis, *, heard: bool = False
) -> Callable[..., Sequence[Any]]:
    from rainfusion_compile.passes.graph.symbolic_sizes import InputSizes
    from rainfusion_compile.passes.rewrite.guards import guard_sizes, specialise
    from rainfusion_compile.passes.rewrite.writer import copy_graph, follow, rewrite
    from rainfusion_compile.runtime.compiled_graphs import ObservedGraph, PassingGraph

    knows = any(analysis.carried)
    sparse = any(match.reason is None for match in analysis.matches)
    if knows and sparse:
        specialise(gm)  # what its outputs carry is true of these sizes only
    guard_sizes(analysis.matches, settings)
    copied = None if sparse else copy_graph(gm)
    report = rewrite(gm, settings, analysis)
    inductor: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")
    compiled = inductor(gm, example_inputs, config_patches=_inductor_config(settings, rewritten=bool(report.sparse)))
    if report.attentions or (sparse and knows):
        compiled = ObservedGraph(compiled, report, analysis.carried if sparse else (), heard)
    if copied is None:
        return compiled
    return PassingGraph(compiled, lambda carried, args: follow(copied, carried, args), InputSizes(copied), knows)


def _inductor_config(settings: Options, *, rewritten: bool) -> dict[str, Any]:
    """The user's Inductor options; and, for a graph we changed, what its cache entries depend on besides the graph."""
    from torch import _inductor

    config: dict[str, Any] = {}
    if settings.inductor_mode is not None and settings.inductor_mode != "default":
        config |= _inductor.list_mode_options(settings.inductor_mode)
    config |= {name.replace("-", "_"): value for name, value in settings.inductor.items()}
    if rewritten:
        from rainfusion_compile import __version__
        from rainfusion_compile.kernels.operators import fingerprint

        # Inductor's and AOTAutograd's caches see our operators' names, not what they return. This setting exists to say
        # that an operator is cacheable, as ours are anyway; its value is part of both caches' keys.
        name = "unsafe_marked_cacheable_functions"
        already = config.get(name, getattr(_inductor.config, name))
        config[name] = {**already, "torch.ops.rainfusion": f"{__version__} {fingerprint()} {settings!r}"}
    return config


def _reset() -> None:
    """What ``torch._dynamo.reset`` does for Inductor: forget CUDA graphs."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


rainfusion.reset = _reset  # type: ignore[attr-defined]
