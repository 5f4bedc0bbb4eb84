# SPDX-License-Identifier: Apache-2.0
"""What each ATen operator does to the axes of its operands.

A rule takes a `Call` and returns the dims of the call's first output, or dims and lineage of each. Whatever has no rule
makes axes that are `lost`: they never become anything else, so an operator that is not known here costs sparsity, never
correctness. The same holds for what it may write into, as its schema says.

Rules are found by the operator's name without its overload and without what in-place variants and those that copy a
view end in, so that ``aten::add_.Tensor`` is ``add``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from rainfusion_compile.passes.provenance.axes import is_of_data, origins, resolve
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, Source, find, fresh, size_of
from rainfusion_compile.passes.provenance.lineage import Lineage, lineage_of, union_of
from rainfusion_compile.passes.provenance.others import of_others
from rainfusion_compile.passes.provenance.places import in_a_table, in_places
from rainfusion_compile.passes.provenance.unify import unify

Split = list[tuple[Dims, Lineage]]
Rule = Callable[["Call"], Dims | Split]
_AnyRule = TypeVar("_AnyRule", bound=Rule)
RULES: dict[str, Rule] = {}
_meshes = itertools.count()


class Call:
    """One call of an ATen operator: arguments by the names of its schema, and its outputs."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.operands, self.outs = list(tensors_in((*args, *kwargs.values()))), list(tensors_in((out,)))
        self.first: Any = args[0] if args else None
        self.out: Any = self.outs[0] if self.outs else None
        self.lineage = union_of(self.operands)  # if no rule sets another

    def __getitem__(self, name: str) -> Any:
        position, default = _schema(self.func)[name]
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in _schema(self.func)

    def get(self, name: str) -> Any:
        """The argument, None if the operator has no such."""
        return self[name] if name in _schema(self.func) else None


@cache
def _schema(func: torch._ops.OpOverload) -> dict[str, tuple[int, Any]]:
    arguments = enumerate(func._schema.arguments)
    return {argument.name: (number, argument.default_value) for number, argument in arguments}


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operator, and in lists, tuples and dicts of such."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from tensors_in(value.values() if isinstance(value, dict) else value)


def propagate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, written: list[Tensor]) -> None:
    """Give the outputs of an operator, and what it has `written` into, their dims and lineage."""
    call, name = Call(func, args, kwargs, out), func._schema.name.removeprefix("aten::")
    rule = RULES.get(name) or RULES.get(name.removesuffix("_")) or RULES.get(name.removesuffix("_copy"))
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = pointwise
    ruled = [] if rule is None else call.outs
    for item in (*written, *call.outs):
        if all(item is not other for other in ruled):
            # what is made of nothing but numbers is new; only what was there before can be lost
            set_dims(item, fresh_dims(item.shape, lost=name if call.operands else None), call.lineage)
    if rule is None or not call.outs:
        return
    found = rule(call)
    if not isinstance(found, list) and call.lineage.inputs:
        call.lineage = call.lineage.picked(_gone(call.operands, found))
    for number, item in enumerate(call.outs):
        if isinstance(found, list):
            set_dims(item, *found[number])
        else:
            set_dims(item, found if item is call.out else _beside(item, call.out, name), call.lineage)


def _gone(operands: Iterable[Tensor], dims: Dims) -> set[Axis]:
    """Axes that may be of tokens, which operands run over and a result of these dims does not, in their order."""
    axes = {axis for each in operands if lineage_of(each).inputs for dim in dims_of(each) for axis in resolve(dim)}
    axes.difference_update(*map(resolve, dims))
    if all(axis.size == 1 for axis in axes):
        return set()
    whole = (axis for dim in dims for axis in resolve(dim) if axis.size > 1 and not axis.permuted)
    kept = {one for axis in whole for one in origins(axis)}
    gone = {one for one in axes - kept if one.size > 1 and (is_of_data(one) or in_a_table(one))}
    parts = {one: [part for part in one.parts if size_of(part) > 1] for one in gone}
    return {one for one in gone if not parts[one] or any(kept.isdisjoint(resolve(part)) for part in parts[one])}


def _beside(item: Tensor, first: Tensor, name: str) -> Dims:
    """The dims of a further output: statistics or indices, one for each element of the first, or of a row."""
    if item.dim() != first.dim():
        return fresh_dims(item.shape, lost=name)
    sizes = zip(item.shape, first.shape, dims_of(first), strict=True)
    return tuple(dim if size == other else fresh(size, lost=name) for size, other, dim in sizes)


def dims_of(tensor: Tensor) -> Dims:
    """The dims of a tensor; fresh ones if it has none yet."""
    dims: Dims | None = getattr(tensor, "_rainfusion_dims", None)
    if dims is None:
        set_dims(tensor, dims := fresh_dims(tensor.shape))
    return dims


def set_dims(tensor: Tensor, dims: Dims, lineage: Lineage | None = None) -> None:
    """Say what a tensor's dimensions are made of, and what it is computed from; None leaves that as it is."""
    sizes = tuple(map(size_of, dims))
    assert sizes == tuple(tensor.shape), f"dims {dims} for a tensor of shape {tuple(tensor.shape)}"
    tensor._rainfusion_dims = dims  # type: ignore[attr-defined]
    if lineage is not None:
        tensor._rainfusion_lineage = lineage  # type: ignore[attr-defined]
    # position axes that first meet in one tensor make a mesh, whose order is that of the tensor
    found = [(number, axis) for number, dim in enumerate(dims) if len(dim) == 1 and (axis := find(dim[0])).coordinate]
    if len(found) > 1 and not set.intersection(*({key for key, _ in axis.sources} for _, axis in found)):
        mesh = Source(f"mesh {next(_meshes)}")
        for number, axis in found:
            axis.sources |= {(mesh, number)}


