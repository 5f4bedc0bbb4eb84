# SPDX-License-Identifier: Apache-2.0
"""Packed sequences, ``[tokens, H, D]`` with the places where each begins, as attention over ``[B, S, H, D]``.

One sequence for each sample needs nothing else. A single one that ends where only a run can tell, and pairs of them,
what counts of a sample and then its padding, become attention with a mask of keys that is made of these places on the
device. Its rows of padding are put right afterwards: nobody knows that they are not used.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from rainfusion_compile.passes.attention_match import DenseReason
from rainfusion_compile.passes.graph.mutation import Order, storage_of, storages_of
from rainfusion_compile.passes.graph.nodes import example_of
from rainfusion_compile.passes.graph.symbolic_sizes import hint_of, shape_of
from rainfusion_compile.passes.normalize.spelling import HOLDS, NOT_NEGATIVE, Asked, NotSdpa, Step, Write, tensor_of

_MOST_PADDING = 4  # one token of so many may be padding, for all that may be attend to one another densely
_LONGEST_TEXT = 1024  # of tokens that may be padding where nothing tells how many are not


class _Bounds(NamedTuple):
    """The least that a value can be, element by element, and another that it may be; the same where there is no other.

    That is so if those inputs that it `lacks` hold what is asked of them.
    """

    low: Any
    high: Any
    lacks: frozenset[tuple[fx.Node, Asked]] = frozenset()


class Sequences(NamedTuple):
    """Sequences that end where only a run can tell.

    Of each sample, `sure` tokens and perhaps more are one sequence; all others are one of padding, or of none if there
    are as many `sure` ones as tokens, and then their rows are undefined. `rows`, `keys`: where these begin, in nodes.
    """

    samples: int
    tokens: int
    sure: int
    rows: fx.Node
    keys: fx.Node

    def key_mask(self, write: Write) -> fx.Node:
        """Keys that count, ``[B, 1, 1, S]``."""
        return write("view", self._count(write, self.keys), (self.samples, 1, 1, self.tokens))

    def finish(self, scale: float | None, write: Write, out: fx.Node, operands: list[fx.Node]) -> fx.Node:
        """The output as ``[B, S, H, D]``, all of whose rows saw keys that count; those of padding as they are to be."""
        out = write("transpose", out, 1, 2)
        count = write("view", self._count(write, self.rows), (self.samples, self.tokens, 1, 1))
        rest = self.tokens - self.sure
        if not rest:
            return write(torch.where, count, out, 0.0)
        q, k, v = (write("narrow", item, 2, self.sure, rest) for item in operands)
        hidden = write("narrow", self.key_mask(write), 3, self.sure, rest)
        bias = write("type_as", write(torch.where, hidden, -math.inf, 0.0), q)
        # one that is not taken for another attention of the model
        attend = torch.ops.aten._scaled_dot_product_attention_math.default
        pair = write(attend, q, k, v, bias, scale=scale, enable_gqa=True)
        padding = write("transpose", write(operator.getitem, pair, 0), 1, 2)
        end = (write("narrow", item, 1, self.sure, rest) for item in (count, out))
        return write(torch.cat, [write("narrow", out, 1, 0, self.sure), write(torch.where, *end, padding)], 1)

    def _count(self, write: Write, starts: fx.Node) -> fx.Node:
        """Which tokens count, ``[B * S]``: those of sequences 1, 3 and so on, counted from 1."""
        places = write("cumsum", write("new_ones", starts, self.samples * self.tokens), 0)
        number = write(torch.bucketize, write("type_as", places, starts), starts)
        return write(torch.eq, write(torch.remainder, number, 2), 1)


class Unpacked(NamedTuple):
    """Nodes with the steps that make ``[B, S, H, D]`` of them, and where their sequences end if a run tells."""

    operands: list[tuple[fx.Node, list[Step]]]
    sequences: Sequences | None = None


def unpack(operands: list[Any], starts: list[Any], node: fx.Node, order: Order) -> Unpacked:
    """Packed operands as ``[B, S, H, D]``; `starts` has the places where sequences of queries and of keys begin.

    Raises NotSdpa unless sequences are provably one for each sample, or such and its padding.
    """
    if any(len(shape_of(item)) != 3 for item in operands) or len(starts) != 2:
        raise NotSdpa("packed sequences whose operands are not [B * S, H, D]")
    total, counts = shape_of(operands[0])[0], {shape_of(item) for item in starts}
    if None not in (total, keys := shape_of(operands[1])[0]) and total != keys:
        raise NotSdpa(f"cross-attention: {total} queries, {keys} keys", DenseReason.CROSS_ATTENTION)
    if total is None or any(shape_of(item)[0] != total for item in operands) or len(counts) != 1:
        raise NotSdpa("packed sequences of queries and keys that are not the same")
    if any(len(shape) != 1 for shape in counts):
        raise NotSdpa("packed sequences whose starts are not in one row")
    (count,), found = counts.pop(), {item: _bounds(item, order.places[node], order) for item in dict.fromkeys(starts)}
    found |= {item: pairs for item in found if (pairs := _given_pairs(item, count, total)) is not None}
    bounds = [found[item] for item in starts]
    if all(bound is not None and _begin_every(total // max(count - 1, 1), *bound[:2]) for bound in bounds):
        samples, ends = count - 1, None
    elif count == 2:
        samples, ends = 1, Sequences(1, total, total, *starts)
    else:
        samples = count // 2
        ends = Sequences(samples, total // samples, _sure(bounds, samples, total), *starts)
    return Unpacked([_unpacked(item, (samples, total // samples), node, order) for item in operands], ends)


def _begin_every(tokens: int, low: Tensor, high: Tensor) -> bool:
    """Whether sequences are provably of so many tokens each."""
    begins = torch.arange(len(low)) * tokens
    return len(low) > 1 and tokens > 0 and torch.equal(low, begins) and torch.equal(high, begins)


def _sure(bounds: list[_Bounds | None], samples: int, total: int) -> int:
    """How many tokens of each sample are provably in the first of its two sequences."""
    sure, tokens = [total], total // max(samples, 1)
    for bound in bounds:
        if bound is None:
            raise NotSdpa("packed sequences, whose lengths are known at run time only")
        low, high = bound.low, bound.high
        if samples * tokens != total or not _begin_every(tokens, low[::2], high[::2]) or low[-1] != total:
            raise NotSdpa("packed sequences that are not provably one for each sample, or that and its padding")
        sure.append(int((low[1::2] - low[:-1:2]).min()))
    padding = tokens - min(sure)
    if padding * _MOST_PADDING > tokens:
        raise NotSdpa(f"packed sequences of {tokens} tokens, {padding} of which may be padding")
    if lacks := frozenset[tuple[fx.Node, Asked]]().union(*(bound.lacks for bound in bounds if bound is not None)):
        counted = all(asked == NOT_NEGATIVE for _, asked in lacks)
        whence = "are counted from integers that may be negative" if counted else "are an input of the graph"
        refusal = NotSdpa(f"packed sequences, whose lengths {whence}")
        refusal.lacks = lacks
        raise refusal
    return min(sure)


def _given_pairs(starts: fx.Node, count: int | None, total: int) -> _Bounds | None:
    """Of an input of the graph, places where samples and, if there is little of it, their padding would begin."""
    if starts.op != "placeholder" or not _is_small(example_of(starts)) or not count or count < 3 or count % 2 == 0:
        return None
    ends = torch.arange(1, count // 2 + 1) * (total // (count // 2))
    padding = min(int(ends[0]) // _MOST_PADDING, _LONGEST_TEXT)
    low, high = (F.pad(torch.stack([ends - some, ends], 1).flatten(), (1, 0)) for some in (padding, 0))
    lacks = () if starts.meta.get(HOLDS) else ((starts, Asked(tuple(low.tolist()), tuple(high.tolist()))),)
    return _Bounds(low, high, frozenset(lacks))


def _unpacked(packed: fx.Node, sizes: tuple[int, int], node: fx.Node, order: Order) -> tuple[fx.Node, list[Step]]:
    """The ``[B, S, H, D]`` that was packed, or the steps that make it."""
    tensor_of(packed)
    below = packed.args[0] if packed.target in ("flatten", "reshape", "view", torch.flatten, torch.reshape) else None
    whole = shape_of(below) == (*sizes, *shape_of(packed)[1:]) and not order.written(packed, node)
    return (below, []) if whole and isinstance(below, fx.Node) else (packed, [(torch.unflatten, 0, sizes)])


# --- what small integer tensors hold ---------------------------------------------------------------------------------

# These keep an order: of operands that are at most others they make what is at most what they make of those.
_ORDERED = {
    *(torch.cumsum, torch.cat, torch.stack, torch.sum, torch.add, F.pad, torch._C._nn.pad),
    *(operator.add, operator.getitem, operator.setitem),
    *("cumsum", "sum", "add", "to", "int", "long", "bool", "contiguous", "clone", "new_zeros"),
    *("flatten", "reshape", "squeeze", "unsqueeze"),
}
_PRODUCTS = {torch.mul, operator.mul, "mul"}  # they, too, but of negative numbers
_OF_NUMBERS = {torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor}
_DTYPES = (torch.bool, torch.int32, torch.int64)  # others could overflow
_MOST = 2**18


def _bounds(node: fx.Node, until: int, order: Order) -> _Bounds | None:
    """What a small 1-D tensor of integers holds at least, as far as numbers, sizes, bools and what counts tell."""
    values: dict[fx.Node, _Bounds] = {}
    for item in itertools.islice(order.places, until):
        example = example_of(item)
        found: _Bounds | None = None
        if isinstance(example, torch.SymInt):
            number = hint_of(example)  # who uses this makes the sizes of the graph those of this call
            found = None if number is None else _Bounds(number, number)
        elif item.op.startswith("call") and (item.target is operator.setitem or _is_small(example)):
            found = _computed(item, values)
        if item in order.writes:
            written = storages_of(map(example_of, item.all_input_nodes))
            alike = {known: value for known, value in values.items() if _storage(known) in written}
            for known, value in alike.items():
                if found is None:
                    del values[known]
                else:
                    values[known] = value._replace(lacks=value.lacks | found.lacks)
        new = _storage(item) not in set(map(_storage, values))  # else what is written into it would be written there
        if found is None and new and _is_small(example) and (example.dtype == torch.bool or item.op == "placeholder"):
            low = torch.zeros(shape_of(item), dtype=example.dtype, device="cpu")
            certain = example.dtype == torch.bool or item.meta.get(HOLDS)
            found = _Bounds(low, torch.ones_like(low), frozenset() if certain else frozenset({(item, NOT_NEGATIVE)}))
        if found is not None:
            values[item] = found
    bounds = values.get(node)
    return bounds if bounds is not None and isinstance(bounds.low, Tensor) and bounds.low.dim() == 1 else None


def _storage(node: fx.Node) -> int | None:
    example = example_of(node)
    return storage_of(example) if isinstance(example, Tensor) else None


def _is_small(example: Any) -> bool:
    if not isinstance(example, Tensor) or example.dtype not in _DTYPES:
        return False
    sizes = [hint_of(size) for size in example.shape]
    return all(size is not None for size in sizes) and math.prod(size or 0 for size in sizes) <= _MOST


def _computed(node: fx.Node, values: dict[fx.Node, _Bounds]) -> _Bounds | None:
    """The bounds of what a node computes; None if these are not known."""
    if any(source not in values for source in node.all_input_nodes):
        return None
    exact = {source: _alike(*values[source][:2]) for source in node.all_input_nodes}
    if all(exact.values()):
        understood = node.target in _ORDERED | _PRODUCTS | _OF_NUMBERS
    elif node.target in _PRODUCTS:
        factors = [values[item][0] if isinstance(item, fx.Node) else item for item in node.args]
        understood = not node.kwargs and all(bool((torch.as_tensor(factor) >= 0).all()) for factor in factors)
    else:  # places must be known, and no factor of a sum
        at = node.args[1] if node.target in (operator.getitem, operator.setitem) else ()
        places = [item for item in tree_leaves(at) if isinstance(item, fx.Node)]
        plain = "alpha" not in node.kwargs and not (node.target in (torch.add, "add") and len(node.args) > 2)
        understood = node.target in _ORDERED and plain and all(map(exact.__getitem__, places))
    if not understood:
        return None
    with torch.no_grad(), _disable_current_modes():
        low, high = (_value(node, {source: values[source][side] for source in exact}) for side in (0, 1))
    if _storage(node) not in set(map(_storage, exact)):  # on another device, for example
        low, high = (value.clone() if isinstance(value, Tensor) else value for value in (low, high))
    return _Bounds(low, high, frozenset().union(*(values[source].lacks for source in exact)))


def _alike(low: Any, high: Any) -> bool:
    return torch.equal(low, high) if isinstance(low, Tensor) else bool(low == high)


def _value(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node, on CPU."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    cpu = torch.device("cpu")
    kwargs = {name: cpu if name == "device" else value for name, value in kwargs.items()}
    args = tree_map(lambda item: cpu if isinstance(item, torch.device) else item, args)
    function: Callable[..., Any] = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    return function(*args, **kwargs)
