# SPDX-License-Identifier: Apache-2.0
"""What every step asks of a graph and its nodes; and new nodes, each with the origin of another one, and a value."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload, OpOverloadPacket

SDPA = (
    torch._C._nn.scaled_dot_product_attention,  # what F has under this name; others may have put their own there
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


def example_of(node: Any) -> Any:
    """The fake value that Dynamo, or export, saw at a node; None if there is none, or this is no node."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None


def tensor_at(node: Any) -> Tensor | None:
    """The example of a node, if it is one tensor."""
    value = example_of(node)
    return value if isinstance(value, Tensor) else None


def is_sdpa(node: fx.Node) -> bool:
    """Whether a node calls `scaled_dot_product_attention`, under any of its names."""
    return node.op == "call_function" and node.target in SDPA


def bind(node: fx.Node) -> dict[str, Any]:
    """All eight arguments of an SDPA node by name, with their defaults. Raises ValueError if it calls anything else."""
    if not is_sdpa(node):
        raise ValueError(f"not a scaled_dot_product_attention: {node.format_node()}")
    return arguments(node, SDPA[-1])


def arguments(node: fx.Node, function: Any = None) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of its function, or of another that takes the same."""
    defaults = parameters(node.target if function is None else function)
    return {**defaults, **bound(node, *defaults)}


def bound(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments that a call is given, by name."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def parameters(function: Any) -> dict[str, Any]:
    """The parameters of a function or operator, with defaults or `inspect.Parameter.empty`; {} if it does not tell."""
    if isinstance(function, OpOverloadPacket):
        function = getattr(function, function.overloads()[0])
    if isinstance(function, OpOverload):
        items, empty = function._schema.arguments, inspect.Parameter.empty
        return {item.name: item.default_value if item.has_default_value() else empty for item in items}
    try:
        return {name: item.default for name, item in inspect.signature(function).parameters.items()}
    except (TypeError, ValueError):
        return {}


def operator_name(node: fx.Node) -> str:
    """``mul`` for ``operator.mul``, ``torch.mul``, ``Tensor.mul``, ``Tensor.__rmul__`` and ``aten.mul.Tensor``."""
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "_opname", None) or getattr(target, "__name__", "")
    return re.sub(r"^__r?(\w+)__$", r"\1", str(name)).split(".")[0]


def module_name(node: fx.Node) -> str:
    """``L['self']._modules['blocks']...`` and the like as ``blocks.0.attn1``; the node's own name outside modules."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    names = [name for name in path.split(".") if name not in ("L", "self", "_modules", "__dict__", "_orig_mod", "")]
    return ".".join(names) or node.name


def subgraphs(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The graphs inside a graph, such as a checkpoint's body, with their names."""
    for name, module in gm.named_modules():
        if name and isinstance(module, fx.GraphModule):
            yield name, module


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph that can be rewritten; values and submodules are shared."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if hasattr(node, "_dynamo_source"):  # which parameter or argument an input is
            copies[node]._dynamo_source = node._dynamo_source
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    sources: Any = getattr(gm, "_param_name_to_source", {})
    copied._param_name_to_source = dict(sources)  # type: ignore[assignment]
    return copied


def emit(like: fx.Node, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
    """A call of a function, or of a method by its name, where the graph of `like` inserts."""
    values = fx.node.map_arg(args, example_of)
    with example_of(like).fake_mode, enable_python_dispatcher():
        function = getattr(type(values[0]), target) if isinstance(target, str) else target
        value = function(*values, **kwargs)
    kind = "call_method" if isinstance(target, str) else "call_function"
    return describe(like.graph.create_node(kind, target, args, kwargs), like, value)


def describe(node: fx.Node, like: fx.Node, value: Any) -> fx.Node:
    """Give a new node its value, and the origin of `like`."""
    origin = ("stack_trace", "nn_module_stack", "source_fn_stack")
    node.meta |= {key: like.meta[key] for key in origin if key in like.meta}
    node.meta["example_value"] = value
    return node