def fresh_dims(shape: Sequence[int], *, lost: str | None = None) -> Dims:
    """Dims of which nothing is known; or can be learnt, if they were `lost` in an operator that is not understood."""
    return tuple(fresh(size, lost=lost) for size in shape)


def set_mesh(tensors: Sequence[Tensor]) -> None:
    """Give the outputs of a `meshgrid` axes of their own, in its order."""
    shape = tensors[0].shape if tensors else ()
    dims = tuple((axis,) for axis in mesh_axes(shape, range(len(shape))))
    for tensor in tensors:
        set_dims(tensor, dims)


def mesh_axes(sizes: Sequence[int], places: Sequence[int]) -> list[Axis]:
    """Axes of these sizes that stand in a new mesh at these places."""
    mesh = Source(f"mesh {next(_meshes)}")
    return [
        Axis(size, sources=frozenset({(mesh, at)}), coordinate=True) for size, at in zip(sizes, places, strict=True)
    ]


def rule(names: str) -> Callable[[_AnyRule], _AnyRule]:
    """Let a function be the rule of the operators of these names."""

    def register(function: _AnyRule) -> _AnyRule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def numbers(dims: int | Sequence[int] | None, count: int) -> set[int]:
    """A `dim` argument as the numbers of dims from 0; none given means all, and a number by itself has none."""
    if not count or dims is None or (not isinstance(dims, int) and not dims):
        return set(range(count))
    return {dim % count for dim in ([dims] if isinstance(dims, int) else dims)}


@rule("where masked_fill lerp rsub clamp addcmul addcdiv polar complex")
def pointwise(call: Call) -> Dims:
    # the result is only written into `out`
    named = (value for name, value in call.kwargs.items() if name != "out")
    tensors = [value for value in (*call.args, *named) if isinstance(value, Tensor)]
    operands = [*map(dims_of, tensors)]
    out: list[Dim] = []
    for back, size in enumerate(reversed(call.out.shape), 1):
        dims = [one[-back] for one in operands if back <= len(one) and size_of(one[-back]) == size]
        out.append(paired(dims) if dims else fresh(size))
    return with_places(call, tensors, operands, out[::-1])


def repeated(call: Call, found: Sequence[Dim], before: Dims | None = None) -> Dims:
    """The dims of an operator that may repeat a slice of its first operand, of dims ``before``."""
    return with_places(call, [call.first], [before or dims_of(call.first)], found)


def with_places(call: Call, tensors: Sequence[Tensor], dims: Sequence[Dims], out: Sequence[Dim]) -> Dims:
    """The dims of an operator that pairs the elements of tensors: see `in_places`."""
    name = call.func._schema.name.removeprefix("aten::").removesuffix("_")
    sums = name in ("add", "sub", "rsub") and len(tensors) > 1
    found, placed = in_places(tensors, dims, out, weighs=None if sums else True)
    alpha = call.get("alpha")
    less = name in ("sub", "rsub") or (isinstance(alpha, (int, float)) and alpha < 0)
    found, told = of_others(name, tensors, dims, found, less=less)
    call.lineage = call.lineage._replace(placed=placed, told=told)
    return tuple(found)


def paired(dims: Sequence[Dim]) -> Dim:
    """The dim of operands whose indices an operator pairs.

    Of one index, it is that which says most; lost, if the operands are different indices of one axis.
    """
    if size_of(dims[0]) != 1:
        return reduce(unify, dims)
    indices = {(find(axis.cut.whole), axis.cut.start) for dim in dims for axis in map(find, dim) if axis.cut}
    if len(indices) > len({whole for whole, _ in indices}):
        return (Axis(1, lost="an operator that pairs different tokens"),)
    return max(dims, key=lambda dim: sum(axis.known for axis in dim))


@rule(
    "clone _to_copy detach alias lift lift_fresh contiguous _conj _neg_view resolve_conj resolve_neg nan_to_num fill"
    " zero normal uniform bernoulli random exponential native_dropout tril triu rrelu_with_noise prelu bucketize"
)
def keep(call: Call) -> Dims:
    """The first operand's dims, where the shape stays."""
    return _where_alike(call.first, call.out.shape)


@rule("copy")
def _copy(call: Call) -> Dims:
    """What is written over takes the source's dims, whatever it was before."""
    call.lineage = lineage_of(call["src"])
    dims = _where_alike(call["src"], call.out.shape)
    return (
        dims if call["src"].shape == call.out.shape else with_places(call, [call["src"]], [dims_of(call["src"])], dims)
    )


def _where_alike(tensor: Tensor, shape: Sequence[int]) -> Dims:
    dims = (*fresh_dims(shape[: len(shape) - tensor.dim()]), *dims_of(tensor))
    return tuple(dim if size_of(dim) == size else fresh(size) for dim, size in zip(dims, shape, strict=True))


@rule(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like"
    " new_empty new_zeros new_ones new_full new_empty_strided"
)
def _new(call: Call) -> Dims:
    """A tensor that only looks like another one."""
    call.lineage = Lineage()
    return fresh_dims(call.out.shape)
