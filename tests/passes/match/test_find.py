# SPDX-License-Identifier: Apache-2.0
"""Which attentions are matched, however their tokens come to be those of a video."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import capture, randn
from one_attention import H, N, T, Video, W, flat, latents, match, reason
from torch import Tensor, fx, nn

from rainfusion_compile.passes.graph.nodes import bind
from rainfusion_compile.passes.match.find import find_attentions


def test_a_plain_video() -> None:
    found = match(Video())
    assert found.reason is None
    assert (found.grid, found.text) == ((T, H, W), (0, 0))
    assert (found.batch, found.heads, found.kv_heads, found.tokens, found.head_dim) == (2, 2, 2, N, 16)
    assert (found.dtype, found.out_dtype, found.device) == (torch.float32, torch.float32, torch.device("cpu"))
    assert found.scale == pytest.approx(0.25)
    assert not found.mask.keys


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.5),
        lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, scale=0.5),
        lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v, scale=0.5),
        lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v, scale=0.5),
    ],
    ids=["positional", "keywords", "packet", "overload"],
)
def test_every_spelling(attend: Callable[..., Tensor]) -> None:
    found = match(Video(attend=attend))
    assert (found.reason, found.grid, found.scale) == (None, (T, H, W), 0.5)


def test_grouped_queries() -> None:
    found = match(Video(heads=4, attend=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))
    assert (found.reason, found.heads, found.kv_heads) == (None, 4, 2)


def test_bind_names_all_arguments() -> None:
    (graph,) = capture(Video(), latents())
    (node,) = [node for node in graph.graph.nodes if "scaled_dot" in str(node.target)]
    bound = bind(node)
    assert list(bound)[:3] == ["query", "key", "value"]
    assert (bound["attn_mask"], bound["dropout_p"], bound["is_causal"], bound["enable_gqa"]) == (
        None,
        0.0,
        False,
        False,
    )
    with pytest.raises(ValueError, match="not a scaled_dot_product_attention"):
        bind(next(iter(graph.graph.nodes)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_text_around(order: tuple[int, int]) -> None:
    text = nn.Parameter(randn(1, 9, 32))

    def tokens(y: Tensor) -> Tensor:
        both = (flat(y), text.expand(len(y), -1, -1))
        return torch.cat([both[order[0]], both[order[1]]], 1)

    found = match(Video(tokens))
    assert (found.reason, found.grid, found.text) == (None, (T, H, W), ((0, 9), (9, 0))[order[0]])


def test_text_on_both_sides() -> None:
    text = nn.Parameter(randn(1, 9, 32))

    def tokens(y: Tensor) -> Tensor:
        many = text.expand(len(y), -1, -1)
        return torch.cat([many[:, :2], flat(y), many[:, 2:]], 1)

    assert match(Video(tokens)).text == (2, 7)


def test_padded_tokens_are_text() -> None:
    found = match(Video(lambda y: F.pad(flat(y), (0, 0, 0, 128 - N))))
    assert (found.grid, found.text) == ((T, H, W), (0, 128 - N))


def test_a_reordering_undone_is_none() -> None:
    def tokens(y: Tensor) -> Tensor:
        b, c, t, h, w = y.shape
        windows = y.reshape(b, c, t, h, 1, w // 7, 7).permute(0, 2, 3, 5, 4, 6, 1)
        return windows.reshape(b, t, h * w, c).reshape(b, t, h, w, c).flatten(1, 3)

    assert match(Video(tokens)).grid == (T, H, W)


@pytest.mark.parametrize(
    "there_and_back",
    [
        lambda y: flat(y.flip(2).flip(2)),
        lambda y: flat(y).flip(1).relu().flip(1),
        lambda y: flat(y.flip(2).cumsum(2).flip(2) + y),
        lambda y: flat(y.flip(2, 4)).unflatten(1, (T, H, W)).flip(3, 1).flatten(1, 3),
        lambda y: (flat(y).flip(1) + torch.arange(N).new_ones(N, 32)).flip(1),
    ],
    ids=["frames", "tokens", "sum with a backward scan", "two axes", "with what is not known"],
)
def test_turned_round_and_back(there_and_back: Callable[[Tensor], Tensor]) -> None:
    found = match(Video(there_and_back))
    assert (found.reason, found.grid) == (None, (T, H, W))


class AlongFrames(nn.Module):
    """A convolution along the frames of images that are flattened: neither rows nor columns."""

    def __init__(self, kernel: tuple[int, int] = (3, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, kernel, padding=tuple(size // 2 for size in kernel))

    def forward(self, y: Tensor) -> Tensor:
        frames = y.flatten(3)
        return (frames + self.conv(frames)).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("kernel", [(3, 1), (1, 3)])
def test_a_convolution_along_one_axis_is_none_over_rows_and_columns(kernel: tuple[int, int]) -> None:
    found = match(Video(AlongFrames(kernel)))
    assert (found.reason, found.grid) == (None, (T, H, W))
    alone = Video(AlongFrames(kernel))
    alone.patch = nn.Identity()
    assert match(alone, randn(2, 32, T, H * W)).grid is None  # these are not T rows


def test_frames_apart_and_together_again() -> None:
    def tokens(y: Tensor) -> Tensor:
        x = flat(y)
        return torch.cat([x[:, : H * W] * 2, x[:, H * W :] + 1], 1)

    assert match(Video(tokens)).grid == (T, H, W)


def test_frames_of_two_tensors_are_one_video() -> None:
    video = Video(lambda y: y)
    video.patch = nn.Identity()
    patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
    found = match(lambda first, x: video(flat(torch.cat([patch(first), patch(x)], 2))), latents((1, H, W)), latents())
    assert (found.reason, found.grid) == (None, (T + 1, H, W))


def test_a_frame_that_is_no_inputs_is_no_frame_of_the_video() -> None:
    """Of a parameter, say: nobody knows that it comes before the others, and not among them."""
    first = nn.Parameter(randn(1, 32, 1, H, W))
    why = reason(Video(lambda y: flat(torch.cat([first.expand(len(y), -1, -1, -1, -1), y], 2))))
    assert why.startswith(f"tokens: {(T + 1) * H * W}, with others than the video's among them")


def test_text_may_be_in_any_order() -> None:
    text = nn.Parameter(randn(2, 9, 32))
    found = match(Video(lambda y: torch.cat([flat(y), text.flip(1)], 1)))
    assert (found.reason, found.grid, found.text) == (None, (T, H, W), (0, 9))


def test_exported_graphs() -> None:
    with torch.no_grad():
        graph = torch.export.export(Video().eval(), (latents(),)).graph_module
        (found,) = find_attentions(graph)
    assert (found.reason, found.grid) == (None, (T, H, W))


def test_image_latents_are_one_frame() -> None:
    patch = nn.Conv2d(4, 32, 2, 2)
    video = Video(lambda y: y)
    video.patch = nn.Identity()
    found = match(lambda x: video(flat(patch(x))), randn(2, 4, 2 * H, 2 * W))
    assert (found.reason, found.grid) == (None, (1, H, W))


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (torch.ones(2, 1, 1, N, dtype=torch.bool), "bool"),
        (torch.ones(1, 1, 1, N, dtype=torch.bool), "bool"),
        (torch.zeros(2, 2, 1, N), "additive"),
        (torch.zeros(1, N), "additive"),
        (torch.zeros(2, 1, 1, N).expand(2, 2, N, N), "additive"),
    ],
)
def test_key_masks(mask: Tensor, kind: str) -> None:
    model = Video(lambda y: flat(y))
    found = match(lambda x, m: _masked(model, x, m), latents(), mask)
    assert (found.reason, found.key_mask_kind) == (None, kind)
    (factor,) = found.mask.keys
    assert factor.node.meta["example_value"].shape == mask.shape


def _masked(model: Video, x: Tensor, mask: Tensor) -> Tensor:
    model.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return model(x)


def test_a_packed_stream_learns_from_positions() -> None:
    """Text and video come in one tensor; only the video's slice meets a mesh of positions."""

    def run(x: Tensor) -> Tensor:
        mesh = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (T, H, W)), indexing="ij"), -1)
        q = x.clone()
        q[:, :, 9:] = q[:, :, 9:] * mesh.flatten(0, 2).float().sum(-1, keepdim=True)
        return F.scaled_dot_product_attention(q, x, x)

    found = match(run, randn(1, 2, N + 9, 16))
    assert (found.reason, found.grid, found.text) == (None, (T, H, W), (9, 0))


def test_positions_by_broadcasting() -> None:
    def run(x: Tensor) -> Tensor:
        t, h, w = (torch.arange(n, dtype=torch.float32) for n in (T, H, W))
        positions = t[:, None, None] * 100 + h[None, :, None] * 10 + w
        q = x * positions.reshape(1, 1, -1, 1)
        return F.scaled_dot_product_attention(q, q, x)

    assert match(run, randn(1, 2, N, 16)).grid == (T, H, W)


def test_all_attentions_are_reported_in_order() -> None:
    def run(x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return F.scaled_dot_product_attention(y, y, y)

    (graph,) = capture(run, randn(1, 2, N, 16))
    assert isinstance(graph, fx.GraphModule)
    with torch.no_grad():
        found = find_attentions(graph)
    assert [match.reason == "causal" for match in found] == [True, False]
