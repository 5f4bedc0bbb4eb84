# SPDX-License-Identifier: Apache-2.0
"""`flex_attention` that modifies no score and masks nothing; what any other does is not known."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from rainfusion_compile.passes.graph.mutation import Order
from rainfusion_compile.passes.graph.symbolic_sizes import shape_of
from rainfusion_compile.passes.normalize.spelling import Attention, NotSdpa, number_of, only_first, over


def read(node: fx.Node, order: Order) -> Attention | None:
    """A plain `flex_attention`. Raises NotSdpa of one with a score_mod or a mask."""
    if not isinstance(node.target, HigherOrderOperator) or node.target.name() != "flex_attention":
        return None
    query, key, value, score_mod, block_mask, scale = node.args[:6]
    with over(shape_of(query)[2]):
        score = _body(score_mod)
        if score[-1] is not score[0] or len(score) != 7 or any(node.args[7:]) or any(node.kwargs.values()):
            raise NotSdpa("flex_attention with a score_mod")
        if not _masks_nothing(block_mask, max(shape_of(query)[2], shape_of(key)[2])):
            raise NotSdpa("flex_attention with a mask")
        if number_of(scale) is None:
            raise NotSdpa("scale is known at run time only")
        operands: list[Any] = [query, key, value]
        out = only_first(node, "statistics of the softmax")
        return Attention(node, out, [(item, []) for item in operands], [], [], scale=number_of(scale), chain={node})


def _body(node: Any) -> list[Any]:
    """The nodes of a function, and then the one that it returns; [None] of what is no function."""
    module = getattr(node.graph.owning_module, str(node.target), None) if isinstance(node, fx.Node) else None
    if not isinstance(module, fx.GraphModule):
        return [None]
    (output,) = module.graph.find_nodes(op="output")
    return [*module.graph.nodes, output.args[0][0] if isinstance(output.args[0], tuple) else output.args[0]]


def _masks_nothing(block_mask: Any, tokens: int) -> bool:
    """Whether this is what `flex_attention` makes of no mask: one block that is larger than anything, of ones."""
    blocks, block_sizes, ones = block_mask[2], block_mask[-3:-1], _body(block_mask[-1])[-1]
    one = isinstance(blocks, fx.Node) and blocks.target is torch.ones and set(shape_of(blocks)) == {1}
    large = all(isinstance(size, int) and size >= tokens for size in block_sizes)
    return one and large and isinstance(ones, fx.Node) and ones.op == "call_method" and ones.target == "new_ones"
