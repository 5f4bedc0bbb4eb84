# SPDX-License-Identifier: Apache-2.0
"""Slices of tokens that numbers put in places, by arithmetic: several are in no known order, one is a condition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import capture
from orders.disturbance import claims
from orders.numbered import grids_of_numbered
from orders.video import GRID, Model, backwards, flat, not_wrong
from torch import Tensor

from rainfusion_compile.sparsity.layout import VideoLayout

Put = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def along(numbers: Tensor, axis: int) -> Tensor:
    return numbers.view([-1 if dim == axis else 1 for dim in range(5)])


def put(change: Put, z: Tensor, y: Tensor, axis: int) -> Tensor:
    """`z`, after `change` was made to it with the numbers of every place, the slice that comes there, and the place."""
    for i, j in enumerate(backwards(y.shape[axis])):
        z = change(z, along(torch.eye(y.shape[axis])[i], axis).to(y), y.narrow(axis, j, 1), i)
    return z


def _chosen(z: Tensor, place: Tensor, kept: Tensor, i: int) -> Tensor:
    return torch.where(torch.arange(place.numel()).view(place.shape) == i, kept, z)


def _dim(place: Tensor) -> int:
    return place.shape.index(place.numel())


PLACED: dict[str, Put] = {
    "sums": lambda z, place, kept, i: z + place * kept,
    "sums in place": lambda z, place, kept, i: z.addcmul_(place, kept),
    "sums written over all": lambda z, place, kept, i: z.copy_(z + place * kept),
    "sums of repeated slices": lambda z, place, kept, i: z + place * kept.expand(z.shape),
    "sums of slices that were looked up": lambda z, place, kept, i: (
        z + place * kept.select(_dim(place), 0).unsqueeze(_dim(place)).gather(_dim(place), torch.zeros(z.shape).long())
    ),
    "sums of norms": lambda z, place, kept, i: z + F.layer_norm(place * kept, z.shape[-1:]),
    "sums of all in a list": lambda z, place, kept, i: torch.stack([z, place * kept]).sum(0),
    "sums of outer products": lambda z, place, kept, i: z + torch.kron(place, kept),
    "largest": lambda z, place, kept, i: torch.maximum(z, place * (9 + kept)),
    "chosen": _chosen,
    "lerp": lambda z, place, kept, i: torch.lerp(z, kept, place),
    "shares": lambda z, place, kept, i: z * (1 - place) + place * kept,
    "index_add": lambda z, place, kept, i: z.index_add(_dim(place), torch.tensor([i]), kept),
    "index_copy": lambda z, place, kept, i: z.index_copy(_dim(place), torch.tensor([i]), kept),
    "scatter": lambda z, place, kept, i: z.scatter(_dim(place), torch.full(kept.shape, i), kept),
}
REPLACED = ["chosen", "lerp", "shares", "index_copy", "scatter"]
"""Which leave nothing of what was there."""


@pytest.mark.parametrize("start", ["conv", "linear"])
@pytest.mark.parametrize(("name", "axis"), [(name, 1 + number % 3) for number, name in enumerate(PLACED)])
def test_slices_in_places(name: str, axis: int, start: str) -> None:
    not_wrong(lambda m, y: flat(put(PLACED[name], torch.zeros_like(y), y, axis) + m.places), start)
    if name in REPLACED:
        not_wrong(lambda m, y: flat(put(PLACED[name], y.clone(), y, axis)), start)


def _of(axis: int, index: object) -> tuple[object, ...]:
    return (*[slice(None)] * axis, index)


def _one(y: Tensor, axis: int, j: int) -> Tensor:
    return along(torch.eye(y.shape[axis])[j], axis).to(y)


def _convolved(y: Tensor, axis: int, j: int) -> Tensor:
    kernel = torch.eye(y.shape[-1]).view(*y.shape[-1:] * 2, 1, 1, 1) * _one(y, axis, j).movedim(-1, 1)
    return F.conv3d(y.movedim(-1, 1), kernel).movedim(1, -1)


def _grown(y: Tensor, axis: int, i: int, j: int, *, padded: bool) -> Tensor:
    """A slice, along which a kernel of zeros and a one grows."""
    count, z = y.shape[axis], y.select(axis, j).unsqueeze(axis).movedim(-1, 1)
    kernel = torch.eye(y.shape[-1]).view(*y.shape[-1:] * 2, 1, 1, 1)
    kernel = kernel * _one(y, axis, count - 1 - i if padded else i).movedim(-1, 1)
    padding = [count - 1 if at == axis else 0 for at in (1, 2, 3)]
    grown = F.conv3d(z, kernel, padding=padding) if padded else F.conv_transpose3d(z, kernel)
    return grown.movedim(1, -1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_slices_that_kernels_put_in_places(axis: int, padded: bool) -> None:
    def tokens(m: Model, y: Tensor) -> Tensor:
        turned = enumerate(backwards(y.shape[axis]))
        return flat(sum((_grown(y, axis, i, j, padded=padded) for i, j in turned), 0 * y))

    not_wrong(tokens)


Taken = Callable[[Tensor, int, int], Tensor]
TAKEN: dict[str, Taken] = {
    "sum": lambda y, axis, j: (_one(y, axis, j) * y).sum(axis, keepdim=True),
    "sum over all samples": lambda y, axis, j: (_one(y, axis, j) * y).sum(axis).unsqueeze(axis),
    "mean": lambda y, axis, j: (_one(y, axis, j) * y).mean(axis, keepdim=True) * y.shape[axis],
    "product": lambda y, axis, j: (1 + _one(y, axis, j) * (y - 1)).prod(axis, keepdim=True),
    "largest": lambda y, axis, j: (y - 100 * (1 - _one(y, axis, j))).amax(axis, keepdim=True),
    "largest by order": lambda y, axis, j: (y - 100 * (1 - _one(y, axis, j))).topk(1, axis)[0],
    "running sum": lambda y, axis, j: (_one(y, axis, j) * y).cumsum(axis).narrow(axis, y.shape[axis] - 1, 1),
    "matrix": lambda y, axis, j: (torch.eye(y.shape[axis])[j : j + 1].to(y) @ y.movedim(axis, -2)).movedim(-2, axis),
    "matrix product": lambda y, axis, j: torch.tensordot(
        torch.eye(y.shape[axis])[j : j + 1].to(y), y, ([1], [axis])
    ).movedim(0, axis),
    "sum by einsum": lambda y, axis, j: (
        torch.einsum("t,tx->x", torch.eye(y.shape[axis])[j].to(y), y.movedim(axis, 0).flatten(1))
        .view(y.movedim(axis, 0)[:1].shape)
        .movedim(0, axis)
    ),
    "flat": lambda y, axis, j: y.flatten().view(y.shape).narrow(axis, j, 1),
    "flat slice": lambda y, axis, j: y.narrow(axis, j, 1).flatten().view(y.narrow(axis, j, 1).shape),
    "linear layer": lambda y, axis, j: F.linear(y.movedim(axis, -1), torch.eye(y.shape[axis])[j : j + 1].to(y)).movedim(
        -1, axis
    ),
    "convolution": _convolved,
    "index_select": lambda y, axis, j: y.index_select(axis, torch.tensor([j])),
    "index": lambda y, axis, j: y[_of(axis, torch.tensor([j]))],
    "gather": lambda y, axis, j: y.gather(axis, torch.full_like(y.narrow(axis, 0, 1), j, dtype=torch.int64)),
    "step": lambda y, axis, j: y[_of(axis, slice(j, None, y.shape[axis]))],
    "roll": lambda y, axis, j: y.roll(-j, axis).narrow(axis, 0, 1),
    "list": lambda y, axis, j: y[_of(axis, [*range(j, y.shape[axis]), *range(j)])].narrow(axis, 0, 1),
    "flip": lambda y, axis, j: y.flip(axis).narrow(axis, y.shape[axis] - 1 - j, 1),
    "pad": lambda y, axis, j: F.pad(y, [0, 0] * (4 - axis) + [-j, 0]).narrow(axis, 0, 1),
    "stack": lambda y, axis, j: torch.stack([*y.unbind(axis)][j:] + [*y.unbind(axis)][:j], axis).narrow(axis, 0, 1),
    "cat": lambda y, axis, j: torch.cat([y.narrow(axis, j, y.shape[axis] - j), y.narrow(axis, 0, j)], axis).narrow(
        axis, 0, 1
    ),
}
"""Ways to take one slice, of which the graph does not tell which it is; or does."""


@pytest.mark.parametrize(("name", "axis"), [(name, 1 + number % 3) for number, name in enumerate(TAKEN)])
def test_slices_that_were_taken_in_other_ways(name: str, axis: int) -> None:
    def tokens(m: Model, y: Tensor) -> Tensor:
        z = torch.zeros_like(y)
        for i, j in enumerate(backwards(y.shape[axis])):
            z = z + _one(y, axis, i) * TAKEN[name](y, axis, j)
        return flat(z + m.places)

    not_wrong(tokens)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_slices_in_places_of_nothing(axis: int) -> None:
    """Which is made of the tokens themselves."""
    not_wrong(lambda m, y: flat(put(PLACED["sums"], y * 0, y, axis)))
    not_wrong(lambda m, y: flat(put(PLACED["sums"], y.clone().zero_(), y, axis)))

    def counted(m: Model, y: Tensor) -> Tensor:
        counter = along(torch.arange(y.shape[axis]), axis)
        z, y = torch.zeros_like(y), y + counter / 100
        for i, j in enumerate(backwards(y.shape[axis])):
            z = z + (counter == i).to(y) * y.narrow(axis, j, 1)
        return flat(z)

    def two(m: Model, y: Tensor) -> Tensor:
        first, second = (along(torch.eye(y.shape[axis])[i], axis).to(y) for i in range(2))
        return flat(y * 0 + first * y.narrow(axis, 1, 1) + second * y.narrow(axis, 0, 1))

    not_wrong(counted)
    not_wrong(two)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_slices_in_places_of_a_grid_that_a_parameter_tells(axis: int) -> None:
    for name in ("sums", "sums in place", "chosen"):
        assert grids_of_numbered(lambda y, name=name: put(PLACED[name], y * 0, y, axis)) == {None}


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_halves_that_are_paired_with_all(axis: int) -> None:
    def tokens(m: Model, y: Tensor) -> Tensor:
        half = y.shape[axis] // 2
        swapped = torch.cat([y.narrow(axis, half, y.shape[axis] - half), y.narrow(axis, 0, half)], axis)
        return flat(torch.lerp(y, swapped, 1.0))

    not_wrong(tokens)


@pytest.mark.parametrize("start", ["conv", "linear", "tokens that a table names later"])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_conditions_of_all_tokens_leave_these_in_order(axis: int, start: str) -> None:
    """(Which the disturbance cannot tell of most: all tokens change with the first frame.)"""

    def first(y: Tensor) -> Tensor:
        return y.narrow(axis, 0, 1)

    def scale(y: Tensor) -> Tensor:
        return along(torch.arange(y.shape[axis]), axis) / 10

    conditions: list[Callable[[Model, Tensor], Tensor]] = [
        lambda m, y: y + first(y),
        lambda m, y: y + first(y) * scale(y) + y.narrow(axis, y.shape[axis] - 1, 1),
        lambda m, y: torch.where(scale(y) < 0.1, first(y), y) * (1 + first(y)),
        lambda m, y: y - scale(y) * sum(y.split(1, axis)) / y.shape[axis],
        lambda m, y: y + m.linear(torch.cat([first(y) * scale(y), y], -1)[..., :4]),
        lambda m, y: y + torch.cat([first(y) * 2, y.narrow(axis, 1, y.shape[axis] - 1)], axis),
        lambda m, y: y + scale(y) * y.mean(axis, keepdim=True) + y.amax(axis, keepdim=True),
        lambda m, y: (y - y.mean((1, 2, 3), keepdim=True)) * (1 + scale(y) * y.std((1, 2, 3), keepdim=True)),
    ]
    for condition in conditions:

        def tokens(m: Model, y: Tensor, condition: Callable[[Model, Tensor], Tensor] = condition) -> Tensor:
            y = m.linear(y).unflatten(1, GRID) if y.dim() == 3 else y
            return flat(condition(m, y) + (m.places if start.startswith("tokens") else 0))

        x = torch.randn(2, 4, *GRID)
        (graph,) = capture(Model(tokens, start), x.flatten(2).mT if start.startswith("tokens") else x)
        (claim,) = claims(graph)
        assert claim.layout == VideoLayout(GRID), claim.reason
