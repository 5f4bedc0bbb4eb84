# SPDX-License-Identifier: Apache-2.0
"""Tokens that are not what they were, kind by kind: written over, of another sample or video."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from orders.disturbance import Source
from orders.video import GRID, VIDEO, D, H, Model, N, T, W, backwards, flat, not_wrong, sparse
from torch import Tensor

op = torch.ops.orders
starts = pytest.mark.parametrize("start", ["conv", "linear"])

# --- operators without a rule, writes, aliases -----------------------------------------------------------------------


def _strided(y: Tensor) -> Tensor:
    b, t, h, w, d = y.shape
    return y.contiguous().as_strided((b, h, w, t, d), (t * h * w * d, w * d, d, h * w * d, 1)).reshape(y.shape)


def _in_place(y: Tensor) -> Tensor:
    y = y.contiguous().clone()
    op.pick_(y, 1, backwards(T))
    return y


def _in_place_tokens(y: Tensor) -> Tensor:
    y = flat(y).clone()
    op.pick_(y, 1, backwards(N))
    return y.unflatten(1, GRID)


def _through_a_view(y: Tensor) -> Tensor:
    y = y.contiguous().clone()
    op.pick_(y.flatten(1, 2), 1, backwards(T * H))
    return y


def _beside_a_view(y: Tensor) -> Tensor:
    y = y.contiguous().clone()
    seen = flat(y)
    op.pick_(y, 2, backwards(H))
    return seen.unflatten(1, GRID)


def _out(z: Tensor, y: Tensor) -> Tensor:
    op.pick_out(y, 1, backwards(T), z)
    return z


def _all_of(z: Tensor, y: Tensor) -> Tensor:
    z[:] = op.pick(y, 1, backwards(T))
    return z


PLACES, TURNED = torch.arange(N), torch.eye(N).flip(0)


def _looked_up(look: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda y: look(op.pick(flat(y), 1, backwards(N))).unflatten(1, GRID)


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "direct": lambda y: op.pick(y, 1, backwards(T)),
    "scrambled": lambda y: op.scramble(y, 1, 2),
    "in place": _in_place,
    "tokens in place": _in_place_tokens,
    "through a view": _through_a_view,
    "beside a view": _beside_a_view,
    "out": lambda y: _out(torch.empty_like(y), y),
    "out, over a copy": lambda y: _out(y.clone(), y),
    "copied": lambda y: torch.empty_like(y).copy_(op.pick(y, 1, backwards(T))),
    "copied over": lambda y: y.clone().copy_(op.pick(y, 1, backwards(T))),
    "assigned": lambda y: _all_of(torch.zeros_like(y), y),
    "added to zeros": lambda y: torch.zeros_like(y) + op.pick(y, 1, backwards(T)),
    "added to noise": lambda y: torch.rand_like(y) + op.pick(y, 2, backwards(H)),
    "chosen": lambda y: torch.where(torch.ones_like(y).bool(), op.pick(y, 1, backwards(T)), 0.0),
    "as_strided": _strided,
    "unfold": lambda y: torch.cat([y, y], 1).unfold(1, T, 1)[:, 1].movedim(-1, 1),
    "matrix": lambda y: (torch.eye(N).flip(0).to(y) @ flat(y)).unflatten(1, GRID),
    "looked up by an index": _looked_up(lambda y: y[:, PLACES]),
    "looked up along a dim": _looked_up(lambda y: torch.take_along_dim(y, PLACES.view(1, N, 1), 1)),
    "gathered": _looked_up(lambda y: y.gather(1, PLACES.view(1, N, 1).expand(y.shape))),
    "selected": _looked_up(lambda y: y.index_select(1, PLACES)),
    "selected of flipped ones": lambda y: flat(y).flip(1).index_select(1, PLACES).unflatten(1, GRID),
    "sliced of repeated ones": _looked_up(lambda y: y.repeat(1, 2, 1)[:, 7 : 7 + N]),
    "gather": lambda y: y.gather(1, torch.arange(T - 1, -1, -1).view(1, T, 1, 1, 1).expand(y.shape)),
    "scatter": lambda y: torch.zeros_like(y).scatter(
        1, torch.arange(T - 1, -1, -1).view(1, T, 1, 1, 1).expand(y.shape), y
    ),
    "index_copy": lambda y: torch.empty_like(y).index_copy(1, torch.arange(T - 1, -1, -1), y),
}


@starts
@pytest.mark.parametrize("again", [False, True], ids=["", "a table before and after"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_operators_without_a_rule(name: str, again: bool, start: str) -> None:
    def tokens(m: Model, y: Tensor) -> Tensor:
        table = m.table if again else 0
        return flat(UNKNOWN[name](y + table) + table)

    not_wrong(tokens, start)


@starts
@pytest.mark.parametrize("name", [name for name in UNKNOWN if "looked up" in name or "selected" in name])
def test_a_mesh_says_nothing_of_tokens_that_were_lost(name: str, start: str) -> None:
    def tokens(m: Model, y: Tensor) -> Tensor:
        mesh = torch.stack(torch.meshgrid(*map(torch.arange, GRID), indexing="ij"), -1).to(y)
        return flat(UNKNOWN[name](y) + mesh.sum(-1, keepdim=True))

    not_wrong(tokens, start)


def test_a_matrix_mixes_tokens_that_come_as_tokens() -> None:
    def tokens(m: Model, x: Tensor) -> Tensor:
        mesh = torch.stack(torch.meshgrid(*map(torch.arange, GRID), indexing="ij"), -1).flatten(0, 2).to(x)
        y = m.linear(x) + m.table.flatten(0, 2)
        return TURNED.to(x) @ y + mesh.sum(-1, keepdim=True)

    not_wrong(tokens, "nothing", [Source((("sample", 2), ("frame", T), ("row", H), ("col", W), ("", 4)))])


@pytest.mark.parametrize("join", [lambda frames: torch.cat(frames, 1), torch.hstack], ids=["cat", "hstack"])
def test_frames_in_an_unknown_order_side_by_side_are_no_images(join: Callable[[list[Tensor]], Tensor]) -> None:
    order = torch.tensor(backwards(T))

    def tokens(m: Model, x: Tensor) -> Tensor:
        frames = [m.conv2d(x[:, i]).permute(0, 2, 3, 1).unsqueeze(1) for i in range(T)]
        y = torch.cat(frames, 1)
        y = torch.index_select(y, 1, order, out=y.new_empty(y.shape))
        return join([y[:, i].flatten(1, 2) for i in range(T)])

    dims = (("sample", 2), ("frame", T), ("", 4), ("row", H), ("col", W))
    not_wrong(tokens, "nothing", (Source(dims),))


def _write_whole_read_view(y: Tensor) -> Tensor:
    y = y.contiguous().clone()
    seen = flat(y)
    y.copy_(y.flip(1).clone())
    return seen


def _write_view_read_whole(y: Tensor) -> Tensor:
    y = flat(y).contiguous().clone()
    seen = y.unflatten(1, GRID)
    seen.copy_(seen.flip(1).clone())
    return y


def _write_one_view_read_another(y: Tensor) -> Tensor:
    y = y.contiguous().clone()
    one, other = y.flatten(1, 2), y.flatten(2, 3)
    one[:] = one.flip(1)
    return other.flatten(1, 2)


def _write_method_by_method(y: Tensor) -> Tensor:
    y = y.contiguous().clone()
    seen, turned = y.view(y.shape), y.roll(1, 2)
    seen.mul_(0).add_(turned)
    return flat(y)


def _write_in_order(y: Tensor) -> Tensor:
    y = y.contiguous().clone()
    seen = flat(y)
    y.mul_(2).add_(1)
    return seen


@starts
@pytest.mark.parametrize(
    "tokens",
    [_write_whole_read_view, _write_view_read_whole, _write_one_view_read_another, _write_method_by_method],
)
def test_writes_through_aliases(tokens: Callable[[Tensor], Tensor], start: str) -> None:
    not_wrong(lambda m, y: tokens(y), start)


@starts
def test_writes_that_keep_the_order(start: str) -> None:
    sparse(lambda m, y: _write_in_order(y), start)


# --- queries of one video, keys of another ---------------------------------------------------------------------------

MEETINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "alone": lambda y, u: u,
    "added": lambda y, u: u + 0 * y,
    "gated": lambda y, u: u * torch.sigmoid(y),
    "masked": lambda y, u: u * (y > -100),
    "chosen": lambda y, u: torch.where(y > 100, y, u),
    "filled": lambda y, u: u.masked_fill(y > 100, 0.0),
    "clamped": lambda y, u: u.clamp(max=y.abs() + 100),
    "copied": lambda y, u: torch.empty_like(y).copy_(u),
    "into zeros": lambda y, u: torch.zeros_like(y) + u,
}


@starts
@pytest.mark.parametrize("table", [False, True], ids=["", "one table"])
@pytest.mark.parametrize("name", MEETINGS)
def test_two_videos(name: str, table: bool, start: str) -> None:
    def tokens(m: Model, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        y, u = (flat(z + m.table if table else z) for z in (y, u))
        return y, MEETINGS[name](y, u)

    not_wrong(tokens, start, [VIDEO, VIDEO])  # type: ignore[arg-type]


HOLDINGS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "stack": lambda y, u: torch.stack([y, u]).unbind(0),
    "stack in another dim": lambda y, u: torch.stack([y, u], 2).unbind(2),
    "stack, indexed": lambda y, u: (torch.stack([y, u])[0], torch.stack([y, u])[1]),
    "channels": lambda y, u: torch.cat([y, u], -1).chunk(2, -1),
    "channels, changed": lambda y, u: torch.cat([y, u], -1).mul(2).split(D, -1),
    "channels as heads": lambda y, u: torch.cat([y, u], -1).unflatten(-1, (2, D)).unbind(-2),
    "channels, every other": lambda y, u: (lambda z: (z[..., ::2], z[..., 1::2]))(torch.stack([y, u], -1).flatten(-2)),
    "samples": lambda y, u: torch.cat([y, u]).chunk(2),
    "tokens": lambda y, u: torch.cat([y, u], 1).chunk(2, 1),
}


@starts
@pytest.mark.parametrize("table", [False, True], ids=["", "one table"])
@pytest.mark.parametrize("name", HOLDINGS)
def test_two_videos_that_one_tensor_held(name: str, table: bool, start: str) -> None:
    def tokens(m: Model, y: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        y, u = (flat(z + m.table if table else z) for z in (y, u))
        return HOLDINGS[name](y, u)

    not_wrong(tokens, start, [VIDEO, VIDEO])  # type: ignore[arg-type]


@starts
@pytest.mark.parametrize("name", ["stack", "channels", "channels as heads"])
def test_one_of_two_videos_that_one_tensor_held(name: str, start: str) -> None:
    def tokens(m: Model, y: Tensor, u: Tensor) -> Tensor:
        return HOLDINGS[name](flat(y + m.table), flat(u + m.table))[1]

    sparse(tokens, start, sources=[VIDEO, VIDEO])


@starts
@pytest.mark.parametrize(
    "other",
    [
        lambda y: y.flip(0),
        lambda y: y.roll(1, 0),
        lambda y: y[[1, 0]],
        lambda y: torch.stack(y.unbind(0)[::-1]),
        lambda y: torch.cat([y[1:], y[:1]]),
        lambda y: torch.stack([y[1], y[0]]),
        lambda y: y[:1].expand(2, -1, -1),
    ],
    ids=["flip", "roll", "index", "unbind", "cat", "stack", "expand"],
)
def test_keys_of_another_sample(other: Callable[[Tensor], Tensor], start: str) -> None:
    def tokens(m: Model, y: Tensor) -> tuple[Tensor, Tensor]:
        y = flat(y + m.table)
        return y, other(y)

    not_wrong(tokens, start)  # type: ignore[arg-type]


@starts
def test_one_video_twice(start: str) -> None:
    sparse(lambda m, y: (flat(y + m.table), flat(y + m.table) * 2), start)  # type: ignore[arg-type,return-value]
