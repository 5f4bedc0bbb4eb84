# SPDX-License-Identifier: Apache-2.0
"""Dynamo's guards: what a compiled graph relies on, so that another call gets a graph of its own."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import GlobalStateSource
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import TracingContext

from rainfusion_compile.passes.attention_match import AttentionMatch
from rainfusion_compile.passes.graph.nodes import example_of, is_sdpa, tensor_at
from rainfusion_compile.passes.graph.symbolic_sizes import hint_of
from rainfusion_compile.passes.match.partial_queries import too_many
from rainfusion_compile.passes.rewrite.analysis import Plan


def guard_forward_ad() -> None:
    """A graph is compiled for no forward-mode derivatives, or for them: Dynamo does not look at that by itself."""
    if (context := TracingContext.try_get()) is not None:
        context.guards_context.dynamo_guards.add(GlobalStateSource().make_guard(GuardBuilder.DUAL_LEVEL))


def specialise(gm: fx.GraphModule) -> None:
    """Fix the sizes of a dynamic graph by guards, for it is compiled for what is known of one call's tokens."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = example_of(node)
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.hint is not None:
                int(size)


def fix_floats(gm: fx.GraphModule) -> None:
    """Let Dynamo start again with those numbers fixed that it made inputs of a dynamic graph, such as an epsilon.

    For graphs that are compiled when Dynamo has finished: only it can tell Inductor what these inputs are. Raises what
    Inductor raises for numbers that cannot be inputs; Dynamo expects it.
    """
    values = map(example_of, gm.graph.find_nodes(op="call_method", target="item"))
    # `_expr`, for Dynamo knows an input by its symbol even if a guard has fixed it by now
    expressions = [value.node._expr for value in values if isinstance(value, torch.SymFloat)]
    names = {expression.name for expression in expressions if expression.is_Symbol}
    new = [name for name in names if not TensorifyState.should_specialize(name)]
    for name in new:
        TensorifyState.specialize(name)
    if new:
        raise TensorifyScalarRestartAnalysis


def guard(plan: Plan) -> None:
    """Let Dynamo's guards hold what a plan relies on."""
    sparse = plan.sparse
    guard_forward_ad()
    if sparse and not plan.any_size:
        specialise(plan.module)
    elif plan.known or not sparse:
        for match in sparse:
            query, key, value = map(example_of, (match.query, match.key, match.value))
            for operand in (query, key, value):  # `dynamic=True` makes symbols of head dims, too
                int(operand.shape[3])
            if not any(match.partial_queries):  # the code of a self-attention may also do cross-attention
                bool(query.shape[2] == key.shape[2])
        for match in plan.matches:
            if match.reason is not None and match.tokens is not None and is_sdpa(match.node):
                _guard_sizes(match, match.tokens, plan.options.min_tokens)


def _guard_sizes(match: AttentionMatch, tokens: int, min_tokens: int) -> None:
    """Hold what keeps an attention of a dynamic graph dense because of its sizes.

    Code that does cross-attention with some number of keys may do self-attention with another, and a longer video may
    be long enough: such calls get a graph of their own.
    """
    query, key = (tensor_at(node) for node in (match.query, match.key))
    if query is None or key is None or key.dim() != 4:
        return
    queries, keys = query.shape[2], key.shape[2]
    whole = hint_of(keys) is None or hint_of(keys) == tokens
    if not whole:
        bool(queries == keys)
    if any(match.partial_queries):
        bool(too_many(queries, keys))
    if (whole or any(match.partial_queries)) and tokens < min_tokens:
        bool(queries < min_tokens)
