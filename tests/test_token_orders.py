# SPDX-License-Identifier: Apache-2.0
"""Tokens out of order, kind by kind: dense, or sparse over the grid that disturbing the input shows. In order: sparse.

Random models (`test_random_orders`) combine what stands here by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from orders.disturbance import Source
from orders.numbered import grids_of_numbered
from orders.video import GRID, IMAGE, D, H, Model, T, W, backwards, flat, not_wrong, sparse
from torch import Tensor

from rainfusion_compile.sparsity.layout import Grid


def moved(y: Tensor) -> Tensor:
    """``[B, T, H, W, D]`` as ``[B, D, T, H, W]``."""
    return y.permute(0, 4, 1, 2, 3)


def back(y: Tensor) -> Tensor:
    return flat(y.permute(0, 2, 3, 4, 1))


def put(z: Tensor, y: Tensor, axis: int, order: Sequence[int], *, keepdim: bool = False) -> Tensor:
    for i, j in enumerate(order):
        slot, kept = (x.narrow(axis, at, 1) if keepdim else x.select(axis, at) for x, at in ((z, i), (y, j)))
        slot.copy_(kept)
    return z


def swapped(y: Tensor, i: int, j: int) -> Tensor:
    y = y.clone()
    kept = y[:, i].clone()
    y[:, i] = y[:, j]
    y[:, j] = kept
    return y


def reversed_list(y: Tensor, axis: int) -> Tensor:
    parts = list(y.unbind(axis))
    parts.reverse()
    return torch.stack(parts, axis)


starts = pytest.mark.parametrize("start", ["conv", "linear"])

# --- lists, loops, slots ---------------------------------------------------------------------------------------------

TURNED = torch.eye(T).flip(0)


def paired(y: Tensor, axis: int, length: int) -> Tensor:
    """Slices that others are written over, by an operator that takes both."""
    z, count = y.clone(), y.shape[axis] // length
    for i, j in enumerate(backwards(count)):
        z.narrow(axis, i * length, length).lerp_(y.narrow(axis, j * length, length), 1.0)
    return z


def masked(y: Tensor, value: Tensor) -> Tensor:
    return y.index_put((torch.ones(y.shape[:-1], dtype=torch.bool),), value)


OUT_OF_ORDER: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "frames backwards": lambda m, y: flat(torch.stack(y.unbind(1)[::-1], 1)),
    "rows backwards": lambda m, y: flat(torch.stack(y.unbind(2)[::-1], 2)),
    "columns backwards": lambda m, y: flat(torch.stack(y.unbind(3)[::-1], 3)),
    "selected frames": lambda m, y: flat(torch.stack([y[:, i] for i in (0, 2, 1, 3)], 1)),
    "frames as slices": lambda m, y: flat(torch.cat([y[:, i : i + 1] for i in (3, 0, 1, 2)], 1)),
    "frames unsqueezed": lambda m, y: flat(torch.cat([y.select(1, i).unsqueeze(1) for i in (1, 0, 2, 3)], 1)),
    "rows split": lambda m, y: flat(torch.cat([y.split(1, 2)[i] for i in (0, 2, 4, 1, 3, 5)], 2)),
    "a list reversed": lambda m, y: flat(reversed_list(y, 1)),
    "even rows of stacked frames": lambda m, y: flat(
        torch.cat([torch.stack(y.unbind(2), 2)[:, :, ::2], torch.stack(y.unbind(2), 2)[:, :, 1::2]], 2)
    ),
    "frame slots": lambda m, y: flat(put(torch.empty_like(y), y, 1, backwards(T))),
    "frame slots of new zeros": lambda m, y: flat(put(y.new_zeros(y.shape), y, 1, backwards(T))),
    "row slots": lambda m, y: flat(put(torch.zeros_like(y), y, 2, backwards(H))),
    "column slots of a copy": lambda m, y: flat(put(y.clone(), y, 3, backwards(W))),
    "two frames swapped": lambda m, y: flat(swapped(y, 0, 2)),
    "product over time": lambda m, y: flat(torch.einsum("st,bthwd->bshwd", torch.eye(T).flip(0).to(y), y)),
    "product over rows": lambda m, y: flat((torch.eye(H).flip(0).to(y) @ y.transpose(2, 3)).transpose(2, 3)),
    "product over time, a table before and after": lambda m, y: flat(
        torch.einsum("st,bthwd->bshwd", TURNED.to(y), y + m.places) + m.places
    ),
    "repeated frames, across the border": lambda m, y: flat(y.repeat(1, 2, 1, 1, 1)[:, 3 : 3 + T] + m.places),
    "repeated rows, across the border": lambda m, y: flat(y.repeat(1, 1, 2, 1, 1).narrow(2, 2, H) + m.places),
    "expanded frames, across the border": lambda m, y: flat(
        y[:, None].expand(-1, 2, -1, -1, -1, -1).flatten(1, 2)[:, 1 : 1 + T] + m.places
    ),
    "a run of repeated tokens": lambda m, y: flat(
        flat(y).repeat(1, 2, 1)[:, 7 : 7 + T * H * W].unflatten(1, GRID) + m.places
    ),
    "frame slots after a product over time": lambda m, y: flat(
        put(torch.empty_like(y), F.linear(y.movedim(1, -1), torch.eye(T).to(y)).movedim(-1, 1), 1, (2, 0, 1, 3))
        + m.places
    ),
    "every second frame of a turned list": lambda m, y: flat(
        torch.cat([torch.cat([y[:, 2:], y[:, :2]], 1)[:, ::2], y[:, 1::2]], 1) + m.table
    ),
    "linear over columns": lambda m, y: flat(F.linear(y.mT, torch.eye(W).flip(0).to(y)).mT),
    "frames paired": lambda m, y: flat(paired(y, 1, 1)),
    "rows paired": lambda m, y: flat(paired(y, 2, 1)),
    "halves of rows paired": lambda m, y: flat(paired(y, 2, H // 2)),
    "columns paired in a list": lambda m, y: flat(
        torch.cat([torch.lerp(y.narrow(3, i, 1), y.narrow(3, W - 1 - i, 1), 1.0) for i in range(W)], 3)
    ),
    "frames backwards, by a mask": lambda m, y: flat(masked(y, y.flip(1).flatten(0, 3))),
    "rows backwards, by a scattering mask": lambda m, y: flat(y.masked_scatter(torch.ones_like(y).bool(), y.flip(2))),
}
IN_ORDER: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "frames": lambda m, y: flat(torch.stack(y.unbind(1), 1)),
    "selected frames": lambda m, y: flat(torch.stack([y[:, i] for i in range(T)], 1)),
    "selected rows": lambda m, y: flat(torch.stack([y[:, :, i] for i in range(H)], 2)),
    "frames as slices": lambda m, y: flat(torch.cat([y[:, i : i + 1] for i in range(T)], 1)),
    "frames' tokens": lambda m, y: torch.cat([y[:, i].flatten(1, 2) for i in range(T)], 1),
    "frame slots": lambda m, y: flat(put(torch.empty_like(y), y, 1, range(T))),
    "frame slots of new zeros": lambda m, y: flat(put(y.new_zeros(y.shape), y, 1, range(T))),
    "row slots": lambda m, y: flat(put(torch.zeros_like(y), y, 2, range(H))),
    "one value and one row by a mask": lambda m, y: flat(
        y + masked(y, torch.zeros(()).to(y)) + masked(y, m.frames.bias.to(y))
    ),
}


@starts
@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_lists_out_of_order(name: str, start: str) -> None:
    not_wrong(OUT_OF_ORDER[name], start)


@starts
@pytest.mark.parametrize("name", IN_ORDER)
def test_lists_in_order(name: str, start: str) -> None:
    sparse(IN_ORDER[name], start)


def _frame_by_frame(order: Sequence[int], axis: int) -> Callable[[Model, Tensor], Tensor]:
    def tokens(m: Model, x: Tensor) -> Tensor:
        y = torch.stack([m.conv2d(x[:, :, i]) for i in order], axis)
        return flat(y.permute(0, 1, 3, 4, 2) if axis == 1 else y.permute(0, 2, 3, 4, 1))

    return tokens


@pytest.mark.parametrize("axis", [1, 2])
def test_a_convolution_of_each_frame(axis: int) -> None:
    for order in ((3, 2, 1, 0), (0, 2, 1, 3), (1, 2, 3, 0)):
        not_wrong(_frame_by_frame(order, axis), "raw")
    sparse(_frame_by_frame(range(T), axis), "raw")


# --- convolutions over dims that are not what they take them for -----------------------------------------------------


POINTWISE: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "[B, D, T, H * W]": lambda m, y: m.point2d(moved(y).flatten(3)).flatten(2).mT,
    "[B, D, T * H, W]": lambda m, y: m.point2d(moved(y).flatten(2, 3)).flatten(2).mT,
    "[B, D, T, H * W], a row of three": lambda m, y: m.wide2d(moved(y).flatten(3)).flatten(2).mT,
    "[B, D, H, W, T] and back": lambda m, y: m.point3d(y.permute(0, 4, 2, 3, 1)).permute(0, 4, 2, 3, 1).flatten(1, 3),
    "[B * H, D, T, W] and back": lambda m, y: flat(
        m.point2d(y.permute(0, 2, 4, 1, 3).flatten(0, 1)).unflatten(0, (2, H)).permute(0, 3, 1, 4, 2)
    ),
    "[B, D, N]": lambda m, y: m.point1d(flat(y).mT).mT,
}
POINTWISE_OUT_OF_ORDER: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "[B, D, H, W, T]": lambda m, y: m.point3d(y.permute(0, 4, 2, 3, 1)).flatten(2).mT,
    "[B, D, W, H, T]": lambda m, y: m.point3d(y.permute(0, 4, 3, 2, 1)).flatten(2).mT,
    "[B, D, T, W, H]": lambda m, y: m.point3d(y.permute(0, 4, 1, 3, 2)).flatten(2).mT,
    "[B, D, H, T * W]": lambda m, y: m.point2d(y.permute(0, 4, 2, 1, 3).flatten(3)).flatten(2).mT,
    "[B, D, H * W, T]": lambda m, y: m.point2d(y.permute(0, 4, 2, 3, 1).flatten(2, 3)).flatten(2).mT,
    "[B * H, D, T, W]": lambda m, y: (
        m.point2d(y.permute(0, 2, 4, 1, 3).flatten(0, 1)).unflatten(0, (2, H)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    ),
}


@starts
@pytest.mark.parametrize("name", POINTWISE | POINTWISE_OUT_OF_ORDER)
def test_pointwise_convolutions(name: str, start: str) -> None:
    not_wrong((POINTWISE | POINTWISE_OUT_OF_ORDER)[name], start)


@pytest.mark.parametrize("name", [name for name in POINTWISE if "three" not in name])
def test_pointwise_convolutions_keep_what_axes_are(name: str) -> None:
    sparse(POINTWISE[name])


def test_a_convolution_over_frames_and_columns() -> None:
    def axial(m: Model, x: Tensor) -> Tensor:
        y = m.conv2d(x.permute(0, 3, 1, 2, 4).flatten(0, 1)).unflatten(0, (2, H))  # [B, H, D, T, W]
        return y.permute(0, 1, 3, 4, 2).flatten(1, 3)

    not_wrong(axial, "raw")


@pytest.mark.parametrize("samples", [1, 2])
def test_a_convolution_over_frames_and_rows(samples: int) -> None:
    """Channels may not be taken for frames, to make rows and columns of them: also not beside dims of size one."""
    dims = (("sample", samples), ("", 4), ("frame", T), ("row", H), ("col", 1))

    def over_frames(m: Model, x: Tensor) -> Tensor:
        y = m.conv2d(x.permute(0, 4, 1, 2, 3).flatten(0, 1)).unflatten(0, (samples, 1))  # [B, W, D, T, H]
        return y.permute(0, 3, 4, 1, 2).flatten(1, 3)

    not_wrong(over_frames, "raw", [Source(dims)])
    not_wrong(lambda m, x: over_frames(m, x.transpose(3, 4)), "raw", [Source((*dims[:3], ("row", 1), ("col", W)))])


def test_a_convolution_of_channels_side_by_side() -> None:
    sparse(lambda m, x: back(m.conv3d(torch.cat([x[:, 2:], x[:, :2]], 1))), "raw")


def test_a_convolution_of_frames_that_a_product_mixed() -> None:
    def mixed(m: Model, x: Tensor) -> Tensor:
        return back(m.conv3d(torch.einsum("st,bcthw->bcshw", TURNED.to(x), x)))

    not_wrong(mixed, "raw")


# --- meshes ----------------------------------------------------------------------------------------------------------


def _mesh(sizes: Sequence[int], order: Sequence[int] = (0, 1, 2)) -> Callable[[Model, Tensor], Tensor]:
    """Tokens in an order of the axes of a mesh of these sizes."""

    def tokens(m: Model, x: Tensor) -> Tensor:
        mesh = torch.stack(torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij"), -1)
        angle = mesh.permute(*order, 3).reshape(-1, 3).repeat(1, D).to(x)[:, :D]
        y = m.linear(x)
        return y * angle.cos() + y.roll(1, -1) * angle.sin()

    return tokens


@pytest.mark.parametrize("sizes", [(T, H, W), (H, W, T), (W, H, T), (T, W, H)])
def test_a_mesh_names_its_axes_by_their_order(sizes: Grid) -> None:
    """Where tokens come as tokens, nothing else can tell which axis is time."""
    dims = tuple(zip(("frame", "row", "col"), sizes, strict=True))
    sparse(_mesh(sizes), "raw", sizes, [Source((("sample", 2), *dims, ("", 4)))])


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_tokens_in_another_order_than_a_mesh_names_its_axes(order: Sequence[int]) -> None:
    named = tuple(zip(("frame", "row", "col"), GRID, strict=True))
    dims = tuple(named[place] for place in order)
    not_wrong(_mesh(GRID, order), "raw", [Source((("sample", 2), *dims, ("", 4)))])


@starts
@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0), (0, 2, 1)])
def test_a_mesh_in_the_wrong_order_of_tokens(order: Sequence[int], start: str) -> None:
    def tokens(m: Model, y: Tensor) -> Tensor:
        sizes = [GRID[place] for place in order]
        mesh = torch.stack(torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij"), -1)
        angle = mesh.reshape(-1, 3).repeat(1, D).to(y)[:, :D]
        return y.permute(0, *(1 + place for place in order), 4).flatten(1, 3) * angle.cos()

    not_wrong(tokens, start)


# --- digits, samples, channels ---------------------------------------------------------------------------------------


def _phases(y: Tensor, axis: int, count: int, back_again: bool = False) -> Tensor:
    y = y.unflatten(axis, (y.shape[axis] // count, count)).transpose(axis, axis + 1)
    return (y.transpose(axis, axis + 1) if back_again else y).flatten(1, -2)


@starts
@pytest.mark.parametrize(("axis", "count"), [(1, 2), (2, 2), (2, 3)])
def test_digits_of_an_axis(axis: int, count: int, start: str) -> None:
    not_wrong(lambda m, y: _phases(y, axis, count), start)
    sparse(lambda m, y: _phases(y, axis, count, back_again=True), start)


def test_digits_of_an_image() -> None:
    def by_convolution(m: Model, x: Tensor) -> Tensor:
        return _phases(m.conv2d(x).permute(0, 2, 3, 1), 1, 2)

    not_wrong(by_convolution, "raw", [IMAGE])
    not_wrong(lambda m, x: _phases(m.linear(x.permute(0, 2, 3, 1)), 1, 2), "raw", [IMAGE])
    single = Source((("sample", 2), ("", 4), ("frame", 1), ("row", H), ("col", W)))
    for start in ("conv", "linear"):
        not_wrong(lambda m, y: _phases(y, 2, 2), start, [single])
        not_wrong(lambda m, y: _phases(y[:, 0], 1, 2), start, [single])


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("early", [False, True], ids=["of features", "of the input"])
def test_slots_of_an_image(early: bool, axis: int) -> None:
    order = backwards((H, W)[axis - 2])

    def tokens(m: Model, x: Tensor) -> Tensor:
        x = put(x.clone(), x, axis, order) if early else x
        y = m.linear(x.permute(0, 2, 3, 1))
        mesh = torch.stack(torch.meshgrid(*map(torch.arange, (1, H, W)), indexing="ij"), -1).to(y).sum(-1, keepdim=True)
        y = y if early else put(y.clone(), y, axis - 1, order)
        return flat(y[:, None] + mesh)

    not_wrong(tokens, "raw", [IMAGE])


def test_samples_in_the_sequence() -> None:
    not_wrong(lambda m, x: m.conv2d(x).permute(0, 2, 3, 1).flatten(0, 2)[None], "raw", [IMAGE])
    not_wrong(lambda m, y: y.flatten(0, 3)[None])
    not_wrong(lambda m, y: y[:, 0].flatten(0, 2)[None])


def test_channels_in_the_sequence() -> None:
    not_wrong(lambda m, y: m.frames(y.permute(0, 4, 2, 3, 1)).flatten(1, 3))
    not_wrong(lambda m, y: m.frames(y.permute(0, 2, 4, 3, 1)).flatten(1, 3))
    # nor do tables of positions say that features, which they have first, are frames
    not_wrong(lambda m, y: m.frames((moved(y) + m.frame_table).permute(0, 1, 3, 4, 2)).flatten(1, 3))
    not_wrong(lambda m, x: m.conv2d(x)[..., None].flatten(1, 3).expand(-1, -1, D), "raw", [IMAGE])


@pytest.mark.parametrize("into", [torch.clone, torch.empty_like], ids=["a copy", "nothing"])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_slots_of_a_grid_that_a_parameter_tells(axis: int, into: Callable[[Tensor], Tensor]) -> None:
    for order in (range(GRID[axis - 1]), backwards(GRID[axis - 1])):
        found = grids_of_numbered(lambda y, order=order: put(into(y), y, axis, order, keepdim=True))
        assert found == ({GRID} if order[0] == 0 else {None})


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_indices_of_a_grid_that_a_parameter_tells(axis: int) -> None:
    for order in (range(GRID[axis - 1]), backwards(GRID[axis - 1])):
        found = grids_of_numbered(lambda y, order=order: put(y.clone(), y, axis, order))
        assert found == ({GRID} if order[0] == 0 else {None})


def put_each(y: Tensor, outer: int, inner: int, turned: int | None = None) -> Tensor:
    """A copy, made index by index of two dims; one of the two may be turned round."""
    z = y.clone()
    for i in range(y.shape[outer]):
        for j in range(y.shape[inner]):
            place, other = (y.shape[dim] - 1 - at if dim == turned else at for dim, at in ((outer, i), (inner, j)))
            z.select(inner, j).select(outer, i).copy_(y.select(inner, other).select(outer, place))
    return z


@pytest.mark.parametrize(("outer", "inner"), [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
def test_indices_of_two_dims_of_a_grid_that_a_parameter_tells(outer: int, inner: int) -> None:
    assert grids_of_numbered(lambda y: put_each(y, outer, inner)) == {GRID}
    for axis in {outer, inner} - {0}:
        assert grids_of_numbered(lambda y, axis=axis: put_each(y, outer, inner, axis)) == {None}


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_sums_in_place_in_a_grid_that_a_parameter_tells(axis: int) -> None:
    def sums(y: Tensor) -> Tensor:
        z = y.clone()
        for i, j in enumerate(backwards(GRID[axis - 1])):
            z.select(axis, i).mul_(0).add_(y.select(axis, j))
        return z

    assert grids_of_numbered(sums) == {None}
