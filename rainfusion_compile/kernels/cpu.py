# SPDX-License-Identifier: Apache-2.0
"""The CPU engine, from PyTorch's own kernels. Query blocks that read the same key blocks (all of a frame, say) are
computed together: gather their keys once, then one ``scaled_dot_product_attention``, in pieces that stay in cache.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rainfusion_compile.sparsity.block_tables import AttentionTables, ProbeTables, key_blocks

MAX_QUERIES = 4096  # in one call: enough to amortise gathering the keys


def arm_probe(
    q: Tensor, k: Tensor, key_mask: Tensor | None, tables: ProbeTables, scale: float, recall_target: float,
    min_recall: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`rainfusion_compile.kernels.operators.arm_probe`."""
    (batch, heads, tokens, _), group = q.shape, q.shape[1] // k.shape[1]
    order, samples, sample_keep, key_weight, key_pattern, patterns, block_k = tables
    blocks = sample_keep.shape[1]
    bits = 1 << torch.arange(patterns, dtype=torch.uint8)
    by_block = (sample_keep & bits.view(-1, 1, 1)) != 0  # [P, n, blocks]
    by_key = F.pad(key_weight, (0, blocks * block_k - tokens)).view(blocks, block_k)
    recall = torch.zeros(batch, heads, patterns, dtype=torch.float32)
    counted = torch.ones(batch, heads, dtype=torch.bool)
    for b in range(batch):
        for kv in range(k.shape[1]):
            keys = k[b, kv].index_select(0, order).float()
            for h in range(kv * group, (kv + 1) * group):
                scores = q[b, h].index_select(0, samples).float() @ keys.T * scale
                weight = torch.ones(len(samples), dtype=torch.float32)
                if key_mask is not None:
                    mask = key_mask[b % key_mask.shape[0], h % key_mask.shape[1]]
                    by_position = mask.index_select(0, order)
                    if mask.dtype == torch.bool:
                        scores.masked_fill_(~by_position, float("-inf"))
                        weight = mask.index_select(0, samples).float()  # a padding token's query tells nothing
                    else:
                        scores += by_position.float()
                mass = torch.nan_to_num(scores.softmax(-1)) * (weight / weight.sum().clamp_min(1.0))[:, None]
                counted[b, h] = bool(weight.any())
                mass = F.pad(mass, (0, blocks * block_k - tokens)).view(len(samples), blocks, block_k)
                block_mass = mass.sum(-1)
                for p in range(patterns):
                    kept = block_mass * by_block[p]
                    if p == key_pattern:  # of the other blocks, the keys that are kept for every query
                        kept = kept + (mass * by_key).sum(-1) * ~by_block[p]
                    recall[b, h, p] = kept.sum()
    return choose(recall, counted, recall_target, min_recall), recall


def choose(recall: Tensor, counted: Tensor, recall_target: float, min_recall: float) -> Tensor:
    """The choice rule of the ARM: recall ``[B, H, P]``, sparsest pattern first, to int32 ``[B, H]``; P is dense."""
    patterns = recall.shape[-1]
    reaches = recall >= max(recall_target, min_recall)
    best, argbest = recall.max(-1)
    choice = torch.where(reaches.any(-1), reaches.int().argmax(-1), argbest)
    return torch.where(counted & (best >= min_recall), choice, patterns).int()


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, choice: Tensor, key_mask: Tensor | None, tables: AttentionTables, scale: float
) -> Tensor:
    """See :func:`rainfusion_compile.kernels.operators.block_sparse_attention`."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = q.new_empty(q.transpose(1, 2).shape)
    plans: dict[int, list[tuple[Tensor | None, Tensor | None]]] = {len(tables.rows) - 1: [(None, None)]}
    apart = key_mask is not None and key_mask.shape[1] > 1
    for b, chosen in enumerate(choice.tolist()):
        # Heads of one pattern are computed together, but where each has a key mask of its own.
        groups = [[h for h in range(heads) if chosen[h] == number] for number in dict.fromkeys(chosen)]
        for alike in [[h] for h in range(heads)] if apart else groups:
            number = chosen[alike[0]]
            if number not in plans:
                plans[number] = _plan(tables, number)
            qs = _heads(q[b], alike)
            ks, vs = (_heads(x[b], [h // group for h in alike]) for x in (k, v))
            mask = None if key_mask is None else key_mask[b % key_mask.shape[0], alike[0] % key_mask.shape[1]]
            result = out[b] if len(alike) == heads else torch.empty_like(qs)
            for query, key in plans[number]:
                part = _attend(_take(qs, query), _take(ks, key), _take(vs, key), _take(mask, key), scale)
                if query is None:
                    result.copy_(part)
                else:
                    result.index_copy_(0, query, part)
            if len(alike) < heads:
                out[b].index_copy_(1, torch.tensor(alike), result)
    return out.transpose(1, 2)


def _plan(tables: AttentionTables, pattern: int) -> list[tuple[Tensor | None, Tensor | None]]:
    """Pairs (query tokens, key tokens) to attend, None for all: query blocks that share a row go together."""
    queries = tables.order.long().split(tables.block_q)
    keys = key_blocks(tables.key_order, len(tables.order), tables.block_k)
    starts, indices = tables.row_ptr.tolist(), tables.indices.tolist()
    shared: dict[int, list[Tensor]] = defaultdict(list)
    for query, row in zip(queries, tables.rows[pattern].tolist(), strict=True):
        shared[row].append(query)
    plan: list[tuple[Tensor | None, Tensor | None]] = []
    for row, together in shared.items():
        key = torch.cat([keys[index] for index in indices[starts[row] : starts[row + 1]]])
        plan += [(query, key) for query in torch.cat(together).split(MAX_QUERIES)]
    return plan


def _heads(x: Tensor, heads: list[int]) -> Tensor:
    """Some heads of ``[H, S, D]`` as ``[S, heads, D]``: in this layout, taking a token moves one run of memory."""
    x = x.transpose(0, 1)
    return x if heads == list(range(x.shape[1])) else x.index_select(1, torch.tensor(heads))


def _take(x: Tensor | None, tokens: Tensor | None) -> Any:
    return x if x is None or tokens is None else x.index_select(0, tokens)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Dense attention, ``[tokens, heads, head_dim]`` each; a query without any visible key gives 0."""
    if mask is not None and mask.dtype == torch.bool:
        if not bool(mask.any()):
            return torch.zeros_like(q)
        k, v, mask = k[mask], v[mask], None  # padding keys need no work at all
    if mask is not None:
        mask = mask.to(q.dtype).expand(1, 1, q.shape[0], -1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)
