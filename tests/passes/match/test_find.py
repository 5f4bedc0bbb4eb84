# SPDX-License-Identifier: Apache-2.0
"""Which attentions are matched, and why others are not: models written to be refused, or just not to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import capture, randn
from one_attention import H, N, T, Video, W, flat, latents, match, reason
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from rainfusion_compile.passes.graph.nodes import bind
from rainfusion_compile.passes.match import find
from rainfusion_compile.passes.match.find import find_attentions

# --- what is matched -------------------------------------------------------------------------------------------------


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


# --- what is not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "causal"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), "dropout"),
        (
            lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, attn_mask=torch.ones(N, N, dtype=torch.bool).tril()
            ),
            "mask depends on the query",
        ),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(2, 1, N, 1)), "mask of shape"),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :9], v[:, :, :9]),
            "cross-attention: 105 queries, 9 ",
        ),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k.roll(1, 2), v), "cross-attention: queries and keys"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v.flip(2)), "cross-attention: keys and values"),
        (lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]), "not 4-D"),
        (lambda q, k, v: F.scaled_dot_product_attention(q.double(), k.double(), v.double()), "dtype torch.float64"),
        (lambda q, k, v: F.scaled_dot_product_attention(q[..., :12], k[..., :12], v[..., :12]), "head dim 12"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :8]), "shapes differ"),
    ],
)
def test_attentions_that_stay_dense(attend: Callable[..., Tensor], why: str) -> None:
    assert reason(Video(attend=attend)).startswith(why)


def test_devices_and_sizes_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(find, "DEVICES", ("cuda",))
        assert reason(Video()) == "device cpu"
    assert reason(Video(), min_tokens=N + 1) == f"{N} tokens, fewer than min_tokens={N + 1}"
    assert match(Video(), min_tokens=N).reason is None


def test_gradients_stay_dense() -> None:
    assert reason(Video(), grad=True) == "needs gradients"
    frozen = Video().requires_grad_(False)
    assert match(frozen, latents(), grad=True).reason is None


def test_vmap_hides_the_grid() -> None:
    assert reason(Video(lambda y: torch.vmap(torch.sin)(flat(y)))).startswith("the order of tokens is lost at")
    assert reason(lambda x: torch.vmap(packed)(x), randn(2, 1, 2, N, 16))
    assert torch.is_grad_enabled()


def test_inside_a_checkpoint_stays_dense() -> None:
    model = Video()
    assert reason(lambda x: checkpoint(model, x, use_reentrant=False), latents(), grad=True).startswith(
        "inside a higher-order operator"
    )


def test_tensor_subclasses_stay_dense() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    q = randn(1, 2, N, 16)
    assert (
        reason(F.scaled_dot_product_attention, *(TwoTensor(q, q.clone()),) * 3)
        == "operand is no plain tensor (TwoTensor)"
    )


PERMUTATION = torch.randperm(N, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "tokens",
    [
        lambda y: flat(y).flip(1),
        lambda y: flat(y.flip(2)),
        lambda y: flat(y).roll(3, 1),
        lambda y: flat(y)[:, PERMUTATION],
        lambda y: flat(y).index_select(1, PERMUTATION),
        lambda y: flat(y).gather(1, PERMUTATION[None, :, None].expand(2, -1, 32)),
        lambda y: flat(y)[:, torch.arange(N - 1, -1, -1)],
        lambda y: flat(y)[:, flat(y).sum((0, 2)).argsort()],
        lambda y: flat(y).sort(1).values,
        lambda y: flat(y) + flat(y).flip(1),
        lambda y: flat(y).clone().index_copy(1, PERMUTATION, flat(y)),
        lambda y: torch.empty_like(flat(y)).copy_(flat(y).flip(1)),
        lambda y: _written(flat(y)),
        lambda y: flat(torch.cat([y[:, :, 1:], y[:, :, :1]], 2)),
        lambda y: flat(torch.cat([y[:, :, :1], y[:, :, :-1]], 2)),
        lambda y: flat(torch.cat([y[:, :, :1], y[:, :, 1:].flip(2)], 2)),
        lambda y: (flat(y) + flat(y).flip(1)).flip(1),
        lambda y: flat((y + y.flip(2)).flip(2)),
        lambda y: (flat(y).flip(1) + flat(y)[:, PERMUTATION]).flip(1),
        lambda y: (_padded(flat(y).flip(1)) + _padded(flat(y)))[:, :N].flip(1),
        lambda y: _padded(flat(y).flip(1)) + _padded(flat(y)),
        lambda y: _padded(flat(y)) + _padded(flat(y).flip(1)),
        lambda y: torch.cat([flat(y).flip(1)[:, :35] + flat(y)[:, :35], flat(y).flip(1)[:, 35:]], 1).flip(1),
    ],
    ids=[
        *("flip", "flip_frames", "roll", "index", "index_select", "gather", "backwards", "argsort", "sort", "sum"),
        *("index_copy", "copy", "setitem", "frames_rolled", "frames_shifted", "frames_flipped"),
        *(
            "sum_flipped",
            "sum_of_frames_flipped",
            "sum_permuted",
            "padded_sum_flipped",
            "padded_sum",
            "padded_sum_2",
            "sum_of_a_part_flipped",
        ),
    ],
)
def test_reordered_tokens_stay_dense(tokens: Callable[[Tensor], Tensor]) -> None:
    assert reason(Video(tokens)).startswith("tokens are reordered")
    # and no grid given from outside makes it better
    assert reason(Video(tokens), grid=(T, H, W)).startswith("tokens are reordered")


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 9))


def _written(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:, PERMUTATION] = x
    return out


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (lambda y: y.permute(0, 3, 4, 2, 1).flatten(1, 3), "token order is row, col, time"),
        (lambda y: y.permute(0, 2, 4, 3, 1).flatten(1, 3), "token order is time, col, row"),
        (
            lambda y: y[:, :, :, :, :4].unflatten(4, (2, 2)).permute(0, 2, 3, 5, 4, 1).flatten(1, 4),
            "token order: pieces of one axis",
        ),
        (lambda y: y.flatten(3).transpose(2, 3).flatten(2).transpose(1, 2), "tokens: 5 x 7 x 3|token order"),
        (lambda y: torch.cat([flat(y)[:, 10:], flat(y)[:, :10]], 1), "tokens: "),
        (lambda y: flat(y)[:, 1:], "tokens: 104 in one unstructured axis"),
        (lambda y: flat(y)[:, ::2], "tokens: 53 in one unstructured axis"),
        (lambda y: y.mean((3, 4)).transpose(1, 2), "tokens: 3 along time only"),
        (lambda y: flat(y) + flat(y.transpose(2, 3).reshape(y.shape)), "token order: operators contradict"),
    ],
)
def test_layouts_that_stay_dense(tokens: Callable[[Tensor], Tensor], why: str) -> None:
    assert reason(Video(tokens)).startswith(tuple(why.split("|")))


def test_attention_inside_windows_is_no_grid() -> None:
    """Windows of 2 x 2 x 2: their tokens are places inside a window, not on the video."""

    def tokens(y: Tensor) -> Tensor:
        b, c = y.shape[:2]
        y = y.reshape(b, c, 2, 2, 2, 2, 2, 2).permute(0, 2, 4, 6, 3, 5, 7, 1)
        return y.reshape(b * 8, 8, c)

    assert reason(Video(tokens), latents((4, 4, 4))).startswith("token order: pieces of one axis")


@pytest.mark.parametrize(("rows", "cols"), [(7, 5), (35, 1)])
def test_contradicting_positions_stay_dense(rows: int, cols: int) -> None:
    """A 5 x 7 latent meets positions counted over 7 x 5."""

    def tokens(y: Tensor) -> Tensor:
        mesh = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (T, rows, cols)), indexing="ij"))
        return flat(y) * mesh.flatten(1).float().sum(0)[:, None]

    found = match(Video(tokens))
    if cols == 1:
        assert found.grid == (T, H, W)  # a finer grid of the same places
    else:
        assert found.reason == "token order: operators contradict each other about the grid"


def test_positions_in_another_order_are_not_taken_for_time_first() -> None:
    def run(x: Tensor) -> Tensor:
        mesh = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (T, H, W)), indexing="ij"))
        positions = mesh.permute(0, 2, 3, 1).flatten(1).float().sum(0)[:, None]
        return F.scaled_dot_product_attention(x * positions, x * positions, x)

    assert reason(run, randn(1, 2, N, 16)).startswith("order of the axes cannot be known")


def test_channels_are_not_columns() -> None:
    """`[B, H, W, C]` seen as tokens `[B, H * W * groups]` is no video."""
    found = reason(lambda x: F.scaled_dot_product_attention(*(x.reshape(2, 1, -1, 16),) * 3), randn(2, 4, 6, 32))
    assert found.startswith(("order", "tokens"))


# --- grids from outside ----------------------------------------------------------------------------------------------


def packed(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x * 2, x, x)


def test_a_given_grid_is_taken_where_the_graph_cannot_know() -> None:
    x = randn(1, 2, N + 9, 16)
    assert reason(packed, x) == f"tokens: {N + 9} in one unstructured axis"
    found = match(packed, x, grid=(T, H, W), text=(0, 9))
    assert (found.reason, found.grid, found.text) == (None, (T, H, W), (0, 9))
    assert match(packed, x[:, :, :N], grid=(T, W, H)).grid == (T, W, H)


def test_a_given_grid_must_fit() -> None:
    x = randn(1, 2, N + 9, 16)
    assert reason(packed, x, grid=(T, H, W)) == f"{N + 9} tokens do not fit grid=(3, 5, 7), which makes {N}"
    assert reason(packed, x, grid=(T, H, W), text=(1, 2)).endswith("with text=(1, 2), which makes 108")
    # elsewhere in the model there may be other videos, whose grid is seen
    assert match(Video(), grid=(2, 2, 2)).grid == (T, H, W)


def test_a_given_grid_must_not_contradict_the_graph() -> None:
    text = nn.Parameter(randn(1, 9, 32))
    model = Video(lambda y: torch.cat([text.expand(len(y), -1, -1), flat(y)], 1))
    found = match(model, grid=(T, H, W))
    assert (found.reason, found.grid, found.text) == (None, (T, H, W), (9, 0))
    assert reason(model, grid=(T, W, H)).startswith("the graph shows grid=(3, 5, 7) with text=(9, 0)")
    assert reason(model, grid=(T, H, W), text=(0, 9)).startswith("the graph shows")
    turned = Video(lambda y: y.permute(0, 3, 4, 2, 1).flatten(1, 3))
    assert reason(turned, grid=(H, W, T)).startswith("token order is row, col, time")


def test_a_given_grid_is_believed_of_tokens_that_nobody_knows() -> None:
    attend = F.scaled_dot_product_attention
    q, k, v = (randn(1, 2, N, 16) for _ in range(3))
    assert match(attend, q, k, v, grid=(T, H, W)).grid == (T, H, W)
    assert match(attend, q, k, v, grid=(T, H, W - 1), text=(0, T * H)).text == (0, T * H)
    assert "do not fit" in reason(attend, q, k, v, grid=(T, H, W - 1))
    assert reason(attend, q, k, v)


def test_a_given_grid_makes_no_self_attention_of_what_is_known_to_be_none() -> None:
    class Two(Video):
        """Queries of one video, keys of another, or of something else that has as many tokens."""

        def forward(self, latents: Tensor, others: Tensor) -> Tensor:
            x = flat(self.patch(latents))
            y = flat(self.patch(others)) if others.dim() == 5 else others
            q, k, v = (layer(z).unflatten(-1, (2, 16)) for layer, z in ((self.q, x), (self.k, y), (self.v, y)))
            return F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))

    for others in (latents(), randn(1, N, 32)):
        assert reason(Two(), latents(), others, grid=(T, H, W))
    q, k, v = (randn(2, 2, N, 16) for _ in range(3))
    for attend in (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :9], v[:, :, :9]),
        lambda q, k, v: F.scaled_dot_product_attention(q, k.flip(2), v.flip(2)),
        lambda q, k, v: F.scaled_dot_product_attention(q, q.flip(2), v),
        lambda q, k, v: F.scaled_dot_product_attention(q[:1], q[1:], q[1:]),
    ):
        assert reason(attend, q, k, v, grid=(T, H, W))


def test_all_attentions_are_reported_in_order() -> None:
    def run(x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return F.scaled_dot_product_attention(y, y, y)

    (graph,) = capture(run, randn(1, 2, N, 16))
    assert isinstance(graph, fx.GraphModule)
    with torch.no_grad():
        found = find_attentions(graph)
    assert [match.reason == "causal" for match in found] == [True, False]
