# SPDX-License-Identifier: Apache-2.0
"""What each ATen operator does to the axes of its operands.

A rule takes a `Call` and returns the dims of the call's first output. Whatever has no rule, or more outputs than its
rule tells about, gets fresh axes: an operator that is not known here costs sparsity, never correctness.

Rules are found by the operator's name without its overload and without the underscore of in-place variants, so that
``aten::add_.Tensor`` is ``add``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rainfusion_compile.passes.axes import (
    Axis,
    Dim,
    Dims,
    Role,
    find,
    fresh,
    join,
    product,
    regroup,
    resolve,
    size_of,
    take,
)
from rainfusion_compile.passes.unify import unify, union

Rule = Callable[["Call"], Dims]
_RULES: dict[str, Rule] = {}
_meshes = itertools.count()


class Call:
    """One call of an ATen operator: arguments by the names of its schema, and its first output."""

    def __init__(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        self.func, self.args, self.kwargs, self.out = func, args, kwargs, out

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
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]


@cache
def _schema(func: torch._ops.OpOverload) -> dict[str, tuple[int, Any]]:
    arguments = enumerate(func._schema.arguments)
    return {argument.name: (number, argument.default_value) for number, argument in arguments}


def propagate(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Give the outputs of an operator their dims."""
    outs = [out] if isinstance(out, Tensor) else [item for item in out if isinstance(item, Tensor)]
    if not outs:
        return
    name = func._schema.name.removeprefix("aten::")
    if name in _SPLITS:
        for item, dims in zip(outs, _SPLITS[name](Call(func, args, kwargs, outs[0]), outs), strict=True):
            set_dims(item, dims)
        return
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = _pointwise
    for item in outs[1:] if rule else outs:
        set_dims(item, fresh_dims(item.shape))
    if rule is not None:
        set_dims(outs[0], rule(Call(func, args, kwargs, outs[0])))
        if outs[0] is args[0] and outs[0]._base is not None:
            _note_write(outs[0], outs[0]._base)


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


def mesh_dims(dims: Dims) -> Dims:
    """Axes of their own for the dims of a coordinate mesh, in its order."""
    mesh = ("mesh", next(_meshes))
    return tuple((Axis(size_of(dim), sources=[(mesh, number)], coordinate=True),) for number, dim in enumerate(dims))


def _note_mesh(dims: Dims) -> None:
    """Position axes that first meet in one tensor make a mesh, whose order is that of the tensor."""
    found = [(number, find(dim[0])) for number, dim in enumerate(dims) if len(dim) == 1]
    found = [(number, axis) for number, axis in found if axis.coordinate]
    if len(found) > 1 and not set.intersection(*({key for key, _ in axis.sources} for _, axis in found)):
        mesh = ("mesh", next(_meshes))
        for number, axis in found:
            axis.sources |= {(mesh, number)}


def _note_write(view: Tensor, base: Tensor) -> None:
    """What is written into a view in another order stands in another order in its base, too."""
    if any(map(_is_permuted, dims_of(view))):
        set_dims(base, tuple(map(_permuted, dims_of(base))))


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _numbers(dims: int | Sequence[int] | None, count: int) -> set[int]:
    """A `dim` argument as the numbers of dims from 0; none given means all."""
    if dims is None or (not isinstance(dims, int) and not dims):
        return set(range(count))
    return {dim % max(count, 1) for dim in ([dims] if isinstance(dims, int) else dims)}


# --- elementwise -----------------------------------------------------------------------------------------------------


def _pointwise(call: Call) -> Dims:
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


rule("where", "masked_fill", "lerp", "rsub", "clamp", "addcmul", "addcdiv", "polar", "complex")(_pointwise)


@rule(
    *("clone", "_to_copy", "detach", "alias", "lift", "lift_fresh", "contiguous", "_conj", "_neg_view"),
    *("fill", "zero", "normal", "uniform", "bernoulli", "random", "exponential", "resolve_conj", "resolve_neg"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "_fused_rms_norm"),
    *("_softmax", "_log_softmax", "_safe_softmax", "_masked_softmax", "cumsum", "cumprod", "logcumsumexp", "glu"),
    *("native_dropout", "tril", "triu", "rrelu_with_noise", "prelu", "nan_to_num", "rms_norm", "layer_norm"),
)
def _keep(call: Call) -> Dims:
    """The first operand's dims, where the shape stays."""
    dims = dims_of(call.first)
    return tuple(
        dims[number] if number < len(dims) and call.first.shape[number] == size else fresh(size)
        for number, size in enumerate(call.out.shape)
    )


