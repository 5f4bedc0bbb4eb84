# SPDX-License-Identifier: Apache-2.0
"""Grids read off tables of positions: the right one, or none."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from compared import shown_by
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import Grid, randn
from position_tables import GRIDS, mesh, rotary
from torch import Tensor, nn

from rainfusion_compile.runtime.outside_knowledge import PositionInputs
from rainfusion_compile.runtime.positions import rasters_of, read_positions
from rainfusion_compile.sparsity.layout import VideoLayout

pytestmark = pytest.mark.usefixtures("fixed_phases", "fresh_dynamo")


def table(grid: Grid, **kwargs: Any) -> Tensor:
    angles = rotary(mesh(grid).flatten(0, 2), **kwargs)
    return torch.cat([angles.cos(), angles.sin()], 1)


grids = st.tuples(st.integers(1, 6), st.integers(2, 9), st.integers(2, 9))


@given(
    grids,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from([256.0, 1e4]),
    st.integers(4, 12),
    st.sampled_from(["cos", "complex", "angles", "batch", "heads", "places"]),
)
@example((33, 45, 80), torch.float32, 256.0, 8, "cos")
@example((21, 30, 52), torch.float64, 1e4, 22, "complex")
@example((13, 30, 45), torch.bfloat16, 1e4, 8, "heads")
@hypothesis_settings(deadline=None)
def test_every_grid_is_read(grid: Grid, dtype: torch.dtype, theta: float, freqs: int, kind: str):
    angles = rotary(mesh(grid).flatten(0, 2), freqs, theta)
    both = table(grid, freqs=freqs, theta=theta).to(dtype)
    dim, given_table = {
        "cos": (0, angles.cos().to(dtype)),
        "angles": (0, angles.to(dtype)),
        "complex": (0, torch.polar(torch.ones_like(angles), angles)),
        "batch": (1, both[None, :, None].repeat(2, 1, 1, 1)),
        "heads": (2, both.unflatten(1, (2, -1)).movedim(1, 0)[None]),
        "places": (1, mesh(grid).flatten(0, 2).T.contiguous()),
    }[kind]
    found = read_positions(given_table, min_tokens=min(math.prod(grid), 64))
    assert found == (dim, VideoLayout(grid))


@given(grids, st.randoms(use_true_random=False), st.sampled_from(["frames", "rows", "columns", "tokens"]))
@hypothesis_settings(deadline=None)
def test_another_order_is_not_read(grid: Grid, random: Any, what: str):
    t, h, w = grid
    places = mesh(grid)
    dim = {"frames": 0, "rows": 1, "columns": 2}.get(what)
    if dim is None:
        places = places.flatten(0, 2)
        size = t * h * w
    else:
        size = grid[dim]
    order = list(range(size))
    random.shuffle(order)
    assume(order != sorted(order) and order != sorted(order, reverse=True))
    places = places.index_select(dim or 0, torch.tensor(order)).reshape(-1, 3)
    angles = rotary(places)
    assert read_positions(torch.cat([angles.cos(), angles.sin()], 1), 4) is None


@given(
    grids,
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from([0.0, 1.0, 77.0]),
    st.sampled_from(["cos", "sin", "angles", "both", "complex", "matrices"]),
)
@hypothesis_settings(deadline=None)
def test_text_at_one_place_stands_around_the_video(grid: Grid, before: int, after: int, first: float, style: str):
    """Where the video's first token is at the same place, it is not counted as text."""
    assume(after != 1)
    places = [torch.zeros(before, 3), mesh(grid).flatten(0, 2) + first, torch.zeros(after, 3)]
    assume(before != 1 or first == 0)
    found = read_positions(STYLES[style](rotary(torch.cat(places))))
    assert found == (0, VideoLayout(grid, (before, after)))


@given(grids, st.integers(2, 20), st.randoms(use_true_random=False))
@hypothesis_settings(deadline=None)
def test_text_around_another_order_is_not_read(grid: Grid, text: int, random: Any):
    order = list(range(math.prod(grid)))
    random.shuffle(order)
    assume(order != sorted(order))
    places = torch.cat([torch.zeros(text, 3), mesh(grid).flatten(0, 2)[order]])
    assert read_positions(rotary(places).sin()) is None


