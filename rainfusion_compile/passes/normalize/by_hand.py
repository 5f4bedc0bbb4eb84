# SPDX-License-Identifier: Apache-2.0
"""Attention written out: a product, a scale, perhaps a mask, softmax, another product."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from rainfusion_compile.passes.attention_match import DenseReason
from rainfusion_compile.passes.graph.mutation import Order
from rainfusion_compile.passes.graph.nodes import bound
from rainfusion_compile.passes.graph.symbolic_sizes import shape_of
from rainfusion_compile.passes.normalize.spelling import Attention, NotSdpa, Step, number_of, over, tensor_of

# What functions and methods are called here. A name that ends in "_" writes to its first operand.
_PLAIN = ("baddbmm", "softmax", "mul", "div", "add", "mul_", "div_", "add_", "masked_fill", "masked_fill_", "where")
_VIEWS = ("transpose", "permute", "swapaxes", "swapdims", "reshape", "view", "flatten", "unflatten", "unsqueeze")
_KINDS: dict[Any, str] = {
    **{name: name for name in _PLAIN},
    **dict.fromkeys(("matmul", "bmm"), "matmul"),
    **dict.fromkeys(("float", "half", "bfloat16", "to", "type", "type_as"), "cast"),
    **dict.fromkeys((*_VIEWS, "contiguous"), "view"),
}
_KINDS |= {
    **{getattr(torch, name): kind for name, kind in _KINDS.items() if callable(getattr(torch, name, None))},
    **{torch.einsum: "einsum", F.softmax: "softmax"},
    **dict.fromkeys((F.dropout, torch.dropout, torch.dropout_, torch.native_dropout), "dropout"),
    **{operator.matmul: "matmul", operator.mul: "mul", operator.truediv: "div", operator.add: "add"},
    **{operator.imul: "mul_", operator.itruediv: "div_", operator.iadd: "add_"},
}
_HIDDEN = -6e4  # a score this low is one of no weight; the lowest of float16 is -65504

Mask = tuple[fx.Node, list[Step]]  # and the steps that make SDPA's mask of the node


@dataclass
class _Scores:
    """What happens before a softmax: the product, its scale and mask, and all nodes from there."""

    product: fx.Node
    scale: float = 1.0
    mask: Mask | None = None
    chain: set[fx.Node] = field(default_factory=set)


def read(softmax: fx.Node, order: Order) -> Attention | None:
    """The attention whose weights a softmax makes. Raises NotSdpa if it is one that SDPA has no words for."""
    given = bound(softmax, "input", "dim")
    if _kind(softmax) != "softmax" or given.get("dim") not in (-1, len(shape_of(softmax)) - 1):
        return None
    with over(shape_of(softmax)[-2]):
        if not _comes_from_product(given["input"]) or not any(map(_feeds_product, softmax.users)):
            _refuse_what_is_between(softmax, given["input"])
            return None
        return _attention(softmax, order)


def _attention(softmax: fx.Node, order: Order) -> Attention | None:
    scores = _scores(bound(softmax, "input")["input"], softmax)
    out, dropout, between = _output(softmax)
    first, scale, chain = scores.product, scores.scale, scores.chain | between
    (pair, letters), (pair_out, letters_out) = _equation(first), _equation(out)  # type: ignore[misc]
    # scores: the queries' letter, then the keys'
    batch, i, j = letters[2][:-2], letters[2][-2], letters[2][-1]
    if i not in letters[0]:
        pair, letters = pair[::-1], [letters[1], letters[0], letters[2]]
    d = "".join(sorted({*letters[0], *letters[1]} - {*letters[2]}))
    number = next(n for n, item in enumerate(pair_out) if item in chain)
    weights, given, result = letters_out[number], letters_out[1 - number], letters_out[2]
    e = "".join(sorted({*given} - {*weights}))
    wants = (batch + i + d, batch + j + d, weights[:-2] + weights[-1] + e)
    has, goal = (letters[0], letters[1], given), weights[:-1] + e
    alike = [sorted(one) == sorted(two) for one, two in zip((*wants, goal), (*has, result), strict=True)]
    if not all(alike) or len(d) != 1 or len(e) != 1 or pair_out[1 - number] in chain:
        return None  # products of another kind, such as a router's
    if len(batch) not in (1, 2):
        raise NotSdpa(f"not 4-D: scores of shape {shape_of(first)}")
    up, down = _split_heads(pair[0]) if len(batch) == 1 else ([], [])
    operands = []
    for node, want, letter in zip((*pair, pair_out[1 - number]), wants, has, strict=True):
        base, steps, factor = _peel(node, out, order, scaled=letter is not given)
        scale *= factor
        operands.append((base, [*steps, *_permuted(letter, want), *up]))
    if scale <= 0:
        raise NotSdpa(f"scores are scaled by {scale}")
    now = tensor_of(out).dtype
    for dtype in (tensor_of(base).dtype for base, _ in operands[:2]):
        # SDPA computes on operands of its output's dtype: scores of finer ones would lose by that
        if torch.promote_types(dtype, now) != now and tensor_of(first).dtype != now:
            raise NotSdpa(f"scores of {dtype} operands, output in {now}")
    after, before = [*down, *_permuted(goal, result)], [*_permuted(result, goal), *up]
    mask = scores.mask
    if mask is not None and len(batch) == 1 and len(shape_of(mask[0])) > 2:
        # one mask for all heads and samples needs no splitting
        mask = mask[0], [*mask[1], *([(torch.unsqueeze, 0)] if shape_of(mask[0])[0] == 1 else up)]
    return Attention(first, out, operands, after, before, mask, scale, dropout=dropout, chain=chain)


# --- what a node does ------------------------------------------------------------------------------------------------


def _kind(node: Any) -> str:
    """What a node does, by one name for all its spellings; "" if that is nothing of interest here."""
    if not isinstance(node, fx.Node) or node.kwargs.get("out") is not None:
        return ""
    if node.target is getattr and node.args[1:] == ("mT",):
        return "view"
    return _KINDS.get(node.target, "") if node.op in ("call_function", "call_method") else ""


def _factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """What a node multiplies by a number or divides by one, and that factor."""
    kind, args = _kind(node), [*node.args, *node.kwargs.values()]
    if kind.rstrip("_") not in ("mul", "div") or len(args) != 2:
        return None
    if kind == "mul" and isinstance(args[1], fx.Node):
        args.reverse()
    number = number_of(args[1])
    if not isinstance(args[0], fx.Node) or number is None or not math.isfinite(number) or number == 0:
        return None
    return args[0], number if kind.startswith("mul") else 1 / number


def _equation(node: Any) -> tuple[list[fx.Node], list[str]] | None:
    """The two operands of a product, and einsum's letters for them and for the result."""
    kind = _kind(node)
    if kind == "einsum":
        equation, operands = node.args[0], [*node.args[1:]]
        operands = list(operands[0]) if operands and isinstance(operands[0], (list, tuple)) else operands
        letters = str(equation).replace(" ", "").replace("->", ",").split(",")
        if len(letters) != 3 or len(operands) != 2:
            return None
        for number, text in enumerate(letters):
            rank = len(shape_of((*operands, node)[number])) - len(text.replace("...", ""))
            letters[number] = text.replace("...", "ABCDEF"[: max(rank, 0)])
    elif kind in ("matmul", "baddbmm"):
        names = ("input", "batch1", "batch2") if kind == "baddbmm" else ("input", "other")
        given = bound(node, *names)
        given.setdefault("other", given.get("tensor2", given.get("mat2")))
        operands = [given.get(name) for name in names[-2:]]
        batch = "ABCDEF"[: len(shape_of(node)) - 2]
        letters = [f"{batch}ik", f"{batch}kj", f"{batch}ij"]
    else:
        return None
    tensors = [(item, text) for item, text in zip((*operands, node), letters, strict=True) if shape_of(item)]
    fits = all(len(shape_of(item)) == len(set(text)) == len(text) for item, text in tensors)
    return ([*operands], letters) if fits and len(tensors) == 3 else None


