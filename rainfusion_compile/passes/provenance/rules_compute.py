# SPDX-License-Identifier: Apache-2.0
"""Provenance rules of operators that compute: products, convolutions, reductions, and indexing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rainfusion_compile.passes.provenance.axes import (
    flipped,
    in_order,
    is_of_data,
    made_of,
    origins,
    permuted,
    reach_of,
    resolve,
    was_of_data,
)
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, Role, fresh, long, size_of
from rainfusion_compile.passes.provenance.find_layout import ROLES, may_be, mixes_tokens
from rainfusion_compile.passes.provenance.lineage import Placed, lineage_of, union_of
from rainfusion_compile.passes.provenance.places import together
from rainfusion_compile.passes.provenance.rules import (
    Call,
    dims_of,
    fresh_dims,
    keep,
    numbers,
    repeated,
    rule,
    with_places,
)
from rainfusion_compile.passes.provenance.unify import unify, union


@rule("mm _int_mm _scaled_mm addmm")
def _mm(call: Call) -> Dims:
    one, two = (call["mat1"], call["mat2"]) if "mat1" in call else call.args[:2]
    (left, ours), (theirs, right) = dims_of(one), dims_of(two)
    call.lineage = lineage_of(one if _may_be_tokens(left) or not _may_be_tokens(right) else two).in_layer()
    return _product(call, (one, two), (left, ours), (theirs, right))


@rule("bmm baddbmm")
def _bmm(call: Call) -> Dims:
    one, two = (call["batch1"], call["batch2"]) if "batch1" in call else (call["self"], call["mat2"])
    (batch, left, ours), (other, theirs, right) = dims_of(one), dims_of(two)
    tokens = [tensor for tensor, free in ((one, left), (two, right)) if _may_be_tokens(free)]
    call.lineage = union_of(tokens or [one, two]).in_layer()  # weights are nobody's tokens
    return _product(call, (one, two), (left, ours), (theirs, right), (unify(batch, other),))


def _may_be_tokens(dim: Dim) -> bool:
    return any(map(is_of_data, resolve(dim)))


def _product(call: Call, tensors: Sequence[Tensor], left: Dims, right: Dims, batch: Dims = ()) -> Dims:
    """``[i, k] x [k, j]``. A matrix that mixes tokens, along `k`, makes new ones of them.

    Where there is one `k`, numbers are multiplied: they may put slices in places.
    """
    (i, ours), (theirs, j) = left, right
    found = (*batch, free_dim(theirs, i), free_dim(ours, j))
    one_each = size_of(ours) == 1
    return with_places(call, tensors, [(*batch, i, ()), (*batch, (), j)], found) if one_each else found


def free_dim(summed: Dim, free: Dim) -> Dim:
    """The dim of one operand that stays where the other is summed over a dim."""
    return fresh(size_of(free), lost="product") if mixes_tokens(summed) and not _may_be_tokens(free) else free


@rule(
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu"
    " _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
)
def _all_but_last(call: Call) -> Dims:
    dims = dims_of(call.first)
    return (*dims[:-1], free_dim(dims[-1], fresh(call.out.shape[-1])))


@rule("convolution _convolution cudnn_convolution mkldnn_convolution")
def _convolution(call: Call) -> Dims:
    """Space and time are born here: ``[N, C, T, H, W]`` or ``[N, C, H, W]``.

    An axis keeps the role that it has: convolutions also run over ``[N, C, T, H * W]`` or rows of frames in the batch.
    Such ones have axes that are products or something else already, and name nothing. Nor does a kernel of ``k x 1``.
    """
    batch, channels, *dims = dims_of(call.first)
    features = free_dim(channels, fresh(call.out.shape[1]))
    alone = call["groups"] == call.first.shape[1] > 1  # each channel, so no features are made of others
    call.lineage = lineage_of(call.first) if alone else lineage_of(call.first).in_layer()
    sizes, old_sizes, kernel = call.out.shape[2:], call.first.shape[2:], call["weight"].shape[2:]
    roles: Sequence[Role | None] = ROLES[-len(kernel) :]
    along_one = len(kernel) == 2 and min(kernel) == 1 < max(kernel)
    mixes = any(axis.lost for axis in features)
    if len(kernel) not in (2, 3) or along_one or mixes or not may_be(list(map(resolve, dims)), roles):
        roles = (None,) * len(kernel)
    spatial = []
    for dim, role, size, old_size in zip(dims, roles, sizes, old_sizes, strict=True):
        # positions that stay as they were, each in its place, are the same axis
        stays = size == old_size and set(call["stride"]) == {1}
        axes = resolve(dim) or ((Axis(1),) if role else ())
        if stays and role is not None:
            union((long(axes) or axes)[0], Axis(size, role=role))
        found, placed = axes if stays else _resized(dim, size, role), set[Placed]()
        if old_size == 1 < size:  # as a kernel says
            found, placed = together([(call.first, ())], found, places=True)
        call.lineage = call.lineage._replace(placed=call.lineage.placed | placed)
        spatial.append(found)
    moved = _moved(call, (batch, features, *spatial), kernel, call["stride"])
    return _pooled(call, moved) if alone and set(call["stride"]) != {1} else moved


def _moved(call: Call, dims: Dims, kernel: Sequence[int], stride: Sequence[int]) -> Dims:
    """These dims, along whose last ones a kernel that goes on by single steps may have moved what was there."""
    spatial = dims[-len(kernel) :] if set(stride) == {1} else ()
    axes = (axis for length, dim in zip(kernel, spatial, strict=False) if length > 1 for axis in resolve(dim))
    call.lineage = call.lineage.picked(axes, moved=True)
    return dims


def _resized(dim: Dim, size: int, role: Role | None = None) -> Dim:
    """The dim that other positions along a dim make, in the same direction."""
    axes = [axis for axis in resolve(dim) if axis.size > 1 or axis.role]
    if len(axes) > 1 or not all(map(in_order, axes)):
        return fresh(size, lost="convolution or resampling")
    (axis,) = axes or [Axis(1)]
    return (Axis(size, role=axis.role or role, sources=axis.sources, resampled=reach_of(dim)),)


@rule(
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d"
    " upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d"
    " upsample_trilinear3d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa"
    " _upsample_bicubic2d_aa"
)
def _resample(call: Call) -> Dims:
    """Rows stay rows, though others."""
    sizes = zip(call.out.shape, call.first.shape, dims_of(call.first), strict=True)
    found = repeated(call, [dim if size == old else _resized(dim, size) for size, old, dim in sizes])
    return _pooled(call, _moved(call, found, call.get("kernel_size") or (), call.get("stride") or ()))


def _pooled(call: Call, dims: Dims) -> Dims:
    """These dims, some of which are of other positions, of the same features."""
    axes = [axis for dim, old in zip(dims, dims_of(call.first), strict=True) if dim != old for axis in resolve(dim)]
    pooled = (one for axis in axes for cut in made_of(axis)[1:] for one in origins(cut.whole))
    call.lineage = call.lineage._replace(pooled=call.lineage.pooled.union(pooled))
    return dims


@rule("reflection_pad1d reflection_pad2d reflection_pad3d")
def _padded(call: Call) -> Dims:
    """Rows twice, backwards the second time."""
    sizes = zip(call.out.shape, call.first.shape, dims_of(call.first), strict=True)
    name = call.func._schema.name.split("::")[1]
    return tuple(dim if size == old else fresh(size, lost=name) for size, old, dim in sizes)


@rule(
    "sum nansum mean prod amax amin max min any all var std var_mean std_mean argmax argmin logsumexp"
    " linalg_vector_norm norm median count_nonzero mode kthvalue"
)
def _reduce(call: Call) -> Dims:
    dims = dims_of(call.first)
    gone, kept = numbers(call.get("dim"), len(dims)), call.get("keepdim")
    return tuple(() if number in gone else dim for number, dim in enumerate(dims) if kept or number not in gone)


@rule("cumsum cumprod logcumsumexp")
def _scan(call: Call) -> Dims:
    dims = keep(call)
    return _spread(call, dims, [dims[at] for at in numbers(call["dim"], len(dims))])


@rule("_softmax _safe_softmax _masked_softmax")
def _softmax(call: Call) -> Dims:
    dims = keep(call)
    return _spread(call, dims, [dims[at] for at in numbers(call["dim"], len(dims)) if was_of_data(dims[at])])


@rule("native_group_norm native_batch_norm _native_batch_norm_legit")
def _norm_of_channels(call: Call) -> Dims:
    dims = keep(call)
    return _spread(call, dims, dims[2:]) if call.get("training") is not False else dims


def _spread(call: Call, dims: Dims, along: Iterable[Dim]) -> Dims:
    """These dims, of which some may have brought what was in one place to all others."""
    if lineage_of(call.first).inputs:  # what numbers become are numbers
        call.lineage = call.lineage.picked((axis for dim in along for axis in resolve(dim)), moved=True)
    return dims


@rule("layer_norm native_layer_norm rms_norm _fused_rms_norm")
def _normalized(call: Call) -> Dims:
    dims = keep(call)
    return _mixed(call, dims, range(len(dims) - len(call["normalized_shape"]), len(dims)))


@rule("_log_softmax")
def _log_softmax(call: Call) -> Dims:
    dims = keep(call)
    return _mixed(call, dims, numbers(call["dim"], len(dims)))


def _mixed(call: Call, dims: Dims, along: Iterable[int]) -> Dims:
    """These dims, lost where they may run over tokens, of which each may have become anything of all."""
    lost = {at for at in along if was_of_data(dims[at])}
    name = call.func._schema.name.split("::")[1]
    return tuple(fresh(size_of(dim), lost=name) if at in lost else dim for at, dim in enumerate(dims))


@rule("glu")
def _glu(call: Call) -> Dims:
    dims, at = list(dims_of(call.first)), call["dim"] % max(call.out.dim(), 1)
    dims[at] = fresh(call.out.shape[at], lost="glu" if was_of_data(dims[at]) else None)
    return tuple(dims)


@rule("arange linspace logspace range")
def _arange(call: Call) -> Dims:
    size = call.out.shape[0]
    backwards = "step" in call and call["step"] < 0
    return (fresh(size, permuted=True) if backwards else (Axis(size, coordinate=True),),)


@rule("randperm")
def _randperm(call: Call) -> Dims:
    return (fresh(call.out.shape[0], permuted=True),)


@rule("embedding")
def _embedding(call: Call) -> Dims:
    rows, features = dims_of(call["weight"])
    return (*(_indexed(rows, dim) for dim in dims_of(call["indices"])), features)


def _indexed(dim: Dim, index: Dim) -> Dim:
    """The dim that takes the place of `dim` where an index is looked up.

    That is the index' own, if `dim` is that of a table: it has one axis, or more look-ups than rows. Tokens, however,
    are put in an order that is not known.
    """
    return permuted(index) if _told(dim) or (len(dim) > 1 and size_of(index) <= size_of(dim)) else index


def _told(dim: Dim) -> bool:
    """Whether a dim is known to run over tokens, or may have before they were lost."""
    axes = resolve(dim)
    return any(axis.role or axis.parts or axis.permuted or any(of.rank for of, _ in axis.sources) for axis in axes)


@rule("gather take_along_dim")
def _gather(call: Call) -> Dims:
    dims, number = dims_of(call.first), call["dim"] % max(call.out.dim(), 1)
    found = [
        _indexed(dim, index) if at == number or size_of(dim) != size_of(index) else unify(dim, index)
        for at, (dim, index) in enumerate(zip(dims, dims_of(call["index"]), strict=True))
    ]
    return repeated(call, found)


@rule("index _unsafe_index index_select")
def _index(call: Call) -> Dims:
    dims = dims_of(call.first)
    indices = call["indices"] if "indices" in call else [None] * (call["dim"] % max(len(dims), 1)) + [call["index"]]
    used = [number for number, index in enumerate(indices) if index is not None]
    if not used or not dims or any(indices[number].dtype in (torch.bool, torch.uint8) for number in used):
        return fresh_dims(call.out.shape, lost="index")
    kept = [dim for number, dim in enumerate(dims) if number not in used]
    # indices side by side put their dims where they stand, others put them in front
    front = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    shape = call.out.shape[front : front + call.out.dim() - len(kept)]
    largest = max((indices[number] for number in used), key=lambda index: index.numel())
    index = dims_of(largest) if tuple(largest.shape) == tuple(shape) else fresh_dims(shape, lost="index")
    looked_up = tuple(axis for number in used for axis in dims[number])
    before = [() if size_of(looked_up) == 1 else dim for dim in index]
    found = [*kept[:front], *(_indexed(looked_up, dim) for dim in index), *kept[front:]]
    return repeated(call, found, (*kept[:front], *before, *kept[front:]))


@rule("flip")
def _flip(call: Call) -> Dims:
    dims = dims_of(call.first)
    gone = numbers(call["dims"], len(dims)) if call["dims"] else set()
    return tuple(flipped(dim) if number in gone else dim for number, dim in enumerate(dims))


@rule("roll sort argsort topk")
def _reorder(call: Call) -> Dims:
    dims = dims_of(call.first)
    gone = numbers(call.get("dims") or call.get("dim"), len(dims))
    sizes = zip(dims, call.out.shape, strict=True)
    return tuple(fresh(size, permuted=True) if at in gone else dim for at, (dim, size) in enumerate(sizes))


@rule(
    "scatter scatter_add scatter_reduce index_add index_copy index_fill index_reduce"
    " index_put _index_put_impl _unsafe_index_put masked_scatter put"
)
def _write(call: Call) -> Dims:
    """Whatever is written somewhere among tokens changes their order.

    A mask leaves everything in its place if one value, or one row, is written everywhere; other tokens come from
    anywhere. A new tensor that is filled piece by piece has the order that positions will say, unless the pieces are
    single slices of one axis.
    """
    written = list(dims_of(call.first))
    if not written or call.func._schema.name.removesuffix("_") == "aten::put":  # by index of all elements
        return fresh_dims(call.out.shape, lost="put" if written else None)
    indices: dict[int, Any] = {}
    number = 0
    for index in [call["mask"]] if "mask" in call else call.get("indices") or ():
        indices[number] = index
        number += index.dim() if isinstance(index, Tensor) and _is_mask(index) else 1  # a mask is over several dims
    if "index" in call:  # of every element, or of slices
        indices = dict.fromkeys(numbers(call.get("dim"), len(written)), call["index"])
    values: Any = next((call[name] for name in ("values", "source", "src") if name in call), None)
    placed = set[Placed]()
    by_place = [at for at, index in indices.items() if isinstance(index, Tensor) and not _is_mask(index)]
    if len(by_place) > 1 and isinstance(values, Tensor) and lineage_of(values).inputs:
        for at in by_place:  # places along several dims at once are in no order along any
            written[at] = fresh(size_of(written[at]), lost="a write by several indices")
        indices = {at: index for at, index in indices.items() if at not in by_place}
    for number, index in indices.items():
        if not isinstance(index, Tensor):
            continue
        if "index" not in call and _is_mask(index):
            covered = range(number, number + index.dim()) if "indices" in call else range(len(written))
            beside = math.prod(size for at, size in enumerate(call.out.shape) if at not in covered)
            single = values.numel() <= beside
            for at in () if single or not lineage_of(values).inputs else covered:
                written[at] = fresh(size_of(written[at]), lost="a write by a mask")
        else:
            covered = range(number, number + 1)
            each = "index" in call and index.dim() == call.out.dim()
            count = index.shape[number] if each else index.numel()
            single = count == 1
            if count == call.out.shape[number] or _told(written[number]):
                written[number] = permuted(written[number])
        for at in covered if isinstance(values, Tensor) else ():
            own: Dim = ()
            if not single:  # the dim of the values that goes there, if they have all dims
                own = (
                    dims_of(values)[at] if values.dim() == len(written) else dims_of(values)[0] if values.dim() else ()
                )
            operands = [(call.first, written[at]), (values, ())]
            written[at], here = together(operands, written[at], places=True, written=own)
            placed |= here
    call.lineage = call.lineage._replace(placed=call.lineage.placed | placed)
    return tuple(written)


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)
