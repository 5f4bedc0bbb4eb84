# SPDX-License-Identifier: Apache-2.0
"""Both Triton kernels against a dense float32 reference, under Triton's interpreter or on the GPU if there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from strategies import by_error, by_recall, chosen_by_recall
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from rainfusion_compile.kernels.cpu import choose_by_error
from rainfusion_compile.kernels.gpu import probe as triton_probe
from rainfusion_compile.kernels.gpu.attention import block_sparse_attention
from rainfusion_compile.kernels.gpu.configs import LaunchConfig, fit_tile, split_head_dim
from rainfusion_compile.kernels.gpu.key_mask import touched_keys
from rainfusion_compile.kernels.gpu.probe import arm_probe
from rainfusion_compile.kernels.gpu.rows import aligned_rows, row_strides, sampled_blocks
from rainfusion_compile.kernels.phases import draws
from rainfusion_compile.kernels.reference import arm_errors
from rainfusion_compile.sparsity.block_tables import AttentionTables, ProbeTables, _directions, block_tables, key_blocks
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Rule = tuple[bool, Tensor]
BY_RECALL: Rule = by_recall(0.9, 0.1)
SMALL = LaunchConfig(32, 32, num_warps=4, num_stages=2)


@dataclass
class Tables:
    """Random tables with P candidates; `extra` key blocks are before those of `order`, samples of two phases.

    Every other row reads runs of tokens as they lie in memory.
    """

    block_q: int
    block_k: int
    order: Tensor
    key_order: Tensor
    rows: Tensor
    row_ptr: Tensor
    indices: Tensor
    sampled: Tensor
    weight: Tensor
    free: Tensor
    samples: Tensor
    sample_blocks: Tensor
    sample_keep: Tensor
    excess: Tensor
    directions: Tensor
    density: Tensor
    selected: Tensor

    @property
    def patterns(self) -> int:
        return len(self.density)

    @property
    def attention_tables(self) -> AttentionTables:
        return AttentionTables(*(getattr(self, name) for name in AttentionTables._fields))

    @property
    def probe_tables(self) -> ProbeTables:
        return ProbeTables(*(getattr(self, name) for name in ProbeTables._fields))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, choice: Tensor, mask: Tensor | None, scale: float, **kw
    ) -> Tensor:
        return block_sparse_attention(q, k, v, choice, mask, self.attention_tables, scale, **kw)

    def probe(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, rule: Rule = BY_RECALL, **kw
    ) -> tuple[Tensor, Tensor, Tensor]:
        return arm_probe(q, k, v, mask, self.probe_tables, scale, *rule, **{"config": SMALL, **kw})


def make_tables(
    tokens: int, block_q: int, block_k: int, *, patterns: int = 3, extra: int = 4, samples: int = 20, seed: int = 0
) -> Tables:
    """Random ones; of every pair of extra blocks, a row samples at most the first: the other is its second phase."""
    gen = torch.Generator().manual_seed(seed)
    n_q, n_b = math.ceil(tokens / block_q), math.ceil(tokens / block_k)
    order = torch.randperm(tokens, generator=gen)
    drawn = torch.randperm(tokens * math.ceil(extra * block_k / tokens), generator=gen)[: extra * block_k] % tokens
    masks = torch.rand(patterns, n_q, extra + n_b, generator=gen) < torch.linspace(0.2, 0.6, patterns)[:, None, None]
    masks[:, :, extra + torch.randint(n_b, (1,), generator=gen)] = True
    masks[:, ::2, -1] = True  # the block that is cut short
    masks[:, :, 1:extra:2] = False
    dense = torch.ones(1, n_q, extra + n_b, dtype=torch.bool)
    dense[:, :, :extra] = False
    masks = torch.cat([masks, dense])
    runs = torch.zeros_like(masks[..., extra:])
    as_runs = (torch.arange(n_q) + torch.arange(patterns + 1)[:, None]) % 2 == 1
    as_runs &= masks[..., extra:].any(-1)
    runs[as_runs] = masks[..., extra:][as_runs]
    masks[as_runs] = False
    distinct, which = torch.unique(torch.cat([masks, runs], -1).flatten(0, 1), dim=0, return_inverse=True)
    picks = torch.randperm(tokens, generator=gen)[:samples]
    excess = torch.randint(-1, 5, (patterns, len(picks)), generator=gen).float()
    excess[::2] = torch.where(excess[::2] < 0, 3.0, excess[::2])  # the others drop keys for some queries
    made = {
        "order": order.int(),
        "key_order": torch.cat(
            [drawn, *(F.pad(x, (0, -tokens % block_k)) for x in (order, order.sort().values))]
        ).int(),
        "rows": which.view(patterns + 1, n_q).int(),
        "row_ptr": torch.cat([torch.zeros(1), distinct.sum(1).cumsum(0)]).int(),
        "indices": distinct.nonzero()[:, 1].int(),
        "sampled": F.pad(torch.stack([distinct[:, :extra].sum(1), torch.full((len(distinct),), 2)], 1), (0, 3)).int(),
        "weight": 3 * torch.rand(len(distinct), generator=gen),
        "free": torch.zeros(n_b).int(),
        "samples": picks.int(),
        "sample_blocks": (order.argsort()[picks] // block_q).int(),
        "sample_keep": torch.randint(1 << patterns, (len(picks), n_b), generator=gen).int() | 1 << patterns,
        "excess": excess,
        "directions": _directions(),
        "density": torch.linspace(0.2, 0.6, patterns),
        "selected": torch.empty(0).int(),
    }
    return Tables(block_q, block_k, **{name: tensor.to(DEVICE) for name, tensor in made.items()})


def bias_of(mask: Tensor | None, b: int, h: int) -> Tensor | float:
    if mask is None:
        return 0.0
    one = mask[b % mask.shape[0], h % mask.shape[1]]
    return torch.where(one, 0.0, float("-inf")) if one.dtype == torch.bool else one.float()


def reference(t: Tables, q: Tensor, k: Tensor, v: Tensor, choice: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    group, drawn = q.shape[1] // k.shape[1], draws(q.cpu(), t.order.cpu()).tolist()
    blocks = key_blocks(t.key_order, len(t.order), t.block_k)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            query, key, value = q[b, h].float(), k[b, h // group].float(), v[b, h // group].float()
            bias = torch.zeros(q.shape[2], device=q.device) + bias_of(mask, b, h)
            for block, rows in enumerate(t.order.long().split(t.block_q)):
                row = int(t.rows[int(choice[b, h]), block])
                kept = t.indices[int(t.row_ptr[row]) : int(t.row_ptr[row + 1])].tolist()
                count, phases = t.sampled[row, :2].tolist()
                kept[:count] = [j + drawn[b][h] % phases for j in kept[:count]]
                tokens = torch.cat([blocks[j] for j in kept])
                weight = torch.zeros(len(tokens), device=q.device)
                weight[: count * t.block_k] = math.log(2) * t.weight[row]
                s = query[rows] @ key[tokens].T * scale + bias[tokens] + weight
                out[b, h, rows] = torch.nan_to_num(s.softmax(-1)) @ value[tokens]
    return out


def check_probe(
    t: Tables, probed: tuple[Tensor, Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> None:
    """Errors, their share of the outputs' squares, and recall against the reference in float64.

    Values are seen in few directions, but for the outputs' squares. What is kept of them between two launches has the
    precision of bfloat16, unless they are float32.
    """
    _, errors, recall = probed
    seen = v.double() @ t.directions[: v.shape[-1]].double()
    wanted, shares = arm_errors(q, k, seen, mask, t.probe_tables, scale)
    energy = arm_errors(q, k, v, mask, t.probe_tables, scale)[0][..., -1:]
    close = {"atol": 1e-5, "rtol": 1e-4} if q.dtype == torch.float32 else {"atol": 6e-3, "rtol": 2e-2}
    torch.testing.assert_close(recall.double(), shares, **close)
    torch.testing.assert_close(errors[..., -1:].double(), energy, **close)
    scale = energy.clamp_min(1e-9)
    torch.testing.assert_close(errors[..., :-1] / scale, wanted[..., :-1] / scale, **close)


def make_qkv(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, S, D] views of [B, S, H, D] memory, as models have them."""
    gen = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, tokens, n, dim, generator=gen) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (x.to(dtype).to(DEVICE).permute(0, 2, 1, 3) for x in made)
    return q, k, v


