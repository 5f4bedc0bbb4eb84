# SPDX-License-Identifier: Apache-2.0
"""What every step asks of a graph and its nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

SDPA = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


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
    """All eight arguments of an SDPA node by name, with their defaults.

    Raises:
        ValueError: if the node calls something else.
    """
    if not is_sdpa(node):
        raise ValueError(f"not a scaled_dot_product_attention: {node.format_node()}")
    return {**_DEFAULTS, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}


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