def _comes_from_product(node: Any, depth: int = 8) -> bool:
    if not isinstance(node, fx.Node) or len(shape_of(node)) < 3 or not depth:
        return False
    alike = (item for item in node.all_input_nodes if shape_of(item) == shape_of(node))
    return _equation(node) is not None or any(_comes_from_product(item, depth - 1) for item in alike)


def _feeds_product(node: fx.Node) -> bool:
    if _kind(node) in ("cast", "dropout", "view") or _is_first_of_dropout(node):
        return any(map(_feeds_product, node.users))
    return _kind(node) != "baddbmm" and _equation(node) is not None


def _is_first_of_dropout(node: fx.Node) -> bool:
    return node.target is operator.getitem and _kind(node.args[0]) == "dropout" and node.args[1:] == (0,)


def _refuse_what_is_between(softmax: fx.Node, scores: Any) -> None:
    """Raises NotSdpa if a softmax stands between two products of batches, with something else there, too."""
    above = _between(scores, lambda node: node.all_input_nodes)
    below = _between(softmax, lambda node: list(node.users))
    for node in [] if above is None or below is None else [*above, *below[1:]]:
        if _kind(node) not in ("cast", "dropout", "add", "add_") and _factor(node) is None and _mask(node) is None:
            raise NotSdpa(f"scores or weights pass through {getattr(node.target, '__name__', node.target)}")


