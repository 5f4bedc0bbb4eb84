# SPDX-License-Identifier: Apache-2.0
"""Provenance rules of views, and of operators that put tensors together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import accumulate, chain, pairwise

from torch import Tensor

from rainfusion_compile.passes.provenance.axes import (
    is_of_data,
    join,
    permuted,
    product,
    resolve,
    slice_of,
    spread,
    take,
    was_of_data,
)
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, find, fresh, size_of
from rainfusion_compile.passes.provenance.lineage import (
    Lineage,
    all_alike,
    indices_of,
    lineage_of,
    picked_apart,
    several,
    side_by_side,
)
from rainfusion_compile.passes.provenance.others import of_others_beside
from rainfusion_compile.passes.provenance.places import in_places
from rainfusion_compile.passes.provenance.ranks import take_part
from rainfusion_compile.passes.provenance.rules import (
    Call,
    Split,
    dims_of,
    fresh_dims,
    mesh_axes,
    numbers,
    paired,
    repeated,
    rule,
)
from rainfusion_compile.passes.provenance.unify import unify


@rule("view _unsafe_view reshape _reshape_alias _reshape view_as flatten unflatten")
def _view(call: Call) -> Dims:
    dims = dims_of(call.first)
    if call.first.numel() == call.out.numel():
        return regroup(dims, call.out.shape)
    # other numbers are made of the same bytes, along the last dim
    lost = "view" if was_of_data(dims[-1]) else None
    return (*dims[:-1], fresh(call.out.shape[-1], lost=lost))


def regroup(dims: Dims, shape: Sequence[int]) -> Dims:
    """The dims of a view of this shape: neighbouring ones merge, and others split."""
    if any(size_of(dim) == 0 for dim in dims):
        return fresh_dims(shape)
    out: list[Dim] = []
    old, new = list(reversed(dims)), list(reversed(shape))
    while old or new:
        group, sizes = [old.pop()] if old else [], [new.pop()] if new else []
        while (have := size_of(chain(*group))) != (want := math.prod(sizes)):
            if have < want:
                group.append(old.pop())
            else:
                sizes.append(new.pop())
        # A dim of size one belongs to this group or to the next: where dims merge, it stays with its kin.
        while old and size_of(old[-1]) == 1:
            if new and (new[-1] == 1 or len(group) == 1 or not _kin(chain(*group), old[-1])):
                break
            group.append(old.pop())
        out += group if len(group) == len(sizes) == 1 else _distribute(group, tuple(sizes))
    return tuple(out)


def _kin(axes: Iterable[Axis], others: Iterable[Axis]) -> bool:
    ours, theirs = list(map(find, axes)), list(map(find, others))
    tensors = {tensor for axis in ours for tensor, _ in axis.sources}
    role = any(axis.role for axis in ours)
    return any((role and axis.role) or any(tensor in tensors for tensor, _ in axis.sources) for axis in theirs)


def _distribute(group: list[Dim], sizes: tuple[int, ...]) -> list[Dim]:
    axes = resolve(tuple(chain(*group)))
    if not axes or not sizes:
        return [()] * len(sizes)
    if len(sizes) == 1:
        axes[0].merges[axes, tuple(map(size_of, group))] = group
        return [axes]
    if (axes, sizes) in axes[0].merges:
        return axes[0].merges[axes, sizes]
    pieces = spread(axes, sizes)
    if pieces is None:
        # The borders do not fit, as in [45, 80] seen as [80, 45]: the pieces are no axes of a grid.
        pieces = spread((product(axes),), sizes) or []
        for axis in chain(*pieces):
            axis.conflict = True
    return pieces


@rule("permute")
def _permute(call: Call) -> Dims:
    dims = dims_of(call.first)
    return tuple(dims[dim] for dim in call["dims"])


@rule("transpose t swapaxes swapdims")
def _transpose(call: Call) -> Dims:
    dims = list(dims_of(call.first))
    if len(dims) > 1:
        one, two = (call["dim0"], call["dim1"]) if "dim0" in call else (0, 1)
        dims[one], dims[two] = dims[two], dims[one]
    return tuple(dims)


@rule("unsqueeze")
def _unsqueeze(call: Call) -> Dims:
    dims = list(dims_of(call.first))
    dims.insert(call["dim"] % (len(dims) + 1), ())
    return tuple(dims)


@rule("squeeze")
def _squeeze(call: Call) -> Dims:
    dims = dims_of(call.first)
    gone = numbers(call.get("dim"), len(dims))
    return tuple(dim for number, dim in enumerate(dims) if number not in gone or size_of(dim) != 1)


@rule("expand broadcast_to repeat tile")
def _expand(call: Call) -> Dims:
    """A repeated dim is a fresh axis of repetitions around the old one."""
    dims = dims_of(call.first)
    missing = call.out.dim() - len(dims)
    out = list(fresh_dims(call.out.shape[:missing]))
    for size, old, dim in zip(call.out.shape[missing:], call.first.shape, dims, strict=True):
        out.append(dim if size == old else (Axis(size // old), *dim) if old > 1 else fresh(size))
    return repeated(call, out)


def _piece(tensor: Tensor, number: int, start: int, stop: int, step: int = 1) -> tuple[Dims, Lineage]:
    """Dims and lineage of a slice of a tensor along one dim."""
    dims = list(dims_of(tensor))
    lineage = lineage_of(tensor).cut(dims[number], start, stop, step)
    dims[number] = take_part(dims[number], start, stop, step)
    return tuple(dims), lineage


def _index(tensor: Tensor, number: int, index: int) -> tuple[Dims, Lineage]:
    """Dims and lineage of one index of a tensor along one dim, which is gone."""
    dims = list(dims_of(tensor))
    lineage = lineage_of(tensor).cut(dims.pop(number), index, index + 1)
    return tuple(dims), lineage


@rule("slice")
def _slice(call: Call) -> Split:
    window = slice(call["start"], call["end"], call["step"]).indices(call.first.shape[call["dim"]])
    return [_piece(call.first, call["dim"], *window)]


@rule("select")
def _select(call: Call) -> Split:
    return [_index(call.first, call["dim"], call["index"] % call.first.shape[call["dim"]])]


@rule("split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk tensor_split")
def _split(call: Call) -> Split:
    ends = accumulate((out.shape[call["dim"]] for out in call.outs), initial=0)
    return [_piece(call.first, call["dim"], start, stop) for start, stop in pairwise(ends)]


@rule("unbind")
def _unbind(call: Call) -> Split:
    return [_index(call.first, call["dim"], index) for index in range(len(call.outs))]


@rule("view_as_complex")
def _as_complex(call: Call) -> Dims:
    return dims_of(call.first)[:-1]


@rule("view_as_real")
def _as_real(call: Call) -> Dims:
    return (*dims_of(call.first), fresh(2))


def _unified(tensors: list[Tensor], but: int | None = None) -> tuple[list[Dim], Lineage]:
    """Dims and lineage of tensors whose elements stand side by side in all dims but one, which is the first's."""
    columns = enumerate(zip(*map(dims_of, tensors), strict=True))
    dims = [dims[0] if number == but else paired(dims) for number, dims in columns]
    dims, placed = in_places(tensors, [*map(dims_of, tensors)], dims, but, weighs=False)
    return dims, side_by_side(tensors)._replace(placed=placed)