def random_choice(t: Tables, batch: int, heads: int, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(t.patterns + 1, (batch, heads), generator=gen).int().to(DEVICE)


def check(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


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


def make_mask(kind: str, batch: int, heads: int, tokens: int) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    shape = {"one": (1, 1, tokens), "batch": (batch, 1, tokens), "heads": (1, heads, tokens)}[kind.split()[1]]
    if kind.startswith("bool"):
        return (torch.rand(shape, generator=gen) < 0.7).to(DEVICE)
    bias = torch.randn(shape, generator=gen)
    bias[torch.rand(shape, generator=gen) < 0.3] = float("-inf")
    return bias.to({"bias32": torch.float32, "bias16": torch.bfloat16}[kind.split()[0]]).to(DEVICE)


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
    mask = torch.ones(1, 1, 270, dtype=torch.bool, device=DEVICE)
    mask[..., 267:] = False  # padded text
    choice = torch.arange(4, dtype=torch.int32, device=DEVICE)[None] % (len(made.patterns) + 1)
    for key_mask in (None, mask) if sampled else (mask,):
        check(t.attend(q, k, v, choice, key_mask, 0.2), reference(t, q, k, v, choice, key_mask, 0.2), torch.float32)
    check_probe(t, t.probe(q, k, v, key_mask, 0.2), q, k, v, key_mask, 0.2)


@pytest.mark.parametrize("kind", [None, "bool batch", "bool heads", "bias32 one", "bias16 batch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_and_recall(kind: str | None, dtype: torch.dtype):
    t = make_tables(150, 32, 32)
    q, k, v = make_qkv(2, 2, 1, 150, 32, dtype)
    mask = None if kind is None else make_mask(kind, 2, 2, 150)
    check_probe(t, t.probe(q, k, v, mask, 0.3, config=None), q, k, v, mask, 0.3)


@pytest.mark.parametrize("kind", [None, "bias32 one", "bool heads"])
@pytest.mark.parametrize("excess", [-1.0, 0.0, 7.5])
def test_errors_of_what_is_dropped_read_and_sampled(excess: float, kind: str | None):
    t = make_tables(150, 32, 32)
    t.excess.fill_(excess)
    q, k, v = make_qkv(2, 2, 1, 150, 32, torch.float32)
    mask = None if kind is None else make_mask(kind, 2, 2, 150)
    probed = t.probe(q, k, v, mask, 0.3)
    check_probe(t, probed, q, k, v, mask, 0.3)
    assert bool((probed[1][..., :-1] > 0).all()) == (excess != 0), "a sample of all keys makes no error"


@pytest.mark.parametrize(("dim", "patterns"), [(40, 1), (64, 3), (72, 2), (96, 5), (128, 8), (256, 30)])
def test_probe_head_dims_and_candidate_counts(dim: int, patterns: int):
    t = make_tables(130, 32, 16, patterns=patterns)
    q, k, v = make_qkv(1, 2, 1, 130, dim, torch.float32)
    check_probe(t, t.probe(q, k, v, None, dim**-0.5), q, k, v, None, dim**-0.5)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_probe_before_and_in_padding(bias: bool, splits: int):
    """Each sample and head is masked from another place on: within a split, at its edge, from the start, nowhere."""
    t = make_tables(250, 32, 32)
    q, k, v = make_qkv(2, 2, 2, 250, 32, torch.float32)
    mask = torch.ones(2, 2, 250, dtype=torch.bool, device=DEVICE)
    for one, first in zip(mask.flatten(0, 1), (150, 64, 1, 250), strict=True):
        one[t.order[first:].long()] = False
    key_mask = torch.where(mask, 0.0, float("-inf")) if bias else mask
    probed = t.probe(q, k, v, key_mask, 0.3, splits=splits)
    check_probe(t, probed, q, k, v, key_mask, 0.3)
    k[~mask], v[~mask] = float("nan"), -9.0  # what padding holds changes nothing
    for now, before in zip(t.probe(q, k, v, key_mask, 0.3, splits=splits), probed, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize(("samples", "splits"), [(1, 1), (1, 7), (33, 1), (33, 9), (70, 2)])
def test_splits_and_sample_counts(samples: int, splits: int):
    t = make_tables(200, 32, 32, samples=samples)
    q, k, v = make_qkv(1, 2, 2, 200, 32, torch.float32)
    check_probe(t, t.probe(q, k, v, None, 0.3, splits=splits), q, k, v, None, 0.3)


@pytest.mark.parametrize(
    ("programs", "tiles", "resident", "splits"),
    [
        (24, 1861, 264, 11),  # as many programs as run at a time
        (80, 1182, 396, 4),
        (1, 4096, 264, 64),  # at most MAX_SPLITS
        (1, 10, 264, 3),  # each of about four tiles
        (1000, 1861, 264, 1),  # more heads than programs run at a time
        (24, 1861, 0, 3),  # no GPU
    ],
)
def test_over_how_many_programs_keys_are_split(programs: int, tiles: int, resident: int, splits: int):
    assert triton_probe._split_count(programs, tiles, resident) == splits


@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_probe_of_short_sequences(tokens: int):
    t = make_tables(tokens, 16, 16, extra=0)
    q, k, v = make_qkv(1, 1, 1, tokens, 32, torch.float32)
    check_probe(t, t.probe(q, k, v, None, 0.3), q, k, v, None, 0.3)


@pytest.mark.parametrize("limits", [(0.95, 0.2), (0.5, 0.2), (0.4, 0.45), (0.0, 0.0), (0.95, 0.99)])
def test_choice_by_recall(limits: tuple[float, float]):
    t = make_tables(90, 32, 32, patterns=3)
    q, k, v = make_qkv(2, 2, 2, 90, 32, torch.float32)
    choice, _, recall = t.probe(q, k, v, None, 0.3, by_recall(*limits))
    assert choice.dtype == torch.int32
    assert choice.tolist() == [[chosen_by_recall(r, True, *limits) for r in sample] for sample in recall.tolist()]


@pytest.mark.parametrize("error", [0.0, 0.5, 10.0])
def test_choice_by_error(error: float):
    t = make_tables(90, 32, 32, patterns=3)
    q, k, v = make_qkv(1, 4, 2, 90, 32, torch.float32)
    choice, errors, _ = t.probe(q, k, v, None, 0.3, by_error(error))
    assert choice.dtype == torch.int32
    assert torch.equal(choice.cpu(), choose_by_error(errors.cpu(), t.density.cpu(), error))
    taken = F.pad(errors[..., :-1], (0, 1)).gather(-1, choice[..., None].long()).sum((1, 2))
    assert bool((taken <= 1.0001 * error**2 * errors[..., -1].sum(1)).all())
    dense = choice == t.patterns
    assert bool(dense.all()) if error == 0 else not bool(dense.any()) if error == 10 else True


def test_choice_at_the_edges_of_the_rule():
    t = make_tables(90, 32, 32, patterns=3)
    q, k, v = make_qkv(1, 1, 1, 90, 32, torch.float32)
    t.excess.fill_(-1)
    t.sample_keep.fill_(0b1110)  # candidates 1 and 2 keep everything, 0 nothing
    choice, errors, recall = t.probe(q, k, v, None, 0.3, by_recall(0.95, 0.2))
    assert recall.tolist() == [[[0.0, 1.0, 1.0]]]  # whole sums are exact
    assert errors[0, 0, 1:3].tolist() == [0.0, 0.0]
    assert choice.item() == 1
    assert t.probe(q, k, v, None, 0.3, by_error(0.0))[0].item() == 1  # what makes no error, even without any budget
    t.sample_keep.fill_(0b1000)
    assert t.probe(q, k, v, None, 0.3, by_recall(0.95, 0.0))[0].item() == 0  # a tie: the first
    assert t.probe(q, k, v, None, 0.3, by_recall(0.95, 0.1))[0].item() == 3  # the guard: dense
    assert t.probe(q, k, v, None, 0.3, by_error(0.5))[0].item() == 3


@pytest.mark.parametrize("rule", [by_recall(0.0, 0.0), by_error(10.0)])
def test_no_sample_left_means_dense(rule: Rule):
    t = make_tables(100, 32, 32)
    q, k, v = make_qkv(2, 2, 2, 100, 32, torch.float32)
    mask = torch.ones(2, 1, 100, dtype=torch.bool, device=DEVICE)
    mask[1, 0, t.samples.long()] = False
    choice, errors, recall = probed = t.probe(q, k, v, mask, 0.3, rule)
    assert choice.tolist() == [[0, 0], [t.patterns] * 2]
    assert max(recall[1].abs().max(), errors[1].abs().max()) == 0
    check_probe(t, probed, q, k, v, mask, 0.3)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_heads_whose_output_is_no_number_stay_dense(wrong: float):
    t = make_tables(100, 32, 32)
    q, k, v = make_qkv(1, 2, 2, 100, 32, torch.float32)
    v[:, 0, 7] = wrong
    for rule in (BY_RECALL, by_error(10.0)):
        choice, errors, _ = t.probe(q, k, v, None, 0.3, rule)
        assert choice[0, 0] == t.patterns
        assert choice[0, 1] < t.patterns
        if rule[0]:
            assert torch.equal(choice.cpu(), choose_by_error(errors.cpu(), t.density.cpu(), 10.0))


@triton.jit
def draw_kernel(q, order, sampled, out, tokens, heads, stride_b, stride_h, stride_s):
    head = tl.program_id(0)
    q += (head // heads * stride_b + head % heads * stride_h) * 8
    count, shift = sampled_blocks(q, order, tokens, stride_s, sampled, 1)
    tl.store(out + 2 * head, count)
    tl.store(out + 2 * head + 1, shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_phases_are_drawn_as_on_the_cpu(dtype: torch.dtype):
    q = make_qkv(2, 5, 1, 37, 16, dtype)[0]
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1)).int().to(DEVICE)
    for phases in (1, 7, 2**31 - 1):
        sampled = F.pad(torch.tensor([[1, 2], [11, phases]], dtype=torch.int32, device=DEVICE), (0, 3))
        out = torch.empty(10, 2, dtype=torch.int32, device=DEVICE)
        draw_kernel[(10,)](q, order, sampled, out, 37, 5, *row_strides(q)[0])
        assert out[:, 0].tolist() == [11] * 10
        assert out[:, 1].tolist() == (draws(q, order) % phases).flatten().tolist()


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


def test_wide_strides_use_wide_offsets():
    assert row_strides(torch.empty(1, 1, 3, 8, device="meta"))[1].name == "int32"
    far = torch.empty(0, device="meta").as_strided((1, 1, 3, 8), (0, 8, 2**30, 1))
    strides, offset = row_strides(far)
    assert (strides, offset.name) == ([0, 0, 2**27], "int64")
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8, got 12"):
        row_strides(torch.empty(1, 1, 3, 12))


def test_only_rows_out_of_step_with_16_bytes_are_copied():
    packed = torch.randn(2, 5, 3, 4, 32, dtype=torch.bfloat16)  # [B, S, 3, H, D], a fused projection
    for view in (packed[:, :, 1].transpose(1, 2), packed[..., 8:24][:, :, 0].transpose(1, 2), packed[:, :, 0, :1]):
        assert aligned_rows(view) is view
    shifted = torch.randn(2 * 4 * 5 * 32 + 1, dtype=torch.bfloat16)[1:].view(2, 4, 5, 32)
    narrow = torch.randn(2, 4, 5, 34, dtype=torch.bfloat16)[..., 2:]
    scattered = torch.randn(2, 4, 32, 5, dtype=torch.bfloat16).transpose(2, 3)
    for view in (shifted, narrow, scattered):
        copy = aligned_rows(view)
        assert copy is not view
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, view)


def test_tiles_and_chunks():
    assert [split_head_dim(d) for d in (32, 40, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256)] == [
        (32, 0), (32, 16), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0), (128, 0), (128, 32), (128, 64),
        (128, 128),
    ]  # fmt: skip
    assert fit_tile(128, 64, most=128) == 128
    assert fit_tile(128, 48, most=96) == 16
    with pytest.raises(ValueError, match="multiples of 16"):
        fit_tile(64, 40, most=40)