def _between(node: Any, following: Callable[[fx.Node], list[fx.Node]], depth: int = 8) -> list[fx.Node] | None:
    """From a node on, whatever comes before a product of batches; None if there is none near."""
    sizes = shape_of(node)
    if len(sizes) < 3 or not depth:
        return None
    if (equation := _equation(node)) is not None:
        return [] if all(len(shape_of(item)) > 2 for item in equation[0]) else None
    for other in following(node):
        alike = shape_of(other)[:-1] == sizes[:-1] or "view" in (_kind(node), _kind(other))
        found = _between(other, following, depth - 1) if alike else None
        if found is not None:
            return [node, *found]
    return None


# --- from the softmax to both ends -----------------------------------------------------------------------------------


def _scores(node: fx.Node, softmax: fx.Node) -> _Scores:
    """From the softmax back to the product."""
    found = _Scores(node)
    while True:
        if len([user for user in node.users if user.args[1:] != (node,) or _kind(user) != "cast"]) > 1:
            raise NotSdpa("scores are used elsewhere")  # for more than their dtype
        found.chain.add(node)
        below: Any = node.args[0] if node.args else None
        factor, mask = _factor(node), _mask(node)
        if _equation(node) is not None:
            found.product = node
            if _kind(node) == "baddbmm":
                _add_input(found, node)
            return found
        if mask is not None:
            below, *mask_and_steps = mask
            _put(found, *mask_and_steps)
        elif factor is not None:
            below, found.scale = factor[0], found.scale * factor[1]
        elif _kind(node) == "cast":
            _check_cast(node)
        else:
            raise NotSdpa(f"scores pass through {getattr(node.target, '__name__', node.target)}")
        if not isinstance(below, fx.Node) or shape_of(below) != shape_of(softmax):
            raise NotSdpa("scores change their shape before the softmax")
        node = below


def _mask(node: fx.Node) -> tuple[fx.Node, Any, list[Step]] | None:
    """The scores that a node puts a mask on, the mask, and the steps that make it SDPA's."""
    kind = _kind(node)
    if kind in ("add", "add_") and len(node.args) == 2 and not node.kwargs:
        below, added = node.args
        if kind == "add" and not _comes_from_product(below):
            below, added = added, below
        return (below, added, []) if isinstance(below, fx.Node) else None
    if kind in ("masked_fill", "masked_fill_"):
        given = bound(node, "input", "mask", "value")
        below, where, value, hides = node.args[0], given.get("mask"), given.get("value"), True
    elif kind == "where" and len(node.args) == 3:
        # as a function, the condition comes first; as a method, second
        where, yes, no = (node.args[place] for place in ((0, 1, 2) if node.op == "call_function" else (1, 0, 2)))
        hides = not isinstance(yes, fx.Node)
        below, value = (no, yes) if hides else (yes, no)
    else:
        return None
    number = number_of(value)
    if number is None or number > _HIDDEN or not isinstance(below, fx.Node) or not isinstance(where, fx.Node):
        return None
    if number == -math.inf:
        return below, where, [(torch.logical_not,)] if hides else []
    # all keys hidden: they weigh the same
    return below, where, [(torch.where, number, 0.0) if hides else (torch.where, 0.0, number)]


def _put(found: _Scores, mask: Any, steps: list[Step]) -> None:
    zeros = isinstance(mask, fx.Node) and mask.target in (torch.zeros, torch.zeros_like, "new_zeros")
    if zeros and len(mask.users) == 1 and mask.kwargs.get("out") is None:
        return  # which nobody else has, so nothing is written there
    if found.mask is not None or not isinstance(mask, fx.Node):
        raise NotSdpa("several masks, or one that is no tensor")
    if found.scale != 1:
        raise NotSdpa("scores are scaled after the mask")
    found.mask = mask, steps