@rule("cat concat concatenate")
def _cat(call: Call) -> Dims:
    # an empty 1-D tensor may be concatenated with anything
    tensors = [tensor for tensor in call["tensors"] if tensor.dim() == call.out.dim()]
    number = call["dim"] % call.out.dim()
    dims, call.lineage = _unified(tensors, number)
    if mesh := _mesh_of_tables(tensors, number):
        dims = [(mesh[at],) if at in mesh else dim for at, dim in enumerate(dims)]
        call.lineage = Lineage()  # what each table says of one place is nobody's token
    pieces = [dims_of(tensor)[number] for tensor in tensors]
    alike = len(set(map(size_of, pieces))) == 1 < len(pieces)
    frames = alike and (size_of(pieces[0]) > 1 or not any(pieces))
    indices = indices_of(tensors) if frames else None
    if indices is not None:  # frame after frame, say
        dims[number] = (*_put_together(indices), *reduce(unify, pieces))
    elif (
        (frames and all_alike(tensors) and _lack_time(pieces))
        or (alike and _picked_apart(tensors, pieces))
        or (any(map(slice_of, pieces)) and _orders_differ([dims_of(tensor)[:number] for tensor in tensors]))
    ):
        dims[number] = fresh(call.out.shape[number], lost="cat")
    else:
        dims[number] = join(pieces) if any(pieces) else fresh(len(pieces), lost="cat")
    _hold(tensors, dims[number])
    return _beside(call, tensors, [*map(dims_of, tensors)], dims, number)


