# SPDX-License-Identifier: Apache-2.0
"""Which part of an attention mask speaks of keys, and which of queries.

The operators take a mask of keys. Models also build ``valid[i] & valid[j]`` over queries and keys, one tensor of
``[B, 1, S, S]``: hidden keys for all, and queries of padding that see nothing. Its two factors are found in the graph.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from rainfusion_compile.passes.attention_match import MaskFactor, MaskFactors
from rainfusion_compile.passes.graph.mutation import storage_of, written_storages
from rainfusion_compile.passes.graph.nodes import tensor_at
from rainfusion_compile.passes.graph.symbolic_sizes import fixed

_AND = {operator.and_, operator.mul, torch.logical_and, torch.bitwise_and, torch.mul}
_AND_METHODS = {"logical_and", "bitwise_and", "mul", "__and__"}
_SAME = {"bool", "to", "type", "contiguous", "clone", "detach"}


def factor_mask(node: fx.Node) -> MaskFactors | None:
    """The factors of a bool mask that broadcasts to ``[B, H, queries, keys]``; None if it is no such product."""
    return _factors(node, written_storages(node.graph))


def _factors(node: fx.Node, written: set[int]) -> MaskFactors | None:
    mask = tensor_at(node)
    if mask is None or mask.dtype != torch.bool or mask.dim() < 2 or storage_of(mask) in written:
        return None
    if _constant(mask, -2):
        return MaskFactors(keys=frozenset({MaskFactor(node, -1)}))
    if _constant(mask, -1):
        return MaskFactors(queries=frozenset({MaskFactor(node, -2)}))
    parts = _operands(node)
    if parts is not None:
        first, second = (_factors(part, written) for part in parts)
        return None if first is None or second is None else first & second
    if node.op == "call_method" and node.target in _SAME and isinstance(node.args[0], fx.Node):
        return _factors(node.args[0], written)
    if _swaps_last_two(node, mask.dim()):
        inner = _factors(node.args[0], written)  # type: ignore[arg-type]
        return inner and inner.transposed()
    source = _repeated(node)
    return None if source is None else _factors(source, written)


def _constant(mask: Tensor, dim: int) -> bool:
    """One value along a dimension, in every call: of length 1, or expanded."""
    return fixed(mask.shape[dim]) == 1 or fixed(mask.stride(dim)) == 0


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    method = node.op == "call_method" and node.target in _AND_METHODS
    if not method and not (node.op == "call_function" and node.target in _AND):
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    return (first, second) if isinstance(first, fx.Node) and isinstance(second, fx.Node) else None


def _swaps_last_two(node: fx.Node, dims: int) -> bool:
    if node.op == "call_method" and node.target in ("transpose", "swapaxes", "swapdims"):
        swapped: tuple[Any, ...] = node.args[1:]
    elif node.op == "call_function" and node.target in (torch.transpose, torch.swapaxes, torch.swapdims):
        swapped = node.args[1:]
    else:
        return False
    if len(swapped) != 2 or node.kwargs or not all(isinstance(dim, int) for dim in swapped):
        return False
    return {dim % dims for dim in swapped} == {dims - 2, dims - 1}


def _repeated(node: fx.Node) -> fx.Node | None:
    """The mask of length 1 along queries or keys of which this is many copies."""
    if node.op != "call_method" or node.target != "repeat" or not isinstance(node.args[0], fx.Node):
        return None
    source, counts = node.args[0], node.args[1:]
    if len(counts) == 1 and isinstance(counts[0], (tuple, list)):
        counts = tuple(counts[0])
    mask = tensor_at(source)
    if mask is None or len(counts) != mask.dim():
        return None
    copied = [dim - len(counts) for dim, count in enumerate(counts) if count != 1]
    along = copied[0] if len(copied) == 1 else 0
    return source if along in (-1, -2) and fixed(mask.shape[along]) == 1 else None
