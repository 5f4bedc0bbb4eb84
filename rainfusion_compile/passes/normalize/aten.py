# SPDX-License-Identifier: Apache-2.0
"""Attention in ATen's own operators, as exported programs have it that were decomposed: not understood, but told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from rainfusion_compile.passes.graph.mutation import Order
from rainfusion_compile.passes.graph.nodes import bound
from rainfusion_compile.passes.graph.symbolic_sizes import shape_of
from rainfusion_compile.passes.normalize.spelling import Attention, NotSdpa, over

_ATEN = torch.ops.aten
_SOFTMAX = (_ATEN.softmax.int, _ATEN._softmax.default, _ATEN._safe_softmax.default)
_PRODUCTS = (_ATEN.matmul.default, _ATEN.bmm.default, _ATEN.baddbmm.default, _ATEN.mm.default, _ATEN.einsum.default)


def read(node: fx.Node, order: Order) -> Attention | None:
    """None. Raises NotSdpa for a softmax over the last dim of a product, whose result another product takes."""
    shape = shape_of(node)
    if node.target not in _SOFTMAX or bound(node, "self", "dim")["dim"] not in (-1, len(shape) - 1) or len(shape) < 2:
        return None
    if all(_reaches_product(node, shape, way) for way in (lambda one: one.all_input_nodes, lambda one: one.users)):
        with over(shape[-2]):
            raise NotSdpa("decomposed into operators of ATen; export it without run_decompositions()")
    return None


def _reaches_product(node: fx.Node, shape: tuple[Any, ...], way: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
    """Whether a product follows on the way, with nothing between that is not shaped like the scores."""
    todo, seen = list(way(node)), {node}
    while todo:
        one = todo.pop()
        if one.target in _PRODUCTS:
            return True
        if one not in seen and shape_of(one)[-2:] == shape[-2:]:
            seen.add(one)
            todo += way(one)
    return False
