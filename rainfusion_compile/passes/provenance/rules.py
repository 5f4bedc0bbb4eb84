# SPDX-License-Identifier: Apache-2.0
"""What each ATen operator does to the axes of its operands.

A rule takes a `Call` and returns the dims of the call's first output. Whatever has no rule makes axes that are `lost`:
they never become anything else, so an operator that is not known here costs sparsity, never correctness. The same holds
for what it may write into, as its schema says.

Rules are found by the operator's name without its overload and without the underscore of in-place variants, so that
``aten::add_.Tensor`` is ``add``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, Source, find, fresh, lost, size_of
from rainfusion_compile.passes.provenance.lineage import Lineage, lineage_of, set_lineage, union_of
from rainfusion_compile.passes.provenance.unify import unify

Rule = Callable[["Call"], Dims]
RULES: dict[str, Rule] = {}
# operators with several outputs that all have dims
SPLITS: dict[str, Callable[[Call, list[Tensor]], list[tuple[Dims, Lineage]]]] = {}
_meshes = itertools.count()


class Call:
    """One call of an ATen operator: arguments by the names of its schema, and its first output."""

    def __init__(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        self.func, self.args, self.kwargs, self.out = func, args, kwargs, out
        self.lineage: Lineage | None = None  # those of all operands, if no rule sets others

    def __getitem__(self, name: str) -> Any:
        position, default = _schema(self.func)[name]
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in _schema(self.func)

    def get(self, name: str) -> Any:
        """The argument, None if the operator has no such."""
        return self[name] if name in _schema(self.func) else None

    @property
    def first(self) -> Tensor:
        return self.args[0]

    @property
    def tensors(self) -> list[Tensor]:
        """The operands; not what the result is only written into."""
        named = (value for name, value in self.kwargs.items() if name != "out")
        return [value for value in (*self.args, *named) if isinstance(value, Tensor)]


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


def propagate(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, written: list[Tensor]
) -> None:
    """Give the outputs of an operator, and what it has `written` into, their dims and lineage."""
    operands = list(tensors_in((*args, *kwargs.values())))
    outs = list(tensors_in((out,)))
    name = func._schema.name.removeprefix("aten::")
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = pointwise
    lineage = union_of(operands)
    for item in (*written, *outs) if rule is None else (x for x in written if all(x is not out for out in outs)):
        # what is made of nothing but numbers is new; only what was there before can be lost
        set_dims(item, lost_dims(item.shape, name) if operands else fresh_dims(item.shape))
        set_lineage(item, lineage)
    if not outs:
        return
    call = Call(func, args, kwargs, outs[0])
    if name in SPLITS:
        for item, (dims, piece) in zip(outs, SPLITS[name](call, outs), strict=True):
            set_dims(item, dims)
            set_lineage(item, piece)
    elif rule is not None:
        set_dims(outs[0], rule(call))
        for item in outs[1:]:
            set_dims(item, _beside(item, outs[0], name))
        for item in outs:
            set_lineage(item, lineage if call.lineage is None else call.lineage)


def _beside(item: Tensor, first: Tensor, name: str) -> Dims:
    """The dims of a further output: statistics or indices, one for each element of the first, or of a row."""
    if item.dim() != first.dim():
        return lost_dims(item.shape, name)
    sizes = zip(item.shape, first.shape, dims_of(first), strict=True)
    return tuple(dim if size == other else lost(size, name) for size, other, dim in sizes)


def dims_of(tensor: Tensor) -> Dims:
    """The dims of a tensor; fresh ones if it has none yet."""
    dims: Dims | None = getattr(tensor, "_rainfusion_dims", None)
    if dims is None:
        dims = fresh_dims(tensor.shape)
        set_dims(tensor, dims)
    return dims


def set_dims(tensor: Tensor, dims: Dims) -> None:
    """Say what a tensor's dimensions are made of."""
    sizes = tuple(map(size_of, dims))
    assert sizes == tuple(tensor.shape), f"dims {dims} for a tensor of shape {tuple(tensor.shape)}"
    tensor._rainfusion_dims = dims  # type: ignore[attr-defined]
    _note_mesh(dims)


