# SPDX-License-Identifier: Apache-2.0
"""Models whose frames Dynamo leaves to Python, as official repositories of video models have them.

A break inside a loop, `.tolist()` of the grid's sizes for one, takes the whole frame out of all graphs. The graph that
has attention then sees queries, keys and values that other graphs made, or other code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from found_grids import GRIDS, OPTIONS, call
from models import randn
from torch import Tensor, nn

import rainfusion_compile
from rainfusion_compile.passes.attention_match import DenseReason

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
pytestmark = pytest.mark.usefixtures("fixed_phases", "fresh_dynamo")


def spread(x: Tensor, sizes: Tensor, table: Tensor) -> Tensor:
    """Complex rotary angles of each sample's own grid, one table of frames, one of rows and one of columns."""
    parts, out = table.split([4, 2, 2], 1), []
    for sample, (t, h, w) in enumerate(sizes.tolist()):
        angles = torch.cat(
            [
                parts[0][:t].view(t, 1, 1, -1).expand(t, h, w, -1),
                parts[1][:h].view(1, h, 1, -1).expand(t, h, w, -1),
                parts[2][:w].view(1, 1, w, -1).expand(t, h, w, -1),
            ],
            -1,
        ).reshape(t * h * w, 1, -1)
        turned = torch.view_as_complex(x[sample].double().unflatten(-1, (-1, 2))) * angles
        out.append(torch.view_as_real(turned).flatten(2))
    return torch.stack(out).float()


@torch.compiler.disable
def outside(x: Tensor, sizes: Tensor, table: Tensor) -> Tensor:
    return spread(x, sizes, table)


def looked_up(x: Tensor, grid: Sequence[int], table: Tensor) -> Tensor:
    """Real angles looked up by place; how many there are is read off the places, inside the loop."""
    places = torch.cartesian_prod(*map(torch.arange, grid))
    out = []
    for axis, part in enumerate(x.split((8, 4, 4), -1)):
        angle = torch.arange(int(places.max()) + 1)[:, None] * table.real[0, : part.shape[-1] // 2].float()
        found = F.embedding(places[:, axis], torch.cat([angle, angle], -1))[None, :, None]
        one, two = part.chunk(2, -1)
        out.append(part * found.cos() + torch.cat([-two, one], -1) * found.sin())
    return torch.cat(out, -1)


def by_place(x: Tensor, sizes: Tensor, table: Tensor) -> Tensor:
    return looked_up(x, sizes[0].tolist(), table)


def by_known_place(x: Tensor, sizes: Tensor, table: Tensor) -> Tensor:
    """Only the number of places is read off a tensor."""
    return looked_up(x, GRIDS[0], table)


class Block(nn.Module):
    def __init__(self, rotate: Rotate) -> None:
        super().__init__()
        self.qkv, self.out, self.rotate = nn.Linear(32, 96), nn.Linear(32, 32), rotate

    def forward(self, x: Tensor, sizes: Tensor, table: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        q, k = self.rotate(q, sizes, table), self.rotate(k, sizes, table)
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        return x + self.out(y.transpose(1, 2).flatten(2))


class Video(nn.Module):
    def __init__(self, rotate: Rotate = spread) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(4, 32, 1)
        self.blocks = nn.ModuleList(Block(rotate) for _ in range(2))
        angles = torch.outer(torch.arange(16.0), 1000 ** -(torch.arange(8) / 8)).double()
        self.table = torch.polar(torch.ones_like(angles), angles)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.patch(latents)
        sizes = torch.tensor([x.shape[2:]] * len(x))
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, sizes, self.table)
        return x


def compiled(model: Video, blocks: bool = False, **options: Any) -> Callable[[Tensor], Tensor]:
    if not blocks:
        return torch.compile(model, backend="rainfusion", options={**OPTIONS, **options})
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="rainfusion", options={**OPTIONS, **options})
    return model


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("batch", "min_tokens"), [(1, 0), (2, 0), (2, 300)])
def test_identity_travels_alone_until_a_graph_shows_the_grid(blocks: bool, batch: int, min_tokens: int) -> None:
    """Queries and keys are turned in a graph of their own, which shows the grid; values go by it."""
    model = Video()
    function = compiled(Video(), blocks, min_tokens=min_tokens)
    everything = compiled(Video(), blocks, min_tokens=min_tokens, sparsity=0.0)
    for grid in (*GRIDS, *GRIDS):
        latents = randn(batch, 4, *grid)
        with torch.no_grad():
            dense = model(latents)
        out, found = call(function, latents)
        assert found == {grid}
        assert not torch.allclose(out, dense, atol=1e-5), "nothing was left out"
        out, found = call(everything, latents)
        assert found == {grid}
        torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("rotate", [outside, by_place])
