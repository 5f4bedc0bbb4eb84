# SPDX-License-Identifier: Apache-2.0
"""Tables of positions among the inputs of a graph: whole ones, and parts of one that this rank has.

A part that begins inside a frame shows no grid. But ranks cut it off the whole table, so it is a view, and the memory
around it still holds what the others have. That says what the whole is; that others have their parts, they are asked.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rainfusion_compile.passes.provenance.known_tokens import Run
from rainfusion_compile.runtime.positions import read_positions
from rainfusion_compile.runtime.turns import read_turns
from rainfusion_compile.sparsity.layout import VideoLayout


class Read(NamedTuple):
    """The dimension of a table that runs over tokens, their layout, and which run of them it is; None if it is all.

    ``sines``: the number of the input that has the sines of this one's cosines, if it takes both to tell.
    """

    dim: int
    layout: VideoLayout
    run: Run | None
    sines: int | None = None


def read_table(table: Tensor, min_tokens: int, ranks: Iterable[tuple[int, int]]) -> Read | None:
    """What a tensor says of tokens, if it is a table of positions, or a part of one; else None.

    Args:
        table: as `read_positions` takes it.
        min_tokens: shorter dimensions, of the whole, are not looked at.
        ranks: this process's number in groups that may have a part each, and their sizes.
    """
    for rank, size in ranks:
        for dim, length in enumerate(table.shape):
            run = Run(rank * length, (rank + 1) * length, size * length)
            whole = _around(table, dim, run)
            found = None if whole is None else read_positions(whole, min_tokens)
            if found is not None and found[0] == dim:
                return Read(*found, run)
    found = read_positions(table, min_tokens)
    return None if found is None else Read(*found, None)


def read_pairs(args: Sequence[Any], numbers: Iterable[int], min_tokens: int) -> Iterator[tuple[int, Read]]:
    """What pairs of inputs, cosines and sines, say together: by the number of the cosines."""
    by_shape = defaultdict[Any, list[int]](list)
    for number in numbers:
        by_shape[args[number].shape].append(number)
    for alike in by_shape.values():
        for cosines, sines in itertools.permutations(alike, 2):
            found = read_turns(args[cosines], args[sines], min_tokens)
            if found is not None:
                yield cosines, Read(found[0], VideoLayout(found[1]), None, sines)


def whole_of(args: Sequence[Any], number: int, read: Read) -> Tensor:
    """What is compared: the table that a part was cut off; the tensor itself where it is no such, or not any more.

    Of a pair it is one tensor that has both.
    """
    table: Tensor = args[number]
    if read.sines is not None:
        beside = args[read.sines]
        return torch.stack([table, beside]) if table.shape == beside.shape and table.dtype == beside.dtype else table
    whole = None if read.run is None or read.dim >= table.dim() else _around(table, read.dim, read.run)
    return table if whole is None else whole


def _around(part: Tensor, dim: int, run: Run) -> Tensor | None:
    """The tensor that a view is this run of along `dim`, as far as its memory goes; None if it does not.

    Rows of it are nowhere twice: along whatever is farther apart than neighbours are, there must be room for them all.
    """
    length, step = part.shape[dim], part.stride(dim)
    farther = [stride for size, stride in zip(part.shape, part.stride(), strict=True) if size > 1 and stride > step]
    start = part.storage_offset() - run.start * step
    if length < 2 or run.stop - run.start != length or step < 1 or start < 0 or any(s < run.of * step for s in farther):
        return None
    shape = tuple(run.of if number == dim else size for number, size in enumerate(part.shape))
    last = start + sum((size - 1) * stride for size, stride in zip(shape, part.stride(), strict=True))
    if 0 in shape or last >= part.untyped_storage().nbytes() // part.itemsize:
        return None
    return part.as_strided(shape, part.stride(), start)
