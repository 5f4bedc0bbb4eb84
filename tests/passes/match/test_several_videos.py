# SPDX-License-Identifier: Apache-2.0
"""Several videos in one sequence: each sparse over its own grid, everything between them kept."""

import models
import pytest
import small_video
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import randn
from one_attention import H, N, T, Video, W, flat, match
from strategies import layouts
from torch import Tensor, nn

import rainfusion_compile
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS, pattern_mask

OPTIONS = {"min_tokens": 0, "sparsity": 0.6, "error": 1.0}
REFERENCE, VIDEO = (3, 8, 10), (8, 12, 16)


@pytest.mark.parametrize(
    ("tokens", "grids", "text"),
    [
        (lambda y: torch.cat([flat(y), flat(y)], 1), ((T, H, W),) * 2, (0, 0, 0)),
        (lambda y: torch.cat([flat(y)[:, H * W :], flat(y)[:, : H * W]], 1), ((T - 1, H, W), (1, H, W)), (0, 0, 0)),
        (
            lambda y: torch.cat([y.new_zeros(2, 4, 32), flat(y), y.new_zeros(2, 9, 32), flat(y[:, :, :2]).clone()], 1),
            ((T, H, W), (2, H, W)),
            (4, 9, 0),
        ),
        (lambda y: torch.cat([flat(y[:, :, :, ::2, 1:]), flat(y)], 1), ((T, 3, W - 1), (T, H, W)), (0, 0, 0)),
    ],
    ids=["twice", "first frame last", "text between", "reference of another size"],
)
def test_each_video_has_its_grid(tokens, grids, text):
    found = match(Video(tokens))
    assert (found.reason, found.grid, found.text) == (None, grids, text)


def test_what_is_no_video_stays_dense_beside_one():
    """Reordered tokens count as text: every pair with them is kept."""
    found = match(Video(lambda y: torch.cat([flat(y).flip(1), flat(y)], 1)))
    assert (found.reason, found.grid, found.text) == (None, (T, H, W), (N, 0))


@given(layouts, st.booleans())
def test_pairs_between_videos_and_with_text_are_kept(layout, sampled):
    """Themselves: no other key may stand for them."""
    tables = block_tables(layout, sparsity=0.95, patterns=PATTERNS, sampled=sampled, block_q=8, block_k=8)
    samples = len(tables.key_blocks) - 2 * -(-layout.tokens // 8)
    video = torch.full((layout.tokens,), -1)
    for number, span in enumerate(layout.spans):
        video[span.start : span.stop] = number
    between = (video[:, None] != video[None, :]) | (video < 0)[:, None]
    for number, name in enumerate(tables.patterns):
        assert bool(pattern_mask(name, layout, {name: tables.radii[number][0]})[between].all())
        blocks = tables.block_mask(number)[:, samples:]
        kept = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
        rows = tables.order.long()
        for q in range(blocks.shape[0]):
            keys = [tables.key_blocks[samples + b] for b in blocks[q].nonzero().flatten().tolist()]
            kept[rows[8 * q : 8 * q + 8][:, None], torch.cat([*keys, rows[:0]])] = True
        assert bool(kept[between].all())


class Edits(nn.Module):
    """A reference video, text and the video to make, in one sequence."""

    def __init__(self, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, dim, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(small_video.Block(dim, heads) for _ in range(2))

    def forward(self, reference: Tensor, text: Tensor, video: Tensor) -> Tensor:
        first, last = (self.patch(x).flatten(2).transpose(1, 2) for x in (reference, video))
        x = torch.cat([first, text, last], dim=1)
        for block in self.blocks:
            x = x + block(x)
        return x[:, -last.shape[1] :]


def edit_inputs(reference: models.Grid = REFERENCE, video: models.Grid = VIDEO) -> tuple[Tensor, ...]:
    def latents(grid: models.Grid) -> Tensor:
        return randn(1, 3, grid[0], 2 * grid[1], 2 * grid[2])

    return latents(reference), randn(1, 9, 32), latents(video)


@pytest.fixture
def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield Edits().eval()
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compiled(model, dynamic):
    compiled = torch.compile(model, backend="rainfusion", options=OPTIONS, dynamic=dynamic)
    for reference, video in ((REFERENCE, VIDEO), (VIDEO, REFERENCE), (REFERENCE, (8, 16, 12))):
        with torch.no_grad(), rainfusion_compile.observe() as report:
            out = compiled(*edit_inputs(reference, video))
        assert bool(out.isfinite().all())
        found = report.to_dict()["attentions"]
        assert [(entry["status"], entry["grid"], entry["text"]) for entry in found] == [
            ("sparse", [list(reference), list(video)], [0, 9, 0])
        ] * 2
        assert all(entry["mean_density"] < 0.9 for entry in found)
        assert " and ".join("x".join(map(str, grid)) for grid in (reference, video)) in str(report)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_sparsity_zero_equals_dense(model, dynamic):
    options = {"min_tokens": 0, "sparsity": 0.0}
    compiled = torch.compile(model, backend="rainfusion", options=options, dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*edit_inputs()), model(*edit_inputs()), rtol=1e-4, atol=1e-5)


def test_grids_given_for_packed_tokens():
    grids, text = (REFERENCE, VIDEO), (0, 9, 3)
    tokens = VideoLayout(grids, text).tokens

    def packed(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    x = randn(1, 2, tokens, 16)
    assert match(packed, x).reason is not None
    found = match(packed, x, grid=grids, text=text)
    assert (found.reason, found.grid, found.text) == (None, grids, text)
    assert match(packed, x, grid=grids).reason is not None  # text is not told, and is none by default
    assert match(packed, x, grid=(REFERENCE, (8, 12, 17)), text=text).reason is not None


def test_given_grids_must_agree_with_the_graph():
    found = match(Video(lambda y: torch.cat([flat(y), flat(y)], 1)), grid=((T, W, H), (T, H, W)))
    assert found.reason.startswith("the graph shows grid")


@pytest.mark.parametrize("grid", [((2, 3, 4), (0, 3, 4)), ((2, 3, 4), (3, 4)), (), ((2, 3, 4), 5)])
def test_impossible_grids_are_errors(grid):
    with pytest.raises(ValueError, match="grid"):
        rainfusion_compile.Options(grid=grid)


def test_text_of_another_number_than_the_grids_is_an_error():
    with pytest.raises(ValueError, match="text"):
        rainfusion_compile.Options(grid=((2, 3, 4), (2, 3, 4)), text=(0, 0))