@pytest.mark.parametrize("blocks", [False, True])
def test_what_no_graph_shows_takes_the_users_word(blocks: bool, rotate: Rotate) -> None:
    latents = randn(1, 4, *GRIDS[0])
    with torch.no_grad():
        dense = Video(rotate)(latents)
    out, found = call(compiled(Video(rotate), blocks), latents)
    assert found == {None}
    torch.testing.assert_close(out, dense)
    out, found = call(compiled(Video(rotate), blocks, grid=GRIDS[0]), latents)
    assert found == {GRIDS[0]}
    assert not torch.allclose(out, dense, atol=1e-5)
    torch._dynamo.reset()
    function = compiled(Video(rotate), blocks)
    for grid in GRIDS:
        with rainfusion_compile.video_layout(grid):
            assert call(function, randn(1, 4, *grid))[1] == {grid}


@pytest.mark.parametrize("captured", [False, True])
def test_a_graph_that_a_number_breaks_is_advised_to_hold_the_number(captured: bool) -> None:
    latents = randn(1, 4, *GRIDS[0])
    function = compiled(Video(by_known_place))
    with (
        torch._dynamo.config.patch(capture_scalar_outputs=captured),
        torch.no_grad(),
        rainfusion_compile.observe() as report,
    ):
        function(latents)
    found = report.to_dict()["attentions"]
    assert {entry["grid"] and tuple(entry["grid"]) for entry in found} == ({GRIDS[0]} if captured else {None})
    if not captured:
        assert all("which no other graph tells" in entry["reason"] for entry in found)
        assert "capture_scalar_outputs = True" in DenseReason.TOKENS_UNKNOWN.remedy


def test_values_that_the_graph_shows_to_be_the_given_video_do_not_contradict() -> None:
    class Straight(Video):
        """Without a loop, so that the convolution is in a graph, and with it the values."""

        def forward(self, latents: Tensor) -> Tensor:
            x = self.patch(latents)
            sizes = torch.tensor([x.shape[2:]])
            return self.blocks[0](x.flatten(2).transpose(1, 2), sizes, self.table)

    latents = randn(1, 4, *GRIDS[0])
    with torch.no_grad():
        dense = Straight(outside)(latents)
    function = torch.compile(Straight(outside), backend="rainfusion", options=OPTIONS)
    for told, wanted in ((None, None), (GRIDS[1], None), (GRIDS[0], GRIDS[0])):
        with rainfusion_compile.video_layout(told) if told else nullcontext():
            out, found = call(function, latents)
        assert found == {wanted}
        assert torch.allclose(out, dense, atol=1e-5) == (wanted is None)