def fresh_dims(shape: Sequence[int]) -> Dims:
    """Dims of which nothing is known."""
    return tuple(map(fresh, shape))


def lost_dims(shape: Sequence[int], where: str) -> Dims:
    """Dims of which nothing can be known: what an operator made that is not understood."""
    return tuple(lost(size, where) for size in shape)


def mesh_dims(dims: Dims) -> Dims:
    """Axes of their own for the dims of a coordinate mesh, in its order."""
    mesh = Source(f"mesh {next(_meshes)}")
    return tuple((Axis(size_of(dim), sources=[(mesh, number)], coordinate=True),) for number, dim in enumerate(dims))


def _note_mesh(dims: Dims) -> None:
    """Position axes that first meet in one tensor make a mesh, whose order is that of the tensor."""
    found = [(number, find(dim[0])) for number, dim in enumerate(dims) if len(dim) == 1]
    found = [(number, axis) for number, axis in found if axis.coordinate]
    if len(found) > 1 and not set.intersection(*({key for key, _ in axis.sources} for _, axis in found)):
        mesh = Source(f"mesh {next(_meshes)}")
        for number, axis in found:
            axis.sources |= {(mesh, number)}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def numbers(dims: int | Sequence[int] | None, count: int) -> set[int]:
    """A `dim` argument as the numbers of dims from 0; none given means all."""
    if dims is None or (not isinstance(dims, int) and not dims):
        return set(range(count))
    return {dim % max(count, 1) for dim in ([dims] if isinstance(dims, int) else dims)}


# --- elementwise -----------------------------------------------------------------------------------------------------


def pointwise(call: Call) -> Dims:
    operands = [(dims_of(tensor), tuple(tensor.shape)) for tensor in call.tensors]
    out: list[Dim] = []
    for back, size in enumerate(reversed(call.out.shape), 1):
        dim: Dim | None = None
        for dims, shape in operands:
            if back > len(dims) or shape[-back] != size:
                continue
            if dim is None:
                dim = dims[-back]
            elif size == 1:
                dim = max(dim, dims[-back], key=lambda axes: sum(axis.known for axis in axes))
            else:
                dim = unify(dim, dims[-back])
        out.append(fresh(size) if dim is None else dim)
    return tuple(reversed(out))


rule("where", "masked_fill", "lerp", "rsub", "clamp", "addcmul", "addcdiv", "polar", "complex")(pointwise)


@rule(
    *("clone", "_to_copy", "detach", "alias", "lift", "lift_fresh", "contiguous", "_conj", "_neg_view"),
    *("fill", "zero", "normal", "uniform", "bernoulli", "random", "exponential", "resolve_conj", "resolve_neg"),
    *("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "_fused_rms_norm"),
    *("_softmax", "_log_softmax", "_safe_softmax", "_masked_softmax", "cumsum", "cumprod", "logcumsumexp", "glu"),
    *("native_dropout", "tril", "triu", "rrelu_with_noise", "prelu", "nan_to_num", "rms_norm", "layer_norm"),
)
def keep(call: Call) -> Dims:
    """The first operand's dims, where the shape stays."""
    dims = dims_of(call.first)
    return tuple(
        dims[number] if number < len(dims) and call.first.shape[number] == size else fresh(size)
        for number, size in enumerate(call.out.shape)
    )


@rule("copy")
def _copy(call: Call) -> Dims:
    """What is written over takes the source's dims, whatever it was before."""
    dims, missing = dims_of(call["src"]), call.out.dim() - call["src"].dim()
    call.lineage = lineage_of(call["src"])
    return tuple(
        dims[number - missing] if number >= missing and call["src"].shape[number - missing] == size else fresh(size)
        for number, size in enumerate(call.out.shape)
    )


@rule("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
@rule("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")
def _new(call: Call) -> Dims:
    """A tensor that only looks like another one."""
    call.lineage = Lineage()
    return fresh_dims(call.out.shape)
