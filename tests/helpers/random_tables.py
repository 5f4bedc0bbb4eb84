# SPDX-License-Identifier: Apache-2.0
"""Random tables and inputs for both Triton kernels, and the dense references that they are checked against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from strategies import by_recall
from torch import Tensor

from rainfusion_compile.kernels.gpu.attention import block_sparse_attention
from rainfusion_compile.kernels.gpu.configs import LaunchConfig
from rainfusion_compile.kernels.gpu.probe import arm_probe
from rainfusion_compile.kernels.phases import draws
from rainfusion_compile.kernels.reference import arm_errors
from rainfusion_compile.sparsity.block_tables import (
    AttentionTables,
    ProbeTables,
    _directions,
    _one_of_each_run,
    key_blocks,
)

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
    keys: Tensor
    samples: Tensor
    sample_blocks: Tensor
    sample_keep: Tensor
    excess: Tensor
    directions: Tensor
    density: Tensor
    selected: Tensor
    stride: int = 1
    int8: bool = False

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
    tokens: int, block_q: int, block_k: int, *, patterns: int = 3, extra: int = 4, samples: int = 20, seed: int = 0,
    stride: int = 1,
) -> Tables:  # fmt: skip
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
        "keys": order[_one_of_each_run(tokens, stride)].int(),
        "samples": picks.int(),
        "sample_blocks": (order.argsort()[picks] // block_q).int(),
        "sample_keep": torch.randint(1 << patterns, (len(picks), n_b), generator=gen).int() | 1 << patterns,
        "excess": excess,
        "directions": _directions(),
        "density": torch.linspace(0.2, 0.6, patterns),
        "selected": torch.empty(0).int(),
    }
    return Tables(block_q, block_k, stride=stride, **{name: tensor.to(DEVICE) for name, tensor in made.items()})


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
    wanted, shares = arm_errors(q, k, v, mask, t.probe_tables, scale, t.directions)
    energy = wanted[..., -1:]
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


def make_mask(kind: str, batch: int, heads: int, tokens: int) -> Tensor:
    gen = torch.Generator().manual_seed(1)
    shape = {"one": (1, 1, tokens), "batch": (batch, 1, tokens), "heads": (1, heads, tokens)}[kind.split()[1]]
    if kind.startswith("bool"):
        return (torch.rand(shape, generator=gen) < 0.7).to(DEVICE)
    bias = torch.randn(shape, generator=gen)
    bias[torch.rand(shape, generator=gen) < 0.3] = float("-inf")
    return bias.to({"bias32": torch.float32, "bias16": torch.bfloat16}[kind.split()[0]]).to(DEVICE)
