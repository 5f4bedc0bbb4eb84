# SPDX-License-Identifier: Apache-2.0
"""Which part of an attention mask speaks of keys, and which of queries.

The operators take a mask of keys. Models also build ``valid[i] & valid[j]`` over queries and keys, one tensor of
``[B, 1, S, S]``: hidden keys for all, and queries of padding that see nothing. Its two factors are found in the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx

from rainfusion_compile.passes.attention_match import MaskFactor, MaskFactors
from rainfusion_compile.passes.graph.mutation import storage_of, written_storages
from rainfusion_compile.passes.graph.nodes import tensor_at
from rainfusion_compile.passes.graph.symbolic_sizes import fixed

# functions, and names of methods
_FUNCTIONS = {operator.and_, operator.mul, torch.logical_and, torch.bitwise_and, torch.mul}
_AND = _FUNCTIONS | {"logical_and", "bitwise_and", "mul", "__and__"}
_SWAP = {torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims"}
_SAME = {"bool", "to", "type", "contiguous", "clone", "detach"}


def factor_mask(node: fx.Node) -> MaskFactors | None:
    """The factors of a bool mask that broadcasts to ``[B, H, queries, keys]``; None if it is no such product."""
    return _factors(node, written_storages(node.graph))


def _factors(node: Any, written: set[int]) -> MaskFactors | None:
    mask = tensor_at(node)
    if mask is None or mask.dtype != torch.bool or mask.dim() < 2 or storage_of(mask) in written:
        return None
    if _constant(mask, -2):
        return MaskFactors(keys=frozenset({MaskFactor(node, -1)}))
    if _constant(mask, -1):
        return MaskFactors(queries=frozenset({MaskFactor(node, -2)}))
    if _calls(node, _AND) and len(node.args) == 2 and not node.kwargs:
        first, second = (_factors(part, written) for part in node.args)
        return None if first is None or second is None else first & second
    if _calls(node, _SAME):
        return _factors(node.args[0], written)
    if _calls(node, _SWAP) and len(node.args) == 3 and not node.kwargs:
        swapped = {dim % mask.dim() for dim in node.args[1:] if isinstance(dim, int)}
        inner = _factors(node.args[0], written) if swapped == {mask.dim() - 2, mask.dim() - 1} else None
        return inner and MaskFactors(inner.queries, inner.keys)
    return _factors(_repeated(node), written)


def _calls(node: fx.Node, targets: Container[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _constant(mask: Tensor, dim: int) -> bool:
    """One value along a dimension, in every call: of length 1, or expanded."""
    return fixed(mask.shape[dim]) == 1 or fixed(mask.stride(dim)) == 0


def _repeated(node: fx.Node) -> Any:
    """The mask of length 1 along queries or keys of which this is many copies."""
    if not _calls(node, {"repeat"}):
        return None
    source, *counts = node.args
    if len(counts) == 1 and isinstance(counts[0], (tuple, list)):
        counts = list(counts[0])
    mask = tensor_at(source)
    copied = [dim - len(counts) for dim, count in enumerate(counts) if count != 1]
    if mask is None or len(counts) != mask.dim() or copied not in ([-1], [-2]):
        return None
    return source if fixed(mask.shape[copied[0]]) == 1 else None