@pytest.mark.parametrize("residual", [False, True])
def test_attention_to_another_video_stays_dense_whatever_is_given(residual: bool) -> None:
    """Values are another video of that grid, and only code outside of graphs knows what queries and keys are."""

    class Crossing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.kv = nn.Conv3d(4, 64, 1), nn.Linear(64, 128)

        def forward(self, latents: Tensor, others: Tensor) -> Tensor:
            x, y = (self.patch(z).flatten(2).transpose(1, 2) for z in (latents, others))
            k, v = self.kv(y).chunk(2, -1)
            q, k = (copied(x), copied(k)) if residual else (copied(x), k)
            out = F.scaled_dot_product_attention(*(z.unflatten(-1, (2, 32)).transpose(1, 2) for z in (q, k, v)))
            out = out.transpose(1, 2).flatten(2)
            return x + out if residual else out

    torch.manual_seed(0)
    function = torch.compile(Crossing(), backend="rainfusion", options=OPTIONS)
    with torch.no_grad(), rainfusion_compile.observe() as report, rainfusion_compile.video_layout(GRIDS[0]):
        function(randn(1, 4, *GRIDS[0]), randn(1, 4, *GRIDS[0]))
    (attention,) = report.to_dict()["attentions"]
    assert attention["status"] == "dense"
    assert "not known" in attention["reason"]


@torch.compiler.disable
def copied(x: Tensor) -> Tensor:
    return x.clone()


def test_other_tokens_in_one_batch_are_not_the_same() -> None:
    """Two videos, turned by the same tables: their tokens have one order, and are others."""

    class Cross(Block):
        def forward(self, x: Tensor, sizes: Tensor, table: Tensor, y: Tensor | None = None) -> Tensor:
            assert y is not None
            q, k, v = (self.qkv(part).unflatten(-1, (3, 2, 16)).select(2, i) for i, part in enumerate((x, y, y)))
            q, k = self.rotate(q, sizes, table), self.rotate(k, sizes, table)
            z = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
            return x + self.out(z.transpose(1, 2).flatten(2))

    class Two(Video):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Cross(spread) for _ in range(2))

        def forward(self, latents: Tensor) -> Tensor:
            x, y = (self.patch(part).flatten(2).transpose(1, 2) for part in latents.chunk(2))
            sizes = torch.tensor([latents.shape[2:]])
            for block in self.blocks:
                x = block(x, sizes, self.table, y)
            return x

    latents = randn(2, 4, *GRIDS[0])
    model = Two()
    with torch.no_grad():
        dense = model(latents)
    out, found = call(torch.compile(model, backend="rainfusion", options=OPTIONS), latents)
    assert found == {None}
    torch.testing.assert_close(out, dense)


def test_samples_of_a_batch_that_another_graph_made() -> None:
    """What is told of its tokens holds for each sample, not from one sample to the next."""

    class Between(nn.Module):
        def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.other, self.patch, self.qkv = other, nn.Conv3d(4, 32, 1), nn.Linear(32, 96)

        def forward(self, latents: Tensor) -> Tensor:
            x = self.patch(latents).flatten(2).transpose(1, 2)
            torch._dynamo.graph_break()
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, self.other(k), self.other(v))

    latents = randn(2, 4, *GRIDS[0])
    others: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.mean(0, keepdim=True).expand(2, -1, -1, -1),
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x.flip(0),
        lambda x: torch.stack([x[1], x[0]]),
    ]
    for other in others:
        torch._dynamo.reset()
        assert call(torch.compile(Between(other), backend="rainfusion", options=OPTIONS), latents)[1] == {None}
    for other in (lambda x: x, lambda x: torch.stack([x[0], x[1]]), lambda x: x.flip(0).flip(0)):
        torch._dynamo.reset()
        assert call(torch.compile(Between(other), backend="rainfusion", options=OPTIONS), latents)[1] == {GRIDS[0]}


def test_what_makes_nothing_sparse_compiles_nothing(compiled_count: list[bool]) -> None:
    """Blocks whose grid nobody shows: the second knows more of its tokens than the first, which is of no use."""

    class Plain(Block):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    blocks = [torch.compile(Plain(spread), backend="rainfusion", options=OPTIONS) for _ in range(4)]
    x = randn(1, 385, 32)
    with torch.no_grad():
        want = x
        for block in blocks:
            want = block._orig_mod(want)
        for _ in range(2):
            got = x
            for block in blocks:
                got = block(got)
            torch.testing.assert_close(got, want)
    assert compiled_count == [False]
