# SPDX-License-Identifier: Apache-2.0
"""Tables and meshes whose sizes fit tokens that are no raster of them: scrambled ones, or with registers among them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from orders.disturbance import Source, Verdict
from orders.video import D, Model, flat, look
from torch import Tensor, nn

from rainfusion_compile.sparsity.layout import Grid, VideoLayout

Step = Callable[[Tensor], Tensor]
"""``[B, T, H, W, D]`` as the same with other axes."""


def _table(grid: Grid) -> Step:
    table = nn.Parameter(torch.ones(1, *grid, D))
    return lambda y: y + table


def _mesh(grid: Grid) -> Step:
    def turned(y: Tensor) -> Tensor:
        mesh = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1)
        return y * mesh.repeat(1, 1, 1, D)[..., :D].to(y).cos()

    return turned


def _nothing(grid: Grid) -> Step:
    return lambda y: y


EVIDENCE = {"table": _table, "mesh": _mesh, "nothing": _nothing}


def _look(step: Step, evidence: Callable[[Grid], Step], sizes: Grid, start: str) -> Verdict:
    after = step(torch.zeros(2, *sizes, D)).shape[1:-1]
    told = evidence((after[0], after[1], after[2])) if len(after) == 3 else evidence(sizes)

    def tokens(m: Model, y: Tensor) -> Tensor:
        y = step(y)
        return flat(told(y)) if y.dim() == 5 else y.flatten(1, -2)

    dims = ("sample", "", "frame", "row", "col")
    return look(tokens, start, [Source(tuple(zip(dims, (2, 4, *sizes), strict=True)))])


def _dense(verdict: Verdict) -> None:
    assert verdict.claim.layout is None, (verdict.claim, verdict.wrong)
    assert verdict.claim.reason


starts = pytest.mark.parametrize("start", ["conv", "linear"])
evidences = pytest.mark.parametrize("evidence", ["table", "mesh"])


@starts
@evidences
@pytest.mark.parametrize("sizes", [(4, 6, 5), (3, 4, 1), (3, 1, 4), (1, 4, 6), (2, 2, 2)])
def test_tables_of_what_is_in_order(sizes: Grid, evidence: str, start: str) -> None:
    verdict = _look(lambda y: y, EVIDENCE[evidence], sizes, start)
    assert (verdict.wrong, verdict.claim.layout) == (None, VideoLayout(sizes)), verdict.claim.reason


# --- scrambles -------------------------------------------------------------------------------------------------------


def _exchanged(*dims: int) -> Step:
    """Axes in another order, seen as if they had the sizes of before."""
    return lambda y: y.permute(0, *dims, 4).reshape(y.shape)


def _halves(y: Tensor) -> Tensor:
    """The inner halves of frames and rows exchanged."""
    b, t, h, w, d = y.shape
    return y.reshape(b, t // 2, 2, h // 2, 2, w, d).transpose(2, 4).reshape(y.shape)


def _phases(y: Tensor) -> Tensor:
    b, t, h, w, d = y.shape
    return y.reshape(b, t, h // 2, 2, w, d).transpose(2, 3).reshape(b, t * 2, h // 2, w, d)


def _phases_as_columns(y: Tensor) -> Tensor:
    return y[:, :, :, 0].unflatten(2, (2, -1)).transpose(2, 3)


def _rows_first(y: Tensor) -> Tensor:
    """Rows in two, around frames of single columns."""
    return y[:, :, :, 0].unflatten(2, (2, -1)).permute(0, 2, 1, 3, 4)


def _shuffled(y: Tensor) -> Tensor:
    """Every second token first."""
    count = y[0, ..., 0].numel()
    matrix = torch.eye(count)[[*range(0, count, 2), *range(1, count, 2)]]
    return torch.tensordot(matrix.to(y), flat(y), dims=([1], [1])).movedim(0, 1).reshape(y.shape)


SCRAMBLES: dict[str, tuple[Grid, Step]] = {
    "frames and rows exchanged": ((2, 4, 6), _exchanged(2, 1, 3)),
    "rows and columns exchanged": ((3, 2, 4), _exchanged(1, 3, 2)),
    "frames last": ((2, 4, 2), _exchanged(2, 3, 1)),
    "halves exchanged": ((4, 4, 3), _halves),
    "phases as frames": ((2, 4, 3), _phases),
    "phases as columns": ((3, 4, 1), _phases_as_columns),
    "frames inside rows": ((3, 4, 1), _rows_first),
    "a permuted matrix of exchanged axes": ((6, 5, 2), lambda y: _shuffled(_exchanged(1, 3, 2)(y))),
    "a permuted matrix of exchanged frames": ((2, 4, 6), lambda y: _shuffled(_exchanged(2, 1, 3)(y))),
    "a permuted matrix of halves": ((4, 4, 3), lambda y: _shuffled(_halves(y))),
}


@starts
@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("name", SCRAMBLES)
def test_tables_of_scrambled_axes(name: str, evidence: str, start: str) -> None:
    sizes, step = SCRAMBLES[name]
    _dense(_look(step, EVIDENCE[evidence], sizes, start))


@starts
@pytest.mark.parametrize("evidence", EVIDENCE)
def test_tables_of_one_axis_seen_as_two(evidence: str, start: str) -> None:
    """These tokens are in order: dense, or sparse over what they are."""
    rows = _look(lambda y: y[:, :, :, 0].unflatten(2, (2, 2)), EVIDENCE[evidence], (3, 4, 1), start)
    frames = _look(lambda y: y[:, :, 0].unflatten(1, (2, 2)), EVIDENCE[evidence], (4, 1, 3), start)
    assert (rows.wrong, frames.wrong) == (None, None), (rows, frames)


@evidences
@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_meshes_of_tokens_in_another_order(order: tuple[int, int, int], evidence: str) -> None:
    sizes = (3, 2, 3)
    told = EVIDENCE[evidence]((sizes[order[0]], sizes[order[1]], sizes[order[2]]))

    def tokens(m: Model, x: Tensor) -> Tensor:
        y = m.linear(x).unflatten(1, sizes).permute(0, *(1 + place for place in order), 4)
        return flat(told(y))

    source = Source((("sample", 2), ("frame", 3), ("row", 2), ("col", 3), ("", 4)))
    _dense(look(tokens, "raw", [source]))


# --- registers -------------------------------------------------------------------------------------------------------

REGISTER = nn.Parameter(torch.ones(D))


def _registers(y: Tensor, axis: int, count: int) -> Tensor:
    shape = list(y.shape)
    shape[axis] = count
    return REGISTER.expand(shape)


def _before(y: Tensor, axis: int) -> Tensor:
    return torch.cat([_registers(y, axis, 1), y], axis)


def _after(y: Tensor, axis: int) -> Tensor:
    return torch.cat([y, _registers(y, axis, 2)], axis)


def _amid(y: Tensor, axis: int) -> Tensor:
    return torch.cat([y.narrow(axis, 0, 1), _registers(y, axis, 1), y.narrow(axis, 1, y.shape[axis] - 1)], axis)


def _around(y: Tensor, axis: int) -> Tensor:
    return torch.cat([_registers(y, axis, 1), y, y.mean(axis, keepdim=True)], axis)


def _stacked(y: Tensor, axis: int) -> Tensor:
    return torch.stack([_registers(y, axis, y.shape[axis]), y], axis).flatten(axis, axis + 1)


def _in_slots(y: Tensor, axis: int) -> Tensor:
    shape = list(y.shape)
    shape[axis] += 1
    z = y.new_zeros(shape)
    z.narrow(axis, 1, y.shape[axis]).copy_(y)
    return z


def _padded(y: Tensor, axis: int) -> Tensor:
    return F.pad(y, (0, 0) * (y.dim() - 1 - axis) + (1, 0))


PLACES = [_before, _after, _amid, _around, _stacked, _in_slots, _padded]


@starts
@pytest.mark.parametrize("sizes", [(4, 1, 6), (3, 4, 1), (3, 2, 4)])
@pytest.mark.parametrize("put", PLACES)
def test_registers_beside_the_tokens_of_each_frame(
    put: Callable[[Tensor, int], Tensor], sizes: Grid, start: str
) -> None:
    _dense(_look(lambda y: put(y.flatten(2, 3), 2), _nothing, sizes, start))


@starts
@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("put", PLACES)
def test_registers_among_rows_or_columns(
    put: Callable[[Tensor, int], Tensor], axis: int, evidence: str, start: str
) -> None:
    _dense(_look(lambda y: put(y, axis), EVIDENCE[evidence], (3, 4, 2), start))


@starts
def test_registers_in_front_of_all_frames_are_text(start: str) -> None:
    verdict = _look(lambda y: _before(flat(y), 1), _nothing, (3, 4, 2), start)
    assert (verdict.wrong, verdict.claim.layout) == (None, VideoLayout((3, 4, 2), (1, 0))), verdict.claim