def _add_input(found: _Scores, node: fx.Node) -> None:
    """The factor of baddbmm's product, and its input as a mask."""
    given: dict[str, Any] = {"beta": 1, "alpha": 1, **bound(node, "input")}
    alpha, beta = number_of(given["alpha"]), number_of(given["beta"])
    if not alpha or beta not in (0, 1):
        raise NotSdpa(f"baddbmm with alpha={given['alpha']}, beta={given['beta']}")
    if beta:
        _put(found, given["input"], [])
    found.scale *= alpha


def _output(softmax: fx.Node) -> tuple[fx.Node, float, set[fx.Node]]:
    """From the softmax on to the product with the values: its node, dropout, and what is between."""
    node, dropout, chain = softmax, 0.0, {softmax}
    while True:
        if len(node.users) > 1:
            raise NotSdpa("attention weights are used elsewhere")
        (user,) = node.users
        if _kind(user) == "dropout":
            dropout = max(dropout, _dropout(user))
        elif _kind(user) == "cast":
            _check_cast(user)
        elif _kind(user) == "view":
            raise NotSdpa("attention weights change their shape")
        elif not _is_first_of_dropout(user):
            return user, dropout, chain
        node = user
        chain.add(node)


def _dropout(node: fx.Node) -> float:
    """The probability that a node drops a weight. Raises NotSdpa if it is not known."""
    given = {"p": 0.5, **bound(node, "input", "p", "training")}
    probability = number_of(given["p"])
    if probability is None:
        raise NotSdpa("dropout", DenseReason.DROPOUT)
    return probability if given.get("train", given.get("training", True)) else 0.0


def _check_cast(node: fx.Node) -> None:
    """Scores and weights may be rounded as attention kernels would, on the same device."""
    was, now = tensor_of(node.args[0]), tensor_of(node)
    if was.device != now.device or not now.is_floating_point() or now.itemsize < 2:
        raise NotSdpa(f"scores or weights are cast to {now.dtype} on {now.device}")


# --- operands --------------------------------------------------------------------------------------------------------


def _peel(node: fx.Node, out: fx.Node, order: Order, *, scaled: bool) -> tuple[fx.Node, list[Step], float]:
    """What an operand is without widening casts and numbers it is multiplied by; the views on top, the factor."""
    found: tuple[fx.Node, list[Step], float] = node, [], 1.0
    views, factor = list[Step](), 1.0
    while not order.written(node, out):
        kind, step = _kind(node), _factor(node) if scaled and not _kind(node).endswith("_") else None
        below = step[0] if step else node.args[0] if kind in ("view", "cast") else None
        if not isinstance(below, fx.Node) or (kind == "view" and node.kwargs):
            break
        ours, theirs = tensor_of(below), tensor_of(node)
        if kind == "view":
            views.insert(0, (node.target, *node.args[1:]))
        elif (
            ours.device == theirs.device
            and ours.is_floating_point()
            and torch.promote_types(ours.dtype, theirs.dtype) == theirs.dtype
        ):
            factor *= step[1] if step else 1
            found = below, list(views), factor
        else:
            break
        node = below
    return found


def _permuted(has: str, wants: str) -> list[Step]:
    return [] if has == wants else [(torch.permute, tuple(map(has.index, wants)))]


def _split_heads(query: fx.Node) -> tuple[list[Step], list[Step]]:
    """Steps from ``[B * H, S, D]`` to ``[B, H, S, D]`` and back; all as heads of one sample, if nobody knows B."""
    node = query
    while (_kind(node) == "cast" or node.target == "contiguous" or _factor(node)) and node.args:
        node = _factor(node)[0] if _factor(node) else node.args[0]  # type: ignore[assignment, index]
    before = node.args[0] if _kind(node) == "view" else None
    if isinstance(before, fx.Node) and len(shape_of(before)) == 4 and shape_of(before)[2:] == shape_of(query)[1:]:
        heads = tuple(tensor_of(before).shape[:2])
        if all(isinstance(size, int) for size in heads):
            return [(torch.unflatten, 0, heads)], [(torch.flatten, 0, 1)]
    return [(torch.unsqueeze, 0)], [(torch.squeeze, 0)]
