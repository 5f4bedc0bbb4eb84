# SPDX-License-Identifier: Apache-2.0
"""What the operators mean, slowly: dense scores, a mask, a softmax in float64. Tests and doubts are settled here."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rainfusion_compile.kernels.phases import draws
from rainfusion_compile.kernels.selection import block_lists, mask_of, rank_blocks
from rainfusion_compile.sparsity.block_tables import AttentionTables, ProbeTables, key_blocks


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, choice: Tensor, key_mask: Tensor | None, tables: AttentionTables, scale: float,
    lists: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Arguments as in :func:`rainfusion_compile.kernels.operators.block_sparse_attention`; float64 ``[B, H, S, D]``.

    ``lists``, ``[B, H, nQ, free blocks]``: what an engine selected, where two blocks may be as good but for rounding.
    """
    (batch, heads, tokens, _), group = q.shape, q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    listed, drawn = key_blocks(tables.key_order, tokens, tables.block_k), draws(q, tables.order)

    @functools.cache
    def own_lists(b: int, h: int, selected: int) -> Tensor:
        return block_lists(_ranks(q, k, key_mask, tables, scale, b, h), tables.free, selected)

    for b in range(batch):
        for h in range(heads):
            key, value = k[b, h // group].double(), v[b, h // group].double()
            for block, query in enumerate(tables.order.long().split(tables.block_q)):
                row = int(tables.rows[int(choice[b, h]), block])
                blocks = tables.indices[tables.row_ptr[row] : tables.row_ptr[row + 1]].tolist()
                count, phases, selected, granules, _ = tables.sampled[row].tolist()
                phase = int(drawn[b, h]) % phases
                if selected:
                    first = len(listed) - 2 * len(tables.free)  # of `order`
                    each = tables.block_k // phases
                    start = granules * tables.block_k + phase * len(tables.free) * each
                    own = lists[b, h, block] if lists is not None else own_lists(b, h, selected)[block]
                    samples = [tables.key_order[start + i * each :][:each].long() for i in own[:-selected].tolist()]
                    assert len(own) == count * phases + selected
                    blocks = [first + i for i in own[-selected:].tolist()] + blocks
                else:
                    samples, blocks = [listed[i + phase] for i in blocks[:count]], blocks[count:]
                sampled, kept = (
                    torch.bincount(torch.cat([*part, query[:0]]), minlength=tokens)
                    for part in (samples, [listed[i] for i in blocks])
                )
                assert (sampled + kept).max() == 1, "a row names a token twice"
                weight = kept.double() + sampled.double() * 2.0 ** float(tables.weight[row])
                bias = weight.log() + _bias(key_mask, b, h, tokens, q.device)
                scores = q[b, h, query].double() @ key.T * scale + bias
                out[b, h, query] = torch.nan_to_num(scores.softmax(-1)) @ value
    return out


def _ranks(
    q: Tensor, k: Tensor, key_mask: Tensor | None, tables: AttentionTables | ProbeTables, scale: float, b: int, h: int
) -> Tensor:
    """The ranks of the key blocks for each query block of a head, by means in float64."""
    keys, mask = k[b, h * k.shape[1] // q.shape[1]], mask_of(key_mask, b, h)
    return rank_blocks(q[b, h], keys, mask, tables, scale, dtype=torch.float64)


def arm_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    tables: ProbeTables,
    scale: float,
    directions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The squared output errors that each candidate is expected to make, in all directions of the values or in these.

    By the keys that the tables name: each stands for ``stride`` of them, and what they add to the dense outputs'
    squares by chance is taken off.

    Args:
        directions: ``[head_dim or more, any]``; dense outputs' squares are of whole outputs nevertheless.

    Returns:
        The errors summed over the sampled queries, last the dense outputs' squares, float64 ``[B, H, P + 1]``, and the
        mean share of attention that each candidate reads, ``[B, H, P]``; queries that a bool key mask hides left out.
    """
    batch, heads, _, _ = q.shape
    group, patterns, samples, keys = heads // k.shape[1], len(tables.density), tables.samples.long(), tables.keys.long()
    candidates = torch.arange(patterns, device=q.device).view(-1, 1, 1)
    of_order = torch.arange(len(keys), device=q.device) * tables.stride // tables.block_k
    kept = (tables.sample_keep[:, of_order] >> candidates & 1) == 1  # [P, n, keys]
    errors = torch.zeros(batch, heads, patterns + 1, dtype=torch.float64, device=q.device)
    recall = torch.zeros(batch, heads, patterns, dtype=torch.float64, device=q.device)
    for b in range(batch):
        for h in range(heads):
            own_kept = kept
            if len(tables.selected):
                rank = _ranks(q, k, key_mask, tables, scale, b, h)[tables.sample_blocks.long()]
                own_kept = kept | (rank < tables.selected[:, None, None])[..., of_order]
            bias, value = _bias(key_mask, b, h, q.shape[2], q.device), v[b, h // group, keys].double()
            scores = q[b, h, samples].double() @ k[b, h // group, keys].double().T * scale + bias[keys]
            p = scores.softmax(-1).nan_to_num()
            used = torch.ones(len(samples), dtype=torch.bool, device=q.device)
            if key_mask is not None and key_mask.dtype == torch.bool:
                used = torch.isfinite(bias[samples])
            out = p @ value
            squares, part = out.square().sum(-1), 1 / tables.stride
            if directions is not None:
                value = value @ directions[: value.shape[-1]].double()
                out = p @ value
            spread = p.square() * (value[None] - out[:, None]).square().sum(-1)  # p^2 |v - o|^2
            by_chance = (1 - part) * spread.sum(-1)
            errors[b, h, patterns] = torch.maximum(squares - by_chance, part * squares)[used].sum()
            for number in range(patterns):
                excess = tables.excess[number].double()
                own = p * own_kept[number]
                left_out = own @ value / own.sum(-1, keepdim=True).masked_fill_(own.sum(-1, keepdim=True) == 0, 1) - out
                sampled = excess * part * (spread * ~own_kept[number]).sum(-1)
                each = torch.where(excess < 0, left_out.square().sum(-1), sampled)
                rest = torch.where(excess < 0, 0.0, (p * ~own_kept[number]).sum(-1) / (excess + 1))
                errors[b, h, number] = each[used].sum()
                recall[b, h, number] = (own.sum(-1) + rest)[used].sum() / used.sum().clamp_min(1)
    return errors, recall


def _bias(key_mask: Tensor | None, b: int, h: int, tokens: int, device: torch.device) -> Tensor:
    """The key mask of one sample and head as an additive float64 bias ``[tokens]``."""
    mask = mask_of(key_mask, b, h)
    if mask is None:
        return torch.zeros(tokens, dtype=torch.float64, device=device)
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    return mask.double()