@pytest.mark.parametrize("table", [torch.zeros(240), torch.arange(240.0), torch.arange(240) // 60, torch.eye(240)[0]])
def test_one_number_for_each_token_is_no_position(table: Tensor):
    assert read_positions(table) is None


def test_text_at_several_places_or_among_the_video_is_not_read():
    video = mesh((4, 6, 10)).flatten(0, 2)
    counted = torch.arange(9.0)[:, None].expand(-1, 3)
    for places in (
        [counted, video],
        [torch.zeros(5, 3), video[:120], torch.zeros(5, 3), video[120:]],
        [torch.zeros(5, 3), video[1:] + 1],
        [video[:-1], torch.zeros(5, 3)],
        [torch.zeros(5, 3), torch.ones(5, 3), video + 2],
        [torch.zeros(240, 3)],
        [torch.zeros(40, 3), torch.ones(10, 3)],
    ):
        assert read_positions(rotary(torch.cat(places)).sin()) is None


@pytest.mark.parametrize("order", [(0, 2, 1), (1, 2, 0), (2, 1, 0)])
def test_tokens_in_another_order_than_frames_rows_columns(order: tuple[int, int, int]):
    places = mesh((4, 6, 10)).permute(*order, 3).flatten(0, 2)
    assert read_positions(rotary(places).sin()) is None


@st.composite
def reordered(draw: st.DrawFn) -> tuple[Grid, Tensor]:
    """A grid, and its tokens in some order of the raster: ``[tokens]``.

    Axes are cut into digits, which change places and directions: transposed, polyphase, interleaved, tiled and
    reversed. Or one axis is in any order, two tokens have changed places, or all have moved on.
    """
    grid = draw(st.tuples(*[st.sampled_from([1, 2, 3, 4, 5, 6, 8, 9])] * 3).filter(lambda grid: math.prod(grid) >= 4))
    order = torch.arange(math.prod(grid)).view(grid)
    kind = draw(st.sampled_from(["digits", "axes", "axis", "swap", "roll"]))
    if kind in ("digits", "axes"):
        if kind == "digits":
            factors = {4: (2, 2), 6: (2, 3), 8: (2, 2, 2), 9: (3, 3)}
            order = order.view([digit for size in grid for digit in factors.get(size, (size,))])
        order = order.permute(draw(st.permutations(range(order.dim()))))
        order = order.flip([dim for dim in range(order.dim()) if draw(st.booleans())])
    elif kind == "axis":
        dim = draw(st.integers(0, 2))
        order = order.index_select(dim, torch.tensor(draw(st.permutations(range(grid[dim])))))
    order = order.flatten().roll(draw(st.integers(0, order.numel() - 1)) if kind == "roll" else 0)
    if kind == "swap":
        one, two = (draw(st.integers(0, order.numel() - 1)) for _ in range(2))
        order[[one, two]] = order[[two, one]]
    return grid, order


STYLES: dict[str, Any] = {
    "cos": torch.cos,
    "sin": torch.sin,
    "angles": lambda turns: turns,
    "both": lambda turns: torch.cat([turns.cos(), turns.sin()], 1),
    "pairs": lambda turns: turns.cos().repeat_interleave(2, 1),
    "complex": lambda turns: torch.polar(torch.ones_like(turns), turns),
    "matrices": lambda turns: torch.stack([turns.cos(), -turns.sin(), turns.sin(), turns.cos()], -1),
    "axes interleaved": lambda turns: turns.unflatten(1, (3, -1)).transpose(1, 2).flatten(1).sin(),
}


@example(((2, 3, 3), torch.arange(18).view(2, 9).flip(0).flatten()), "places", torch.float32, 256.0, 0.5)
@example(((1, 2, 2), torch.arange(4).flip(0)), "sin", torch.float32, 256.0, 7.0)
@example(((1, 2, 3), torch.tensor([0, 1, 3, 4, 2, 5])), "places", torch.float32, 256.0, 0.0)
@example(((2, 2, 2), torch.tensor([2, 1, 0, 3, 4, 5, 6, 7])), "places", torch.float32, 256.0, 0.0)
@given(
    reordered(),
    st.sampled_from([*STYLES, "places"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from([256.0, 1e4]),
    st.sampled_from([0.0, 0.5, 1.0, 7.0, "centred"]),
)
@hypothesis_settings(max_examples=300)
def test_whatever_the_order_the_grid_is_right_or_not_read(
    video: tuple[Grid, Tensor], style: str, dtype: torch.dtype, theta: float, offset: Any
):
    grid, order = video
    places = mesh(grid).flatten(0, 2).double()
    places = places - places.amax(0) / 2 if offset == "centred" else places + offset
    assume(offset != "centred" or min(grid) > 1)
    places = places[order]
    if style == "places":
        found = read_positions(places.to(dtype))
    else:
        given_table = STYLES[style](rotary(places, 8, theta))
        found = read_positions(given_table if given_table.is_complex() else given_table.to(dtype))
    if found is not None:
        assert found == (0, VideoLayout(grid))
        assert torch.equal(order, torch.arange(len(order)))


@pytest.mark.parametrize("grid", [(4, 1, 6), (4, 6, 1), (8, 1, 8)])
def test_one_row_or_column_is_no_image(grid: Grid):
    turns = rotary(mesh(grid).flatten(0, 2))
    for given_table in (turns, turns.cos(), turns.sin(), torch.cat([turns.cos(), turns.sin()], 1)):
        assert read_positions(given_table) is None


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", ["cos", "sin", "angles", "both", "complex", "matrices"])
def test_an_axis_walked_backwards_is_not_read(axis: int, kind: str):
    for freqs in (3, 4, 8):  # slow cosines do not change in float32
        turns = rotary(mesh((4, 6, 10)).flip(axis).flatten(0, 2), freqs)
        assert read_positions(STYLES[kind](turns)) is None
        turns = rotary(mesh((4, 6, 10)).flatten(0, 2), freqs)
        assert read_positions(STYLES[kind](turns)) == (0, VideoLayout((4, 6, 10)))


def test_the_order_of_columns_names_the_axes():
    """No number tells time from rows: a convention, which the module states."""
    places = mesh((4, 6, 10)).permute(1, 2, 0, 3).flatten(0, 2)
    assert read_positions(rotary(places[:, [1, 2, 0]]).sin()) == (0, VideoLayout((6, 10, 4)))
    assert read_positions(rotary(places).sin()) is None


def test_what_is_no_table():
    layout = VideoLayout((4, 6, 10))
    good = table((4, 6, 10))
    assert read_positions(good) == (0, layout)
    noise = good.clone()
    noise[100, 3] += 1e-3  # one number of one token
    broken = good.clone()
    broken[7] = float("nan")
    for tensor in (
        nn.Parameter(good, requires_grad=False),
        noise,
        broken,
        good.roll(1, 0),
        good[:-1],
        randn(240, 24),
        torch.zeros(240, 24),
        torch.ones(240, 240, dtype=torch.bool),
        torch.eye(240),
        torch.arange(240)[:, None].expand(-1, 24),
        torch.zeros(0, 3),
        torch.tensor(1.0),
    ):
        assert read_positions(tensor) is None
    assert read_positions(good, min_tokens=241) is None


def test_a_table_that_is_written_into_is_read_again():
    inputs = PositionInputs(min_tokens=4)

    def read(tensor: Tensor) -> Any:
        (dims,) = shown_by([tensor], inputs)
        return dims and dims[0].grid

    tensor = table(GRIDS[0])
    assert read(tensor) == GRIDS[0]
    tensor.copy_(table(GRIDS[1]))
    assert read(tensor) == GRIDS[1]
    tensor.data = table(GRIDS[0])
    assert read(tensor) == GRIDS[0]
    copied = copy.deepcopy(tensor).copy_(table(GRIDS[1]))
    assert read(copied) == GRIDS[1]
    tensor.data = table((3, 6, 10))
    assert read(tensor) == (3, 6, 10)
    with torch.inference_mode():
        tensor = table(GRIDS[0])
        assert read(tensor) == GRIDS[0]
        tensor.copy_(table(GRIDS[1]))  # counts no versions
        assert read(tensor) == GRIDS[1]


@pytest.mark.parametrize("inference", [False, True])
def test_equal_tables_are_compared_not_read_again(monkeypatch: pytest.MonkeyPatch, inference: bool):
    inputs = PositionInputs(min_tokens=4)
    with torch.inference_mode(inference):
        first = shown_by([table(GRIDS[0])], inputs)
        monkeypatch.setattr("rainfusion_compile.runtime.tables.read_positions", lambda *args: pytest.fail("was read"))
        again = table(GRIDS[0])
        assert shown_by([again], inputs) == shown_by([again], inputs) == first
        monkeypatch.undo()
        assert shown_by([table(GRIDS[1])], inputs)[0][0].grid == GRIDS[1]


def blocks_of(grid: Grid, tile: Grid) -> Tensor:
    """Coordinates in tiles, as windowed attention and patch merging order them."""
    t, h, w = (size // part for size, part in zip(grid, tile, strict=True))
    return (
        mesh(grid)
        .unflatten(2, (w, -1))
        .unflatten(1, (h, -1))
        .unflatten(0, (t, -1))
        .permute(0, 2, 4, 1, 3, 5, 6)
        .reshape(-1, 3)
    )


@pytest.mark.parametrize("tile", [(1, 4, 4), (2, 4, 4), (1, 2, 2), (4, 4, 8), (4, 8, 4)])
def test_coordinates_in_tiles_are_no_videos(tile: Grid):
    assert rasters_of(blocks_of((4, 8, 8), tile)) is None


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (0, 2, 1, 3), (1, 0, 3, 2), (2, 3, 0, 1)])
def test_coordinates_of_frames_in_another_order_are_no_videos(order: tuple[int, ...]):
    assert rasters_of(mesh((4, 6, 10))[list(order)].flatten(0, 2)) is None


@given(st.lists(st.tuples(grids, st.integers(0, 3)), min_size=1, max_size=4), st.integers(0, 5))
@hypothesis_settings(deadline=None)
def test_coordinates_of_several_videos_with_text(videos: list[tuple[Grid, int]], before: int):
    places = [torch.stack([torch.arange(float(before)), torch.zeros(before), torch.zeros(before)], 1)]
    time = float(before)
    for grid, after in videos:
        places.append(mesh(grid).flatten(0, 2) + torch.tensor([time, 0.5, 0.5]))
        sound = torch.zeros(after, 3)
        sound[:, 0] = time + torch.arange(after)
        places.append(sound)
        time += grid[0]
    texts = [before, *(after for _, after in videos)]
    # frames of one size without anything between them are one video
    assume(all(after or grid[1:] != other[0][1:] for (grid, after), other in itertools.pairwise(videos)))
    found = rasters_of(torch.cat(places))
    expected = VideoLayout(tuple(grid for grid, _ in videos) if len(videos) > 1 else videos[0][0], tuple(texts))
    assert found == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda places: places.roll(20, 0),
        lambda places: torch.cat([places[:25], places[26:]]),
        lambda places: places.index_select(0, torch.tensor([239, *range(1, 239), 0])),
        lambda places: places.unflatten(0, (4, 6, 10))[:, [0, 2, 4, 1, 3, 5]].flatten(0, 2),
        lambda places: places.unflatten(0, (24, 5, 2)).transpose(1, 2).flatten(0, 2),
        lambda places: places.unflatten(0, (4, 6, 10))[:, [1, 0, 2, 3, 4, 5]].flatten(0, 2),
    ],
    ids=["rolled", "one missing", "two swapped", "rows interleaved", "columns interleaved", "rows swapped"],
)
def test_coordinates_of_a_damaged_raster_are_no_videos(damage: Any):
    places = mesh((4, 6, 10)).flatten(0, 2)
    assert rasters_of(places) is not None
    assert rasters_of(damage(places)) is None


def test_coordinates_without_a_video():
    assert rasters_of(torch.arange(30.0)[:, None] * torch.tensor([1.0, 0, 0])) is None
    assert rasters_of(randn(30, 3)) is None
    assert rasters_of(torch.arange(30.0)[:, None] * torch.tensor([0.0, 0, 1])) is None  # one row


def test_inputs_that_show_nothing_are_read_ever_less_often(monkeypatch: pytest.MonkeyPatch):
    inputs = PositionInputs(min_tokens=4)
    reads = []
    monkeypatch.setattr("rainfusion_compile.runtime.tables.read_positions", lambda *args: reads.append(args))
    for _ in range(10 * PositionInputs.TRIES):
        assert shown_by([randn(8, 4)], inputs) == (None,)
    assert len(reads) == PositionInputs.TRIES + 9
    monkeypatch.undo()
    found = [shown_by([table(GRIDS[0])], inputs) for _ in range(PositionInputs.TRIES)]
    assert found[-1] != (None,)
    assert len(inputs.last) == 1
