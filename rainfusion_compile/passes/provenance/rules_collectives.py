# SPDX-License-Identifier: Apache-2.0
"""Provenance rules of functional collectives: what the ranks of a group hand each other."""

from __future__ import annotations

from rainfusion_compile.passes.provenance.axes import is_of_data, joined, resolve
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, long, size_of
from rainfusion_compile.passes.provenance.ranks import Group, group_of, take_part
from rainfusion_compile.passes.provenance.rules import Call, dims_of, fresh_dims, keep, rule
from rainfusion_compile.passes.provenance.rules_views import regroup


def functional(names: str) -> str:
    """The full names of these collectives, of both kinds."""
    kinds = "_c10d_functional", "_c10d_functional_autograd"
    return " ".join(f"{kind}::{name}" for kind in kinds for name in names.split())


rule(functional("wait_tensor"))(keep)


@rule(functional("all_to_all_single"))
def _all_to_all(call: Call) -> Dims:
    """Rank r gets the r-th run of what each rank has, in the order of the ranks."""
    group, dims = group_of(call["group_name"]), dims_of(call.first)
    sizes = {*call["output_split_sizes"], *call["input_split_sizes"]}
    if group is not None and group.size == 1:
        return keep(call)
    if group is None or len(sizes) > 1 or not dims or call.first.shape[0] % group.size:
        return _lost(call, "runs of several lengths" if len(sizes) > 1 else "a group that is not known")
    ranks, dims = _from_each(call, group, dims)
    outer = next(iter(long(resolve(dims[0]))), Axis(1))
    if is_of_data(outer) and ranks[0].lost:  # tokens are handed out, so each rank hands out something else: heads
        ranks = (group.axis("heads"),)
    dims = _own_run(call, group, outer, dims)
    return ((*ranks, *long(dims[0])), *dims[1:])


@rule(functional("all_gather_into_tensor"))
def _all_gather(call: Call) -> Dims:
    """What each rank has, in the order of the ranks."""
    group, dims = group_of(call["group_name"]), dims_of(call.first)
    if group is None or group.size == 1 or not dims:
        return _lost(call, "a group that is not known") if group is None else keep(call)
    ranks, dims = _from_each(call, group, dims)
    return ((*ranks, *long(dims[0])), *dims[1:])


@rule(functional("all_reduce"))
def _all_reduce(call: Call) -> Dims:
    """A sum over ranks is of the same tokens, if these are on all ranks: not where each has a part of them."""
    group = group_of(call["group_name"])
    if group is None or any(group.part((axis,)) for dim in dims_of(call.first) for axis in _data(dim)):
        return _lost(call, "the sum of several tokens")
    return keep(call)


def _lost(call: Call, why: str) -> Dims:
    return fresh_dims(call.out.shape, lost=_at(call, why))


def _at(call: Call, why: str) -> str:
    return f"{call.func._schema.name.split('::')[1]} ({why})"


def _data(dim: Dim) -> list[Axis]:
    return [axis for axis in resolve(dim) if is_of_data(axis)]


def _from_each(call: Call, group: Group, dims: Dims) -> tuple[Dim, Dims]:
    """What all ranks have, if this one has `dims`: the dim of their numbers, and the dims inside of it.

    Where each rank has its part of something, these two are what that is split into.
    """
    pieces = [axis for dim in dims for axis in _data(dim) if axis.run or (axis.cut is not None and axis.is_piece)]
    parts = [(axis, *part) for axis in pieces if (part := group.part((axis,))) is not None]
    strided = any(axis.cut is not None and axis.cut.step > 1 for axis in pieces)
    if len(parts) != 1 and not strided:
        return (group.axis(_at(call, "it does not show which rank has which part"), lost=True),), dims
    own, whole, number = parts[0] if parts else (Axis(1), (), -1)
    agreed = not strided and group.each_has_its_own(number, call.first.shape)
    if agreed is False:
        return (group.axis("in another order", permuted=True),), dims
    if agreed is None:
        return (group.axis(_at(call, "not all ranks say which part they have"), lost=True),), dims
    ranks, inner = regroup((whole,), (group.size, own.size))
    return ranks, tuple(
        tuple(one for axis in resolve(dim) for one in (inner if axis is own else (axis,))) for dim in dims
    )


def _own_run(call: Call, group: Group, outer: Axis, dims: Dims) -> Dims:
    """The dims of one run of as many along the first dim as there are ranks, of this rank's number.

    `outer` is the first axis of that. If another dim has the rest of what it is a digit of, that is this rank's part.
    """
    each = size_of(dims[0]) // group.size
    ends = group.rank * each, (group.rank + 1) * each
    run = take_part(dims[0], *ends)
    first = long(resolve(dims[0]))
    # In the same dim, too, where all are flattened into one.
    inside = (tuple(first[1:]), *dims[1:]) if outer.size == group.size and is_of_data(outer) else ()
    for at, dim in enumerate(inside):
        axes = resolve(dim)
        wholes = [(number, whole) for number, axis in enumerate(axes) if (whole := joined(outer, axis)) is not None]
        if wholes:
            number, whole = wholes[0]
            ends = group.rank * axes[number].size, (group.rank + 1) * axes[number].size
            call.lineage = call.lineage.cut((whole,), *ends)
            part = (*axes[:number], *take_part((whole,), *ends), *axes[number + 1 :])
            return (*inside[:at], part, *inside[at + 1 :])
    call.lineage = call.lineage.cut(dims[0], *ends)
    return (run, *dims[1:])
