# SPDX-License-Identifier: Apache-2.0
"""Notes on tensors: what one graph of a broken model knows of its outputs' tokens, for the next one.

A model that breaks into several graphs shows its grid in one of them, and does attention in others. The tensors that
pass between them carry it as an attribute, which is read again on every call, is believed only while the tensor holds
what it held, token by token, and is gone with the tensor. Copies, files and tensors of other code do not have it.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rainfusion_compile.passes.provenance.known_tokens import Carried, CarriedDim, CarriedDims, FromInput, Run
from rainfusion_compile.runtime.contents import capturing, fingerprint

_NAME = "_rainfusion_note"
_OF_VIEWS = "_rainfusion_notes_of_views"
_MOST_VIEWS = 8  # of one tensor: its last ones


@dataclass(frozen=True)
class _Note:
    """What is known of a tensor in some `state`; `contents` has fingerprints by dimension of tokens."""

    dims: CarriedDims
    state: tuple[Any, ...]
    contents: dict[int, Tensor]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return collections.OrderedDict, ()  # what `torch.load` takes without asking; nobody looks at it


def claims(args: Sequence[Any]) -> dict[Any, tuple[Tensor, Tensor]]:
    """By number of an input and of its dimension, to be compared: a fingerprint of what is there, and of what was."""
    if capturing():
        return {}
    plain = ((number, arg) for number, arg in enumerate(args) if type(arg) is Tensor)  # most are parameters
    notes = {number: note for number, arg in plain if (note := _note(arg) or _taken_over(arg))}
    return {
        (number, dim): (fingerprint(args[number], dim), contents)
        for number, note in notes.items()
        for dim, contents in note.contents.items()
    }


def carried_by(args: Sequence[Any], true: set[Any]) -> Carried:
    """What the inputs of a graph, any objects, carry, with identities by number: equal for calls that are alike.

    Notes that are not true any more are taken off. ``true``: those of the inputs' ``claims`` that were found to agree.
    """
    if capturing():
        return (None,) * len(args)
    notes: list[_Note | None] = [None] * len(args)
    for number, arg in enumerate(args):
        if type(arg) is Tensor and (note := _note(arg)) and all((number, dim) in true for dim in note.contents):
            notes[number] = note
        elif type(arg) is Tensor:
            vars(arg).pop(_NAME, None)
    numbers = {name: (number,) for number, group in enumerate(_names(notes)) for name in group}
    return tuple(
        None
        if note is None
        else tuple(d and _renamed(d, numbers[d.identity][0], numbers.__getitem__) for d in note.dims)
        for note in notes
    )


def attach(outputs: Sequence[Any], carried: Carried, args: Sequence[Any]) -> None:
    """Let the outputs of a call carry what is known of them.

    ``args`` are the call's inputs; ``carried_by`` has been asked of them before the call, so that their notes are true.
    """
    if capturing():
        return
    call, names = object(), _names(map(_note, args))

    def everywhere(name: Any) -> tuple[Any, ...]:
        return names[name] if isinstance(name, int) else ((call, name),)

    def identity_of(identity: Any) -> Any:
        note = _note(args[identity.number]) if isinstance(identity, FromInput) else None
        dim = note and note.dims[identity.dim]
        return dim.identity if dim else (call, identity)

    named = [
        (output, tuple(dim and _renamed(dim, identity_of(dim.identity), everywhere) for dim in dims))
        for output, dims in zip(outputs, carried, strict=False)
        if dims is not None and type(output) is Tensor and not output.is_meta
    ]
    for output, dims in named:  # after the inputs' notes were read, for an output may be an input
        contents = {number: fingerprint(output, number) for number, dim in enumerate(dims) if dim}
        note = _Note(dims, _state(output), contents)
        setattr(output, _NAME, note)
        if type(output._base) is Tensor:  # which other views of the same memory lead to
            others = getattr(output._base, _OF_VIEWS, ())
            setattr(output._base, _OF_VIEWS, (*others, note)[-_MOST_VIEWS:])


def _names(notes: Iterable[_Note | None]) -> list[tuple[Any, ...]]:
    """All that the notes of a call's inputs name, by the numbers that stand for them in its graph.

    One number stands for all that the same inputs are made of, for these names tell none of them from another: the
    lineage of each further block is longer, and it is the same call for its graph.
    """
    dims = [(number, dim) for number, note in enumerate(notes) if note for dim in note.dims if dim]
    made: dict[Any, int] = {}  # which inputs are made of it, as bits
    for number, dim in dims:
        for name in (dim.identity, *dim.lineage):
            made[name] = made.get(name, 0) | 1 << number
    identities, groups = {dim.identity for _, dim in dims}, dict[Any, list[Any]]()
    for name, inputs in made.items():
        groups.setdefault((name,) if name in identities else inputs, []).append(name)
    return list(map(tuple, groups.values()))


def _renamed(dim: CarriedDim, identity: Any, names_of: Callable[[Any], tuple[Any, ...]]) -> CarriedDim:
    lineage = dict.fromkeys(new for name in dim.lineage for new in names_of(name))
    return dim._replace(identity=identity, lineage=tuple(lineage))


def _note(arg: Any) -> _Note | None:
    note = getattr(arg, _NAME, None) if type(arg) is Tensor else None
    return note if isinstance(note, _Note) and note.state == _state(arg) else None


def _taken_over(arg: Tensor) -> _Note | None:
    """The note of a tensor that other code made this view of, if it tells of the view.

    It is this one's note from now on. Whether it is true, what is there has to tell.
    """
    base = arg._base
    if base is None:
        return None
    for note in reversed((*getattr(base, _OF_VIEWS, ()), _note(base))):
        if not isinstance(note, _Note):  # of a base that was copied, among others
            continue
        if told := _all_places(note, arg) or _some_places(note, arg):
            dims = tuple(told[place][0] if place in told else None for place in range(arg.dim()))
            setattr(arg, _NAME, _Note(dims, _state(arg), {place: contents for place, (_, contents) in told.items()}))
            return _note(arg)
    return None


_OfView = dict[int, tuple[CarriedDim | None, Tensor]]
"""What a note tells of a view: by the view's dimension, what is known of it and its contents."""


