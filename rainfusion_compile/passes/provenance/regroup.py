# SPDX-License-Identifier: Apache-2.0
"""What a view does to dims: neighbouring ones merge, and others split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rainfusion_compile.passes.provenance.axes import product, resolve, spread
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, find, fresh, size_of


def regroup(dims: Dims, shape: Sequence[int], new_shape: Sequence[int]) -> Dims:
    """Dims of a tensor of `shape` after a view as `new_shape`: dims merge and split."""
    if 0 in shape:
        return tuple(fresh(size) for size in new_shape)
    out: list[Dim] = []
    old, new = 0, 0
    while old < len(shape) or new < len(new_shape):
        first, first_new = old, new
        have = want = 1
        if old < len(shape):
            have, old = shape[old], old + 1
        if new < len(new_shape):
            want, new = new_shape[new], new + 1
        while have != want:
            if have < want:
                have, old = have * shape[old], old + 1
            else:
                want, new = want * new_shape[new], new + 1
        # A dim of size one belongs to this group or to the next: where dims merge, it stays with its kin.
        while old < len(shape) and shape[old] == 1:
            more = new < len(new_shape)
            if more and (new_shape[new] == 1 or old - first == 1 or not _kin(sum(dims[first:old], ()), dims[old])):
                break
            old += 1
        group, sizes = dims[first:old], tuple(new_shape[first_new:new])
        if len(group) == len(sizes) == 1:
            out.append(group[0])
        else:
            out += _distribute(group, sizes)
    return tuple(out)


def _kin(axes: Iterable[Axis], others: Iterable[Axis]) -> bool:
    ours, theirs = list(map(find, axes)), list(map(find, others))
    tensors = {tensor for axis in ours for tensor, _ in axis.sources}
    role = any(axis.role for axis in ours)
    return any((role and axis.role) or any(tensor in tensors for tensor, _ in axis.sources) for axis in theirs)


def _distribute(group: Dims, sizes: tuple[int, ...]) -> list[Dim]:
    axes = resolve(tuple(axis for dim in group for axis in dim))
    if not sizes:
        return []
    if not axes:
        return [()] * len(sizes)
    if len(sizes) == 1:
        axes[0].merges[axes, tuple(map(size_of, group))] = list(group)
        return [axes]
    if (axes, sizes) in axes[0].merges:
        return axes[0].merges[axes, sizes]
    pieces = spread(axes, sizes)
    if pieces is not None:
        return pieces
    # The borders do not fit, as in [45, 80] seen as [80, 45]: the pieces are no axes of a grid.
    whole = product(axes)
    pieces = spread((whole,), sizes)
    assert pieces is not None
    for axis in (axis for piece in pieces for axis in piece):
        axis.conflict = True
    return pieces