rule("copy")(_pointwise)


# --- views -----------------------------------------------------------------------------------------------------------


@rule(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "view_as", "flatten", "unflatten"
)
def _view(call: Call) -> Dims:
    if call.first.numel() != call.out.numel():
        return _keep(call)
    return regroup(dims_of(call.first), tuple(call.first.shape), tuple(call.out.shape))


@rule("permute", "permute_copy")
def _permute(call: Call) -> Dims:
    dims = dims_of(call.first)
    return tuple(dims[dim] for dim in call["dims"])


@rule("transpose", "transpose_copy", "t", "t_copy", "swapaxes", "swapdims")
def _transpose(call: Call) -> Dims:
    dims = list(dims_of(call.first))
    if len(dims) > 1:
        one, two = (call["dim0"], call["dim1"]) if "dim0" in call else (0, 1)
        dims[one], dims[two] = dims[two], dims[one]
    return tuple(dims)


@rule("unsqueeze", "unsqueeze_copy")
def _unsqueeze(call: Call) -> Dims:
    dims = list(dims_of(call.first))
    dims.insert(call["dim"] % (len(dims) + 1), ())
    return tuple(dims)


@rule("squeeze", "squeeze_copy")
def _squeeze(call: Call) -> Dims:
    dims = dims_of(call.first)
    gone = _numbers(call.get("dim"), len(dims))
    return tuple(dim for number, dim in enumerate(dims) if number not in gone or call.first.shape[number] != 1)