def _beside(call: Call, tensors: Sequence[Tensor], own: Sequence[Dims], dims: Sequence[Dim], number: int) -> Dims:
    """The dims of tensors that an operator puts together along dim ``number``."""
    found, call.lineage = of_others_beside(tensors, own, dims, number, call.lineage)
    return found


def _hold(tensors: Sequence[Tensor], dim: Dim) -> None:
    """Remember of the dim that tensors stand side by side in whether its slices are of different inputs."""
    if len(dim) == 1 and dim[0] not in chain(*chain(*map(dims_of, tensors))):
        dim[0].several |= several(tensors)


def _mesh_of_tables(tensors: Sequence[Tensor], number: int) -> dict[int, Axis]:
    """Axes of dims along which three tables are spread, one along each in their order, and joined along channels.

    That is a mesh as `meshgrid` makes it, of a table of frames, one of rows and one of columns.
    """
    varying = [
        [dim for dim in range(tensor.dim()) if dim != number and tensor.shape[dim] > 1 and tensor.stride(dim)]
        for tensor in tensors
    ]
    places = [dims[0] for dims in varying if len(dims) == 1]
    if len(tensors) != 3 or len(places) != 3 or not places[0] < places[1] < places[2]:
        return {}
    own = [resolve(dims_of(tensor)[place]) for tensor, place in zip(tensors, places, strict=True)]
    sources = [source for dim in own for axis in dim for source, _ in axis.sources]
    if any(axis.role or axis.parts or axis.permuted or axis.coordinate for dim in own for axis in dim):
        return {}
    if any(source.rank > 3 and not source.parameter for source in sources):
        return {}
    return dict(zip(places, mesh_axes([size_of(dim) for dim in own], places), strict=True))


def _picked_apart(tensors: Sequence[Tensor], pieces: list[Dim]) -> bool:
    """Whether pieces are slices of an axis of which something else was added to each."""
    mixed = picked_apart(tensors)
    return any(axis.cut is not None and find(axis.cut.whole) in mixed for piece in pieces for axis in map(find, piece))


def _orders_differ(dims: Sequence[Dims]) -> bool:
    """Whether some tensors have another order than others along a dim, as of samples: others' tokens stand there."""
    moved = [{axis for dim in each for axis in resolve(dim) if axis.permuted and not axis.lost} for each in dims]
    return any(one != moved[0] for one in moved)


def _lack_time(pieces: list[Dim]) -> bool:
    """Whether these may be frames that were taken from an axis which nobody understands."""
    axes = [axis for piece in pieces for axis in resolve(piece)]
    return any(map(is_of_data, axes)) and not any(axis.role == "time" for axis in axes)


def _put_together(indices: list[Dim]) -> Dim:
    """Single indices of one axis, one after the other."""
    joined = join(indices)
    return permuted(joined) if any(axis.permuted for index in indices for axis in index) else joined


@rule("stack")
def _stack(call: Call) -> Dims:
    dims, call.lineage = _unified(call["tensors"])
    indices = indices_of(call["tensors"])
    piece = _put_together(indices) if indices else fresh(len(call["tensors"]), lost="stack")
    _hold(call["tensors"], piece)
    number, tensors = call["dim"] % (len(dims) + 1), call["tensors"]
    dims.insert(number, piece)
    own = [(*one[:number], (), *one[number:]) for one in map(dims_of, tensors)]
    return _beside(call, tensors, own, dims, number)


@rule("constant_pad_nd replication_pad1d replication_pad2d replication_pad3d")
def _pad(call: Call) -> Dims:
    dims = list(dims_of(call.first))
    pad = call["pad"] if "pad" in call else call["padding"]
    for number, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        kept = take(dims[-number], max(-before, 0), call.first.shape[-number] + min(after, 0)) or ()
        dims[-number] = join([(Axis(max(before, 0)),), kept, (Axis(max(after, 0)),)])
        if max(before, after) > 0:
            dims = [*_beside(call, [call.first], [dims_of(call.first)], dims, len(dims) - number)]
    return repeated(call, dims) if "padding" in call else tuple(dims)
