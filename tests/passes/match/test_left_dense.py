# SPDX-License-Identifier: Apache-2.0
"""Attentions that are not matched, and the reasons: models written to be refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import randn
from one_attention import H, N, T, Video, W, flat, latents, match, packed, reason
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rainfusion_compile.passes.match import find


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
