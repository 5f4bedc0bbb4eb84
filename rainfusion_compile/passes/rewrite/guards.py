# SPDX-License-Identifier: Apache-2.0
"""Dynamo's guards: what a compiled graph relies on, so that another call gets a graph of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState

from rainfusion_compile.options import Options
from rainfusion_compile.passes.graph.symbolic_sizes import hint_of
from rainfusion_compile.passes.match.find import AttentionMatch
from rainfusion_compile.passes.match.partial_queries import too_many
from rainfusion_compile.passes.provenance.trace import example_of


def specialise(gm: fx.GraphModule) -> None:
    """Fix the sizes of a dynamic graph that has video attentions, with Dynamo's guards.

    For graphs that are compiled for what is told of one call's tokens: another resolution gets a graph of its own. All
    other dynamic graphs stay dynamic (`passes.dynamic`).
    """
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.hint is not None:
                int(size)


def fix_floats(gm: fx.GraphModule) -> None:
    """Let Dynamo start again with those numbers fixed that it made inputs of a dynamic graph, such as an epsilon.

    For graphs that are compiled when Dynamo has finished: only it can tell Inductor what these inputs are.

    Raises:
        TensorifyScalarRestartAnalysis: what Inductor raises for numbers that cannot be inputs; Dynamo expects it.
    """
    values = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="call_method", target="item")]
    # `_expr`, for Dynamo knows an input by its symbol even if a guard has fixed it by now
    names = {
        value.node._expr.name for value in values if isinstance(value, torch.SymFloat) and value.node._expr.is_Symbol
    }
    new = [name for name in names if not TensorifyState.should_specialize(name)]
    for name in new:
        TensorifyState.specialize(name)
    if new:
        raise TensorifyScalarRestartAnalysis


def fix_head_dims(matches: Iterable[AttentionMatch]) -> None:
    """Fix the head dims of attentions that lack a grid only; ``dynamic=True`` makes symbols of them, too."""
    for match in matches:
        for operand in (match.query, match.key, match.value) if match.open else ():
            int(example_of(operand).shape[3])


def guard_self_attention(matches: Iterable[AttentionMatch]) -> None:
    """Let Dynamo's guards hold that these have as many queries as keys: their code may also do cross-attention."""
    for match in matches:
        if not any(match.left_out):
            query, key = (example_of(node) for node in (match.query, match.key))
            bool(query.shape[2] == key.shape[2])


def guard_sizes(matches: Iterable[AttentionMatch], options: Options) -> None:
    """Let Dynamo's guards hold what keeps attentions of a dynamic graph dense because of their sizes.

    Code that does cross-attention with some number of keys may do self-attention with another, and a longer video may
    be long enough: such calls get a graph of their own.
    """
    for match in matches:
        query, key = (example_of(node) for node in (match.query, match.key))
        if match.reason is None or match.tokens is None or not isinstance(key, Tensor) or key.dim() != 4:
            continue
        queries, keys = query.shape[2], key.shape[2]
        whole = hint_of(keys) is None or hint_of(keys) == match.tokens
        if not whole:
            bool(queries == keys)
        if any(match.left_out):
            bool(too_many(queries, keys))
        if (whole or any(match.left_out)) and match.tokens < options.min_tokens:
            bool(queries < options.min_tokens)