def _all_places(note: _Note, view: Tensor) -> _OfView:
    """Of a view that has all places, in other dimensions."""
    pointer, dtype, shape, _ = note.state
    if (pointer, dtype, shape.numel()) != (view.data_ptr(), view.dtype, view.numel()):
        return {}
    places = _places(view.shape)
    found = {places[key]: number for key, number in _places(shape).items() if key in places}
    return {at: (note.dims[number], note.contents[number]) for at, number in found.items() if number in note.contents}


def _some_places(note: _Note, view: Tensor) -> _OfView:
    """Of a slice: some places of one dimension, one after the other, and all places of the others."""
    pointer, dtype, shape, stride = note.state
    if (dtype, stride, len(shape)) != (view.dtype, view.stride(), view.dim()):
        return {}
    shorter = [dim for dim, size in enumerate(shape) if view.shape[dim] != size]
    known = note.dims[shorter[0]] if len(shorter) == 1 else None
    if known is None or stride[shorter[0]] == 0:
        return {}
    (dim,), size = shorter, view.shape[shorter[0]]
    start, rest = divmod(view.data_ptr() - pointer, stride[dim] * view.itemsize)
    if rest or not 0 <= start <= shape[dim] - size:
        return {}
    begin, _, of = known.run or Run(0, shape[dim], shape[dim])
    run = Run(begin + start, begin + start + size, of)
    return {dim: (known._replace(run=run), note.contents[dim][start : start + size])}


def _places(shape: Sequence[int]) -> dict[tuple[int, int], int]:
    """Numbers of dimensions that have several places, by these and by how many places those before it have in all."""
    return {(math.prod(shape[:number]), size): number for number, size in enumerate(shape) if size > 1}


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