@rule("expand", "expand_copy", "broadcast_to", "repeat", "tile")
def _expand(call: Call) -> Dims:
    """A repeated dim is a fresh axis of repetitions around the old one."""
    dims = dims_of(call.first)
    missing = call.out.dim() - len(dims)
    out = list(fresh_dims(call.out.shape[:missing]))
    for size, old, dim in zip(call.out.shape[missing:], call.first.shape, dims, strict=True):
        out.append(dim if size == old else (Axis(size // old), *dim) if old > 1 else fresh(size))
    return tuple(out)


@rule("slice", "slice_copy")
def _slice(call: Call) -> Dims:
    dims = list(dims_of(call.first))
    number = call["dim"]
    start, stop, step = slice(call["start"], call["end"], call["step"]).indices(call.first.shape[number])
    dims[number] = _taken(dims[number], start, stop, step)
    return tuple(dims)


def _taken(dim: Dim, start: int, stop: int, step: int = 1) -> Dim:
    piece = take(dim, start, stop, step)
    assert piece is not None
    return piece


@rule("select", "select_copy")
def _select(call: Call) -> Dims:
    dims = list(dims_of(call.first))
    del dims[call["dim"]]
    return tuple(dims)


@rule("view_as_complex")
def _as_complex(call: Call) -> Dims:
    return dims_of(call.first)[:-1]


@rule("view_as_real", "view_as_real_copy")
def _as_real(call: Call) -> Dims:
    return (*dims_of(call.first), fresh(2))


def _split(call: Call, outs: list[Tensor]) -> list[Dims]:
    dims, number = list(dims_of(call.first)), call["dim"]
    dim, start, found = dims[number], 0, []
    for out in outs:
        stop = start + out.shape[number]
        dims[number] = _taken(dim, start, stop)
        found.append(tuple(dims))
        start = stop
    return found


def _unbind(call: Call, outs: list[Tensor]) -> list[Dims]:
    return [_select(call)] * len(outs)


_SPLITS: dict[str, Callable[[Call, list[Tensor]], list[Dims]]] = {
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk"), _split),
    **dict.fromkeys(("unsafe_chunk", "split_copy", "split_with_sizes_copy", "tensor_split"), _split),
    **dict.fromkeys(("unbind", "unbind_copy"), _unbind),
}


# --- joining ---------------------------------------------------------------------------------------------------------


def _unified(tensors: list[Tensor], but: int | None = None) -> list[Dim]:
    """The dims of tensors whose elements stand side by side in all dims but one."""
    dims = list(dims_of(tensors[0]))
    for tensor in tensors[1:]:
        for number, dim in enumerate(dims_of(tensor)):
            if number != but:
                dims[number] = unify(dims[number], dim)
    return dims


@rule("cat", "concat", "concatenate")
def _cat(call: Call) -> Dims:
    # an empty 1-D tensor may be concatenated with anything
    tensors = [tensor for tensor in call["tensors"] if tensor.dim() == call.out.dim()]
    number = call["dim"] % call.out.dim()
    dims = _unified(tensors, number)
    dims[number] = join(dims_of(tensor)[number] for tensor in tensors)
    return tuple(dims)


@rule("stack")
def _stack(call: Call) -> Dims:
    dims = _unified(call["tensors"])
    dims.insert(call["dim"] % (len(dims) + 1), fresh(len(call["tensors"])))
    return tuple(dims)


@rule("constant_pad_nd")
def _pad(call: Call) -> Dims:
    dims = list(dims_of(call.first))
    pad = call["pad"]
    for number in range(len(pad) // 2):
        at, size = len(dims) - 1 - number, call.first.shape[len(dims) - 1 - number]
        before, after = pad[2 * number], pad[2 * number + 1]
        kept = _taken(dims[at], max(-before, 0), size + min(after, 0))
        dims[at] = join([(Axis(max(before, 0)),), kept, (Axis(max(after, 0)),)])
    return tuple(dims)


# --- products --------------------------------------------------------------------------------------------------------


@rule("mm", "_int_mm", "_scaled_mm")
def _mm(call: Call) -> Dims:
    return dims_of(call.args[0])[0], dims_of(call.args[1])[1]


@rule("addmm")
def _addmm(call: Call) -> Dims:
    return dims_of(call["mat1"])[0], dims_of(call["mat2"])[1]


@rule("bmm", "baddbmm")
def _bmm(call: Call) -> Dims:
    one, two = (call["batch1"], call["batch2"]) if "batch1" in call else (call["self"], call["mat2"])
    return unify(dims_of(one)[0], dims_of(two)[0]), dims_of(one)[1], dims_of(two)[2]


@rule("linear", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")
@rule("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu")
def _all_but_last(call: Call) -> Dims:
    return (*dims_of(call.first)[:-1], fresh(call.out.shape[-1]))


# --- convolutions and the like ---------------------------------------------------------------------------------------

_ROLES: dict[int, tuple[Role | None, ...]] = {1: (None,), 2: ("row", "col"), 3: ("time", "row", "col")}


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution")
def _convolution(call: Call) -> Dims:
    """Space and time are born here: ``[N, C, T, H, W]`` or ``[N, C, H, W]``."""
    dims, shape = dims_of(call.first), call.out.shape
    spatial = []
    for number, role in enumerate(_ROLES.get(len(shape) - 2, ()), 2):
        axis = Axis(shape[number], role=role)
        old = resolve(dims[number])
        # positions that stay as they were, each in its place, are the same axis
        stays = call.first.shape[number] == axis.size and set(call["stride"]) == {1}
        if stays and len(old) == 1 and old[0].role in (None, role) and not old[0].permuted:
            union(old[0], axis)
        spatial.append((axis,))
    return (dims[0], fresh(shape[1]), *spatial)


@rule(
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d"),
    *("_adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
    *("upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact3d"),
)
def _resample(call: Call) -> Dims:
    """Rows stay rows, though others."""
    dims = dims_of(call.first)
    out = []
    for size, old, dim in zip(call.out.shape, call.first.shape, dims, strict=True):
        axes = [axis for axis in resolve(dim) if axis.size > 1 or axis.role]
        out.append(dim if size == old else (Axis(size, role=axes[0].role if len(axes) == 1 else None),))
    return tuple(out)


# --- reductions ------------------------------------------------------------------------------------------------------


@rule(
    *(
        "sum",
        "nansum",
        "mean",
        "prod",
        "amax",
        "amin",
        "max",
        "min",
        "any",
        "all",
        "var",
        "std",
        "var_mean",
        "std_mean",
    ),
    *("argmax", "argmin", "logsumexp", "linalg_vector_norm", "norm", "median", "count_nonzero", "mode", "kthvalue"),
)
def _reduce(call: Call) -> Dims:
    dims = dims_of(call.first)
    if "other" in call:
        return _pointwise(call)
    gone = _numbers(call.get("dim"), len(dims))
    if call.get("keepdim"):
        return tuple(() if number in gone else dim for number, dim in enumerate(dims))
    return tuple(dim for number, dim in enumerate(dims) if number not in gone)


# --- indexing and order ----------------------------------------------------------------------------------------------


@rule("arange", "linspace", "logspace", "range")
def _arange(call: Call) -> Dims:
    size = call.out.shape[0]
    backwards = "step" in call and call["step"] < 0
    return (_reordered(size) if backwards else (Axis(size, coordinate=True),),)


@rule("embedding")
def _embedding(call: Call) -> Dims:
    return (*dims_of(call["indices"]), dims_of(call["weight"])[1])


def _reordered(size: int) -> Dim:
    return () if size == 1 else (Axis(size, permuted=True),)


def _is_permuted(dim: Dim) -> bool:
    return any(axis.permuted for axis in resolve(dim))


def _permuted(dim: Dim) -> Dim:
    """A dim in an unknown order; the same one again for the same dim."""
    if size_of(dim) == 1 or _is_permuted(dim):
        return dim
    whole = product(resolve(dim))
    whole.reordered = whole.reordered or Axis(whole.size, permuted=True)
    return (whole.reordered,)


def _indexed(dim: Dim, index: Dim) -> Dim:
    """The dim that takes the place of `dim` where an index is looked up.

    That is the index' own, if `dim` is that of a table. Tokens, however, are put in an order that is not known.
    """
    axes = resolve(dim)
    tokens = len(axes) > 1 or any(axis.role or axis.parts or axis.sources - _mesh_sources(axis) for axis in axes)
    return _permuted(index) if tokens else index


def _mesh_sources(axis: Axis) -> frozenset[tuple[Hashable, int]]:
    return frozenset(source for source in axis.sources if isinstance(source[0], tuple))


@rule("index_select")
def _index_select(call: Call) -> Dims:
    dims, number = list(dims_of(call.first)), call["dim"]
    if dims:
        dims[number] = _indexed(dims[number], dims_of(call["index"])[0] if call["index"].dim() else ())
    return tuple(dims)


@rule("gather", "take_along_dim")
def _gather(call: Call) -> Dims:
    dims, number = dims_of(call.first), call["dim"] % max(call.out.dim(), 1)
    return tuple(
        _indexed(dim, index) if at == number or size_of(dim) != size_of(index) else unify(dim, index)
        for at, (dim, index) in enumerate(zip(dims, dims_of(call["index"]), strict=True))
    )


@rule("index", "_unsafe_index")
def _index(call: Call) -> Dims:
    dims, indices = dims_of(call.first), list(call["indices"])
    used = [number for number, index in enumerate(indices) if index is not None]
    if not used or any(indices[number].dtype in (torch.bool, torch.uint8) for number in used):
        return fresh_dims(call.out.shape)
    kept = [dim for number, dim in enumerate(dims) if number not in used]
    # indices side by side put their dims where they stand, others put them in front
    front = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    shape = call.out.shape[front : front + call.out.dim() - len(kept)]
    largest = max((indices[number] for number in used), key=lambda index: index.numel())
    index = dims_of(largest) if tuple(largest.shape) == tuple(shape) else fresh_dims(shape)
    looked_up = tuple(axis for number in used for axis in dims[number])
    return (*kept[:front], *(_indexed(looked_up, dim) for dim in index), *kept[front:])


@rule("flip", "roll", "sort", "argsort", "topk")
def _reorder(call: Call) -> Dims:
    dims = dims_of(call.first)
    gone = _numbers(call.get("dims") or call.get("dim"), len(dims))
    sizes = zip(dims, call.out.shape, strict=True)
    return tuple(_reordered(size) if number in gone else dim for number, (dim, size) in enumerate(sizes))


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce")
@rule("index_put", "_index_put_impl", "_unsafe_index_put", "masked_scatter", "put")
def _write(call: Call) -> Dims:
    """Whatever is written somewhere among tokens changes their order."""
    dims = dims_of(call.first)
    used = _numbers(call.get("dim"), len(dims))
    if "indices" in call:
        used = {number for number, index in enumerate(call["indices"]) if index is not None}
    return tuple(_indexed(dim, dim) if number in used else dim for number, dim in enumerate(dims))


@rule("randperm")
def _randperm(call: Call) -> Dims:
    return (_reordered(call.out.shape[0]),)
