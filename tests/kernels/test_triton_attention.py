# SPDX-License-Identifier: Apache-2.0
"""Triton's block-sparse attention against a dense reference, under the interpreter or on the GPU if there is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from random_tables import (
    DEVICE,
    SMALL,
    Tables,
    check,
    check_probe,
    make_mask,
    make_qkv,
    make_tables,
    random_choice,
    reference,
)

from rainfusion_compile.kernels.gpu.configs import LaunchConfig, fit_tile, split_head_dim
from rainfusion_compile.kernels.gpu.key_mask import touched_keys
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS


def test_output_layout_and_default_tiles():
    t = make_tables(400, 128, 64)
    q, k, v = make_qkv(1, 2, 2, 400, 64, torch.bfloat16)
    choice = torch.tensor([[0, t.patterns]], dtype=torch.int32, device=DEVICE)
    out = t.attend(q, k, v, choice, None, 0.125)
    assert out.permute(0, 2, 1, 3).is_contiguous()
    check(out, reference(t, q, k, v, choice, None, 0.125), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 40, 64, 72, 80, 96, 120, 128, 256])
def test_head_dims_and_dtypes(dim: int, dtype: torch.dtype):
    t = make_tables(100, 32, 32, seed=dim)
    q, k, v = make_qkv(1, 2, 1, 100, dim, dtype, seed=dim)
    choice = torch.tensor([[1, t.patterns]], dtype=torch.int32, device=DEVICE)
    out = t.attend(q, k, v, choice, None, dim**-0.5)
    check(out, reference(t, q, k, v, choice, None, dim**-0.5), dtype)


@pytest.mark.parametrize(
    ("tile_q", "tile_k"), [(16, 16), (64, 64), (128, 128), (32, 16)], ids=["halves", "spans two", "clipped", "mixed"]
)
@pytest.mark.parametrize(("block_q", "block_k"), [(32, 32), (64, 16), (48, 48)])
def test_tiles_are_independent_of_blocks(tile_q: int, tile_k: int, block_q: int, block_k: int):
    t = make_tables(140, block_q, block_k)
    q, k, v = make_qkv(1, 2, 2, 140, 32, torch.float32)
    choice = torch.tensor([[0, 2]], dtype=torch.int32, device=DEVICE)
    out = t.attend(q, k, v, choice, None, 0.2, config=LaunchConfig(tile_q, tile_k, num_warps=4, num_stages=2))
    check(out, reference(t, q, k, v, choice, None, 0.2), torch.float32)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 64, 127])
def test_lengths(tokens: int):
    t = make_tables(tokens, 32, 16, extra=0)
    q, k, v = make_qkv(1, 2, 2, tokens, 32, torch.float32)
    choice = random_choice(t, 1, 2, seed=tokens)
    check(t.attend(q, k, v, choice, None, 0.3), reference(t, q, k, v, choice, None, 0.3), torch.float32)


@pytest.mark.parametrize("dense_first", [False, True])
def test_batch_with_its_own_choices_and_grouped_queries(dense_first: bool):
    t = make_tables(60, 32, 32)
    q, k, v = make_qkv(2, 6, 2, 60, 32, torch.float32)
    choice = torch.tensor([[0, 3, 1, 3, 2, 0], [2, 1, 0, 3, 3, 3]], dtype=torch.int32, device=DEVICE)
    config = LaunchConfig(32, 32, num_warps=4, num_stages=2, dense_first=dense_first)
    out = t.attend(q, k, v, choice, None, 0.2, config=config)
    check(out, reference(t, q, k, v, choice, None, 0.2), torch.float32)
    for b in range(2):
        alone = t.attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], choice[b : b + 1], None, 0.2, config=config)
        assert torch.equal(alone[0], out[b])
    repeated = t.attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), choice, None, 0.2, config=config)
    assert torch.equal(repeated, out)


@pytest.mark.parametrize("kind", ["bool one", "bool batch", "bool heads", "bias32 one", "bias32 heads", "bias16 batch"])
def test_key_masks(kind: str):
    t = make_tables(110, 32, 32)
    q, k, v = make_qkv(2, 2, 2, 110, 32, torch.float32)
    mask, choice = make_mask(kind, 2, 2, 110), random_choice(t, 2, 2)
    expected = reference(t, q, k, v, choice, mask, 0.2)
    check(t.attend(q, k, v, choice, mask, 0.2), expected, torch.float32)
    check(t.attend(q, k, v, choice, mask.expand(2, 2, -1), 0.2), expected, torch.float32)


def test_padding_at_the_end_is_a_whole_masked_block():
    t = make_tables(160, 32, 32, extra=0)
    t.order = torch.arange(160, dtype=torch.int32, device=DEVICE)
    t.key_order = t.order.repeat(2)
    q, k, v = make_qkv(2, 2, 2, 160, 32, torch.float32)
    mask = torch.ones(2, 1, 160, dtype=torch.bool, device=DEVICE)
    mask[0, :, 96:] = False
    mask[1, :, 150:] = False
    choice = random_choice(t, 2, 2)
    expected = reference(t, q, k, v, choice, mask, 0.2)
    out = t.attend(q, k, v, choice, mask, 0.2)
    check(out, expected, torch.float32)
    k[0, :, 96:], v[0, :, 96:] = 7.0, -9.0  # what padding holds changes nothing
    assert torch.equal(t.attend(q, k, v, choice, mask, 0.2), out)


@pytest.mark.parametrize("config", [None, SMALL])
@pytest.mark.parametrize("where", ["first of order", "last extra block", "first in memory"])
def test_each_kind_of_row_is_masked_from_its_first_block_on(where: str, config: LaunchConfig | None):
    """Rows begin in the last extra block, in the first of `order` and in the first run; the mask touches only that."""
    t = make_tables(256, 32, 32)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(5))
    order = torch.cat([order[order >= 3][:120], torch.arange(3), order[order >= 3][120:]])
    extra = order[-64:]
    t.order = order.int().to(DEVICE)
    t.key_order = torch.cat([extra, order, order.sort().values]).int().to(DEVICE)
    t.rows = (torch.arange(8) % 3).expand(t.patterns + 1, -1).contiguous().int().to(DEVICE)
    t.row_ptr = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=DEVICE)
    t.indices = torch.tensor([1, 2, 5, 6, 2, 3, 5, 9, 10, 11, 14, 17], dtype=torch.int32, device=DEVICE)
    t.sampled = F.pad(torch.tensor([[3, 1], [1, 1], [0, 1]], dtype=torch.int32, device=DEVICE), (0, 3))
    t.weight = torch.tensor([1.5, 0.5, 0.0], device=DEVICE)
    hidden = {"first of order": order[:3], "last extra block": extra[32:35], "first in memory": torch.arange(3)}[where]
    mask = torch.ones(1, 1, 256, dtype=torch.bool, device=DEVICE)
    mask[..., hidden.to(DEVICE)] = False
    q, k, v = make_qkv(1, 2, 2, 256, 32, torch.float32)
    choice = random_choice(t, 1, 2)
    expected = reference(t, q, k, v, choice, mask, 0.2)
    check(t.attend(q, k, v, choice, mask, 0.2, config=config), expected, torch.float32)


@pytest.mark.parametrize("bias", [False, True])
def test_a_row_that_sees_no_key_is_zero(bias: bool):
    t = make_tables(100, 32, 32, extra=0)
    q, k, v = make_qkv(2, 1, 1, 100, 32, torch.float32)
    mask = torch.ones(2, 1, 100, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    if bias:
        mask = torch.where(mask, 0.0, float("-inf"))
    choice = torch.zeros(2, 1, dtype=torch.int32, device=DEVICE)
    out = t.attend(q, k, v, choice, mask, 0.2)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    check(out, reference(t, q, k, v, choice, mask, 0.2), torch.float32)


def test_the_lowest_finite_bias_hides_keys_without_nan():
    t = make_tables(100, 32, 32)
    q, k, v = make_qkv(1, 1, 1, 100, 32, torch.float32)
    mask = torch.zeros(1, 1, 100, device=DEVICE)
    mask[..., ::3] = torch.finfo(torch.float32).min
    choice = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    out = t.attend(q, k, v, choice, mask, 0.2)
    check(out, reference(t, q, k, v, choice, mask, 0.2), torch.float32)


def test_strided_views_are_read_in_place():
    t = make_tables(90, 32, 32)
    packed = torch.randn(2, 90, 3, 3, 40, generator=torch.Generator().manual_seed(2)).to(DEVICE)  # B S (q k v) H D
    q, k, v = (x.permute(0, 2, 1, 3)[..., 3:35] for x in packed.unbind(2))  # odd offsets: no vector alignment
    odd = packed.flatten(2)[..., 1:].as_strided((2, 3, 90, 32), (90 * 360, 37, 360, 1))
    choice = random_choice(t, 2, 3)
    for query in (q, q.contiguous(), odd):
        out = t.attend(query, k, v, choice, None, 0.2)
        check(out, reference(t, query, k, v, choice, None, 0.2), torch.float32)
    check_probe(t, t.probe(odd, k, v, None, 0.2), odd, k, v, None, 0.2)


def test_everything_kept_is_dense_attention():
    t = make_tables(140, 32, 32)
    q, k, v = make_qkv(1, 2, 2, 140, 64, torch.float32)
    choice = torch.full((1, 2), t.patterns, dtype=torch.int32, device=DEVICE)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    check(t.attend(q, k, v, choice, None, 64**-0.5), dense, torch.float32)


@pytest.mark.parametrize("sampled", [True, False])
def test_tables_of_a_real_grid(sampled: bool):
    made = block_tables(
        VideoLayout((16, 4, 4), (9, 5)), sparsity=0.3, patterns=PATTERNS, sampled=sampled, block_q=32, block_k=16
    )
    tensors = {name: x.to(DEVICE) for name, x in made.tensors.items()}
    t = Tables(made.block_q, made.block_k, **tensors)
    samples = (made.sampled[made.rows[:-1].long(), 0] > 0).any(1)
    assert {name for name, some in zip(made.patterns, samples.tolist(), strict=True) if some} == (
        {"spatial", "textural"} if sampled else {"textural"}
    )
    q, k, v = make_qkv(1, 4, 2, 270, 32, torch.float32)
    masks = torch.ones(4, 1, 1, 270, dtype=torch.bool, device=DEVICE)
    padding = [*range(267, 270)], [*range(6)], [*range(100, 140)], [*range(3), *range(264, 268)]
    for mask, hidden in zip(masks, padding, strict=True):
        mask[..., hidden] = False
    mask = masks[0]
    choice = torch.arange(4, dtype=torch.int32, device=DEVICE)[None] % (len(made.patterns) + 1)
    for key_mask in (None, *masks) if sampled else masks:
        check(t.attend(q, k, v, choice, key_mask, 0.2), reference(t, q, k, v, choice, key_mask, 0.2), torch.float32)
    check_probe(t, t.probe(q, k, v, key_mask, 0.2), q, k, v, key_mask, 0.2)


@pytest.mark.parametrize("block", [48, 64])
def test_what_a_mask_touches(block: int):
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(3)).int().to(DEVICE)
    mask = torch.ones(2, 2, 3000, dtype=torch.bool, device=DEVICE)
    mask[0, 1, order[2500].long()] = False
    mask[1, 0, order[7:2000].long()] = False
    extra = order[torch.arange(0, 3000, 6)]
    places = torch.cat([extra, order, order.sort().values])
    hidden = ~mask[..., places.long()]
    blocks = F.pad(hidden, (0, -len(places) % block)).unflatten(-1, (-1, block)).any(-1)
    first = torch.tensor([[6500, 3000], [507, 6500]], device=DEVICE)
    expected = torch.cat([first[..., None], torch.where(blocks, 0, 6500)], -1)
    for given in (mask, torch.where(mask, 0.0, -1.0)):
        assert torch.equal(touched_keys(given, places, block, 3500, 500), expected.int())


def test_tiles_and_chunks():
    assert [split_head_dim(d) for d in (32, 40, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256)] == [
        (32, 0), (32, 16), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0), (128, 0), (128, 32), (128, 64),
        (128, 128),
    ]  # fmt: skip
    assert fit_tile(128, 64, most=128) == 128
    assert fit_tile(128, 48, most=96) == 16
    with pytest.raises(ValueError, match="multiples of 16"):
        fit_tile(64, 40, most=40)
