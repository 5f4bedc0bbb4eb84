# SPDX-License-Identifier: Apache-2.0
"""Rewriting for `torch.export`: the graph takes and returns what it did; tables and limits are buffers of its own."""

from __future__ import annotations

from torch import fx

from rainfusion_compile.options import Options
from rainfusion_compile.passes.graph.symbolic_sizes import is_symbolic
from rainfusion_compile.passes.normalize import normalize
from rainfusion_compile.passes.provenance.known_tokens import NOTHING
from rainfusion_compile.passes.rewrite.analysis import Plan
from rainfusion_compile.passes.rewrite.summary import log_result, refuse_dense
from rainfusion_compile.passes.rewrite.writer import Writer


def rewrite_exported(gm: fx.GraphModule, options: Options) -> None:
    """Make the video self-attentions of an exported program's module sparse, in place.

    Raises:
        ValueError: if its sizes are not fixed, or for `dense_steps` where it does not show its timestep.
        RuntimeError: if attention stays dense that must not, with `strict`.
    """
    if is_symbolic(gm):
        raise ValueError("this program has dynamic shapes: export it once for each resolution")
    gm._param_name_to_source = {}  # type: ignore[assignment]
    plan = Plan(gm, options, normalize(gm), NOTHING)
    sparse = plan.sparse
    plan.normalized.keep_only(match.node for match in sparse)
    refuse_dense(plan.matches, options)
    log_result(plan)
    writer = Writer(gm, options, len(sparse))
    for match in sparse:
        writer.write(match)
    if sparse and writer.angles is None and options.dense_steps != (0.0, 0.0):
        raise ValueError(f"dense_steps={options.dense_steps}: this program does not show which input is the timestep")
    for node in reversed(writer.observed):
        if not node.users:
            gm.graph.erase_node(node)
    writer.fix_limits()
