# SPDX-License-Identifier: Apache-2.0
"""Tokens out of order, kind by kind: dense, or sparse over the grid that disturbing the input shows. And in order: sparse.

Random models (`test_random_orders`) combine what stands here by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import order_operators
import pytest
import torch
import torch.nn.functional as F
from disturbance import Source, Verdict, judge
from torch import Tensor, nn

from rainfusion_compile.sparsity.layout import Grid, VideoLayout

T, H, W, D = 4, 6, 5, 32
N = T * H * W
GRID = (T, H, W)
op = torch.ops.orders


class Model(nn.Module):
    """``x [2, 4, T, H, W]`` as ``[2, T, H, W, D]`` by a convolution or a linear layer, tokens of it, attention."""

    def __init__(self, tokens: Callable[..., Tensor], start: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = tokens
        self.conv3d, self.conv2d, self.linear = nn.Conv3d(4, D, 1), nn.Conv2d(4, D, 1), nn.Linear(4, D)
        self.point1d, self.point2d, self.point3d = nn.Conv1d(D, D, 1), nn.Conv2d(D, D, 1), nn.Conv3d(D, D, 1)
        self.wide2d = order_operators.near(nn.Conv2d(D, D, (1, 3), padding="same"))
        self.frames, self.table = nn.Linear(T, D), nn.Parameter(torch.randn(T, H, W, D))
        self.qkv = nn.Linear(D, 3 * D)
        self.start = start

    def patches(self, x: Tensor) -> Tensor:
        if self.start == "conv":
            return self.conv3d(x).permute(0, 2, 3, 4, 1)
        return self.linear(x.permute(0, 2, 3, 4, 1)) if self.start == "linear" else x

    def heads(self, y: Tensor) -> Sequence[Tensor]:
        return self.qkv(y).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, *videos: Tensor) -> Tensor:
        tokens = self.tokens(self, *map(self.patches, videos))
        keys = tokens if isinstance(tokens, Tensor) else tokens[1]
        query, _, _ = self.heads(tokens if isinstance(tokens, Tensor) else tokens[0])
        _, key, value = self.heads(keys)
        return F.scaled_dot_product_attention(query, key, value)


VIDEO = Source((("sample", 2), ("", 4), ("frame", T), ("row", H), ("col", W)))
IMAGE = Source((("sample", 2), ("", 4), ("row", H), ("col", W)))


def look(tokens: Callable[..., Tensor], start: str = "conv", sources: Sequence[Source] = (VIDEO,)) -> Verdict:
    noise = torch.Generator().manual_seed(0)
    inputs = [torch.randn([size for _, size in source.dims], generator=noise) for source in sources]
    inputs = [x.flatten(1, 3) if source.dims[-1] == ("", 4) else x for x, source in zip(inputs, sources, strict=True)]
    (verdict,) = judge(Model(tokens, start).eval(), inputs, sources)
    return verdict


def not_wrong(tokens: Callable[..., Tensor], start: str = "conv", sources: Sequence[Source] = (VIDEO,)) -> None:
    verdict = look(tokens, start, sources)
    assert verdict.wrong is None, (verdict.claim, verdict.wrong)
    assert verdict.claim.layout is not None or verdict.claim.reason


def sparse(
    tokens: Callable[..., Tensor], start: str = "conv", grid: Grid = GRID, sources: Sequence[Source] = (VIDEO,)
) -> None:
    verdict = look(tokens, start, sources)
    assert (verdict.wrong, verdict.truth) == (None, VideoLayout(grid))
    assert verdict.claim.layout == VideoLayout(grid), verdict.claim.reason


def flat(y: Tensor) -> Tensor:
    return y.flatten(1, 3)


def moved(y: Tensor) -> Tensor:
    """``[B, T, H, W, D]`` as ``[B, D, T, H, W]``."""
    return y.permute(0, 4, 1, 2, 3)


def back(y: Tensor) -> Tensor:
    return flat(y.permute(0, 2, 3, 4, 1))


def put(z: Tensor, y: Tensor, axis: int, order: Sequence[int]) -> Tensor:
    for i, j in enumerate(order):
        z.select(axis, i).copy_(y.select(axis, j))
    return z


def backwards(count: int) -> list[int]:
    return list(range(count))[::-1]


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
    "linear over columns": lambda m, y: flat(F.linear(y.mT, torch.eye(W).flip(0).to(y)).mT),
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


def test_samples_in_the_sequence() -> None:
    not_wrong(lambda m, x: m.conv2d(x).permute(0, 2, 3, 1).flatten(0, 2)[None], "raw", [IMAGE])
    not_wrong(lambda m, y: y.flatten(0, 3)[None])
    not_wrong(lambda m, y: y[:, 0].flatten(0, 2)[None])


def test_channels_in_the_sequence() -> None:
    not_wrong(lambda m, y: m.frames(y.permute(0, 4, 2, 3, 1)).flatten(1, 3))
    not_wrong(lambda m, y: m.frames(y.permute(0, 2, 4, 3, 1)).flatten(1, 3))
    not_wrong(lambda m, x: m.conv2d(x)[..., None].flatten(1, 3).expand(-1, -1, D), "raw", [IMAGE])


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
    "gather": lambda y: y.gather(1, torch.arange(T - 1, -1, -1).view(1, T, 1, 1, 1).expand(y.shape)),
    "scatter": lambda y: torch.zeros_like(y).scatter(1, torch.arange(T - 1, -1, -1).view(1, T, 1, 1, 1).expand(y.shape), y),
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
