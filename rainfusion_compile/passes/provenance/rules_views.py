# SPDX-License-Identifier: Apache-2.0
"""Provenance rules of views, and of operators that put tensors together."""

from __future__ import annotations

import functools

from torch import Tensor

from rainfusion_compile.passes.provenance.axes import join, take
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, fresh, lost, size_of
from rainfusion_compile.passes.provenance.lineage import Lineage, indices_of, lineage_of, side_by_side
from rainfusion_compile.passes.provenance.regroup import regroup
from rainfusion_compile.passes.provenance.rules import SPLITS, Call, dims_of, fresh_dims, keep, numbers, rule
from rainfusion_compile.passes.provenance.unify import unify


@rule(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "view_as", "flatten", "unflatten"
)
def _view(call: Call) -> Dims:
    if call.first.numel() != call.out.numel():
        return keep(call)
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
    gone = numbers(call.get("dim"), len(dims))
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
    call.lineage = lineage_of(call.first).cut(dims[number], start, stop, step)
    dims[number] = _taken(dims[number], start, stop, step)
    return tuple(dims)


def _taken(dim: Dim, start: int, stop: int, step: int = 1) -> Dim:
    piece = take(dim, start, stop, step)
    assert piece is not None
    return piece


@rule("select", "select_copy")
def _select(call: Call) -> Dims:
    dims = list(dims_of(call.first))
    dim, index = dims.pop(call["dim"]), call["index"] % call.first.shape[call["dim"]]
    call.lineage = lineage_of(call.first).cut(dim, index, index + 1)
    return tuple(dims)


@rule("view_as_complex")
def _as_complex(call: Call) -> Dims:
    return dims_of(call.first)[:-1]


@rule("view_as_real", "view_as_real_copy")
def _as_real(call: Call) -> Dims:
    return (*dims_of(call.first), fresh(2))


def _split(call: Call, outs: list[Tensor]) -> list[tuple[Dims, Lineage]]:
    dims, number = list(dims_of(call.first)), call["dim"]
    dim, start, found = dims[number], 0, []
    for out in outs:
        stop = start + out.shape[number]
        dims[number] = _taken(dim, start, stop)
        found.append((tuple(dims), lineage_of(call.first).cut(dim, start, stop)))
        start = stop
    return found


def _unbind(call: Call, outs: list[Tensor]) -> list[tuple[Dims, Lineage]]:
    dims = list(dims_of(call.first))
    dim = dims.pop(call["dim"])
    return [(tuple(dims), lineage_of(call.first).cut(dim, index, index + 1)) for index in range(len(outs))]


SPLITS |= dict.fromkeys(
    ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk", "tensor_split"),
    _split,
)
SPLITS |= dict.fromkeys(("split_copy", "split_with_sizes_copy"), _split)
SPLITS |= dict.fromkeys(("unbind", "unbind_copy"), _unbind)


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
    call.lineage = side_by_side(tensors)
    pieces = [dims_of(tensor)[number] for tensor in tensors]
    frames = len(set(map(size_of, pieces))) == 1 < len(pieces) and (size_of(pieces[0]) > 1 or not any(pieces))
    indices = indices_of(tensors) if frames else None
    if indices is not None:  # frame after frame, say
        dims[number] = (*join(indices), *functools.reduce(unify, pieces))
    else:
        dims[number] = join(pieces) if any(pieces) else lost(len(pieces), "cat")
    return tuple(dims)


@rule("stack")
def _stack(call: Call) -> Dims:
    dims = _unified(call["tensors"])
    call.lineage = side_by_side(call["tensors"])
    indices = indices_of(call["tensors"])
    dims.insert(call["dim"] % (len(dims) + 1), join(indices) if indices else lost(len(call["tensors"]), "stack"))
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
