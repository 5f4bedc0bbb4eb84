# SPDX-License-Identifier: Apache-2.0
"""New nodes in a Dynamo graph, each with the origin of the node that it stands for, and a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from rainfusion_compile.passes.graph.nodes import example_of


def emit(like: fx.Node, target: Callable[..., Any] | str, *args: Any) -> fx.Node:
    """A call of a function, or of a method by its name, where the graph of `like` inserts."""
    values = fx.node.map_arg(args, example_of)
    with example_of(like).fake_mode, enable_python_dispatcher():
        value = getattr(values[0], target)(*values[1:]) if isinstance(target, str) else target(*values)
    call: Callable[..., fx.Node] = like.graph.call_method if isinstance(target, str) else like.graph.call_function
    return describe(call(target, args), like, value)


def describe(node: fx.Node, like: fx.Node, value: Any) -> fx.Node:
    """Give a new node its value, and the origin of `like`."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta["example_value"] = value
    return node
