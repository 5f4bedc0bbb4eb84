# SPDX-License-Identifier: Apache-2.0
"""The CPU engine, from PyTorch's own kernels. Query blocks that read the same key blocks (all of a frame, say) are
computed together: gather their keys once, then one ``scaled_dot_product_attention``, in pieces that stay in cache.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rainfusion_compile.kernels.phases import draws
from rainfusion_compile.kernels.selection import block_lists, mask_of, rank_blocks
from rainfusion_compile.sparsity.block_tables import AttentionTables, ProbeTables

MAX_QUERIES = 4096  # in one call: enough to amortise gathering the keys
# What a unit of squared error may cost, as powers of two, and how often the range is halved: see `choose_by_error`.
LOWEST_PRICE, HIGHEST_PRICE, HALVINGS = -16.0, 64.0, 20
FILLS = 8  # heads that may take a sparser candidate each, while something of the budget is left


def arm_probe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    tables: ProbeTables,
    scale: float,
    by_error: bool,
    limits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`rainfusion_compile.kernels.operators.arm_probe`."""
    batch, heads, _, dim = q.shape
    group = heads // k.shape[1]
    patterns, blocks = len(tables.density), tables.sample_keep.shape[1]
    filling = (0, blocks * tables.block_k // tables.stride - len(tables.keys))
    candidates = torch.arange(patterns + 1).view(-1, 1, 1)
    listed = ((tables.sample_keep >> candidates) & 1).float()  # [P + 1, n, blocks]
    selects = len(tables.selected) > 0
    errors = torch.zeros(batch, heads, patterns + 1, dtype=torch.float32)
    recall = torch.zeros(batch, heads, patterns, dtype=torch.float32)
    for b in range(batch):
        for kv in range(k.shape[1]):
            keys = k[b, kv].index_select(0, tables.keys).float()
            values = v[b, kv].index_select(0, tables.keys).float()
            lanes = values @ tables.directions[:dim]
            lanes[:, -2], lanes[:, -1] = lanes.square().sum(1), 1.0
            lanes = F.pad(lanes, (0, 0, *filling)).unflatten(0, (blocks, -1))
            for h in range(kv * group, (kv + 1) * group):
                scores = q[b, h].index_select(0, tables.samples).float() @ keys.T * scale
                used = torch.ones(len(scores), 1, dtype=torch.float32)
                if key_mask is not None:
                    mask = mask_of(key_mask, b, h)
                    assert mask is not None
                    by_position = mask.index_select(0, tables.keys)
                    if mask.dtype == torch.bool:
                        scores.masked_fill_(~by_position, float("-inf"))
                        used = mask.index_select(0, tables.samples).float()[:, None]  # padding tells nothing
                    else:
                        scores += by_position.float()
                mass = torch.nan_to_num(scores.softmax(-1)) * used
                squares_of_outputs = (mass @ values).square().sum(-1)
                mass = F.pad(mass, filling).unflatten(1, (blocks, -1)).transpose(0, 1)  # [blocks, n, block_k]
                keeps = listed
                if selects:
                    keeps = listed + _selected(q[b, h], k[b, kv], mask_of(key_mask, b, h), tables, scale)
                first, second = (torch.einsum("pnk,knl->pnl", keeps, m @ lanes) for m in (mass, mass.square()))
                squares, kept, by_chance = _measured(first, second, tables.excess, tables.stride)
                least = squares_of_outputs / tables.stride
                energy = torch.maximum(squares_of_outputs - by_chance, least).sum()
                errors[b, h], recall[b, h] = torch.cat([squares, energy[None]]), kept / used.sum().clamp_min(1)
    if by_error:
        return choose_by_error(errors, tables.density, limits[:, :1, None]), errors, recall
    return choose_by_recall(recall, errors, tables.density, *limits.split(1, dim=1)), errors, recall


def _selected(q: Tensor, k: Tensor, mask: Tensor | None, tables: ProbeTables, scale: float) -> Tensor:
    """What candidates select for the sampled queries of a head, float 0/1 ``[P + 1, n, blocks]``."""
    rank = rank_blocks(q, k, mask, tables, scale, which=tables.sample_blocks.long())
    return (rank < F.pad(tables.selected, (0, 1))[:, None, None]).float()


def _measured(first: Tensor, second: Tensor, excess: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors and shares of attention of a head's candidates, summed over the samples, ``[P]`` each; and what of
    each dense output's square, ``[n]``, is by chance, as one of ``stride`` keys was read.

    ``first``, ``second``, ``[P + 1, n, lanes]``: what the blocks that a candidate reads (last: all) hold of weights
    times (value, its square, 1), and of squared weights times these. `sampled_keys` has the formula.
    """
    dense, value = first[-1, :, :-2], slice(None, -2)

    def spread(second: Tensor) -> Tensor:
        mixed = 2 * (second[..., value] * dense).sum(-1)
        return (second[..., -2] - mixed + second[..., -1] * dense.square().sum(-1)).clamp_min(0.0)

    share = first[:-1, :, -1]
    biased = first[:-1, :, value] / torch.where(share == 0, 1.0, share)[..., None] - dense
    sampled = excess / stride * spread(second[-1] - second[:-1])
    error = torch.where(excess < 0, biased.square().sum(-1), sampled)
    stands_for = torch.where(excess < 0, float("inf"), excess + 1)
    kept = share + (first[-1, :, -1] - share) / stands_for
    return error.sum(1), kept.sum(1), (1 - 1 / stride) * spread(second[-1])


def choose_by_error(errors: Tensor, density: Tensor, error: Tensor | float) -> Tensor:
    """The candidate of each head, int32 ``[B, H]``, at which a sample's heads drop most for their output error.

    The heads' squared errors may add up to ``error**2`` times the sum of their dense outputs' squares. Each head takes
    the candidate with the least ``density + price * error`` for a price that is the same for all: the lowest that keeps
    within the budget (Lagrange). That leaves a part of the budget, which goes to the largest steps that it allows, head
    by head. Candidate P is dense attention.

    Args:
        errors: float32 ``[B, H, P + 1]``, squared output errors, and last the dense output's square.
        density: float32 ``[P]``.
        error: relative output error of a layer, a number or ``[B or 1, 1, 1]``; below 0 all heads stay dense.
    """
    budget = error * abs(error)  # type: ignore[operator]
    energy, squares = errors[..., -1:], F.pad(errors[..., :-1], (0, 1))
    sound = (energy > 0) & energy.isfinite()
    total = torch.where(sound, energy, 0.0).sum(1, keepdim=True)
    share = torch.where(sound & squares.isfinite(), squares / torch.where(total > 0, total, 1.0), float("inf"))
    share[..., -1] = 0.0
    cost = F.pad(density, (0, 1), value=1.0)
    free = (share == 0) & (budget >= 0)
    free[..., -1] = True
    choice = torch.where(free, cost, float("inf")).argmin(-1)
    low, high = (errors.new_full((len(errors), 1, 1), price) for price in (LOWEST_PRICE, HIGHEST_PRICE))
    for _ in range(HALVINGS):
        price = (low + high) / 2
        taken = (cost + price.exp2() * share).argmin(-1)
        fits = share.gather(-1, taken[..., None]).sum(1, keepdim=True) <= budget
        choice = torch.where(fits[..., 0], taken, choice)
        low, high = torch.where(fits, low, price), torch.where(fits, price, high)
    samples = torch.arange(len(errors))
    for _ in range(FILLS):
        spent, kept = share.gather(-1, choice[..., None]), cost[choice][..., None]
        fits = share - spent <= budget - spent.sum(1, keepdim=True)
        gain, taken = torch.where(fits, kept - cost, 0.0).max(-1)
        head = gain.argmax(-1)
        better = torch.where(gain[samples, head] > 0, taken[samples, head], choice[samples, head])
        choice[samples, head] = better
    return choice.int()


def choose_by_recall(
    recall: Tensor, errors: Tensor, density: Tensor, recall_target: Tensor, min_recall: Tensor
) -> Tensor:
    """The paper's rule: recall ``[B, H, P]`` and density ``[P]`` to int32 ``[B, H]``; candidate P is dense attention.

    The sparsest candidate that holds ``recall_target`` of a head's attention, else the one that holds most; dense, if
    that is less than ``min_recall``, and where no sampled query tells anything (``errors`` as above).
    """
    reaches = recall >= torch.maximum(recall_target, min_recall)[..., None]
    sparsest = torch.where(reaches, density, float("inf")).argmin(-1)
    best, argbest = recall.max(-1)
    energy = errors[..., -1]
    told = (best >= min_recall) & (energy > 0) & energy.isfinite()
    choice = torch.where(reaches.any(-1), sparsest, argbest)
    return torch.where(told, choice, recall.shape[-1]).int()


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, choice: Tensor, key_mask: Tensor | None, tables: AttentionTables, scale: float
) -> Tensor:
    """See :func:`rainfusion_compile.kernels.operators.block_sparse_attention`."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = q.new_empty(q.transpose(1, 2).shape)
    plans: dict[tuple[int, int], list[_Part]] = {(len(tables.rows) - 1, 0): [_Part(None, None, None)]}
    apart = key_mask is not None and key_mask.shape[1] > 1
    phases, selecting = _phases_of(tables), _selecting(tables)
    for b, (chosen, drawn) in enumerate(zip(choice.tolist(), draws(q, tables.order).tolist(), strict=True)):
        taken = [(number, draw % phases[number]) for number, draw in zip(chosen, drawn, strict=True)]
        # Heads that read the same keys are computed together, but where each selects its own or has its own key mask.
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for h, one in enumerate(taken):
            groups[(*one, h) if apart or selecting[one[0]] else one].append(h)
        for alike in groups.values():
            one, mask = taken[alike[0]], mask_of(key_mask, b, alike[0])
            plan = plans.get(one)
            if plan is None:
                own = _Head(q[b, alike[0]], k[b, alike[0] // group], mask, scale) if selecting[one[0]] else None
                plan = _plan(tables, *one, own)
                plans |= {} if own else {one: plan}
            qs = _heads(q[b], alike)
            ks, vs = (_heads(x[b], [h // group for h in alike]) for x in (k, v))
            result = out[b] if len(alike) == heads else torch.empty_like(qs)
            for query, key, bias in plan:
                part = _attend(_take(qs, query), _take(ks, key), _take(vs, key), _take(mask, key), bias, scale)
                if query is None:
                    result.copy_(part)
                else:
                    result.index_copy_(0, query, part)
            if len(alike) < heads:
                out[b].index_copy_(1, torch.tensor(alike), result)
    return out.transpose(1, 2)


def _selecting(tables: AttentionTables) -> list[bool]:
    """Which candidates' heads select key blocks; dense attention, the last, does not."""
    selected = (tables.selected > 0).tolist()
    return selected + [False] * (len(tables.rows) - len(selected))


class _Part(NamedTuple):
    """Query tokens that read the same key tokens (None for all), and the keys' bias, if some are sampled."""

    query: Tensor | None
    key: Tensor | None
    bias: Tensor | None


def _phases_of(tables: AttentionTables) -> list[int]:
    """How many phases each candidate's rows have, in which a draw repeats itself: their least common multiple."""
    return [math.lcm(*phases.unique().tolist()) for phases in tables.sampled[tables.rows.long(), 1]]


class _Head(NamedTuple):
    """A head that selects key blocks, for each query block others."""

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float

    def block_lists(self, tables: AttentionTables, selected: int) -> Tensor:
        return block_lists(rank_blocks(self.q, self.k, self.mask, tables, self.scale), tables.free, selected)


def _plan(tables: AttentionTables, candidate: int, draw: int, head: _Head | None) -> list[_Part]:
    """What to attend: query blocks that share a row go together, but where the head selects key blocks."""
    queries = tables.order.long().split(tables.block_q)
    blocks, filling = tables.key_order.view(-1, tables.block_k).long(), -len(tables.order) % tables.block_k
    runs = len(blocks) - (len(tables.order) + filling) // tables.block_k
    of_order = blocks[2 * runs - len(blocks) : runs]
    cut_short = len(blocks) - 1, runs - 1
    starts = tables.row_ptr.tolist()
    shared: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(tables.rows[candidate].tolist()):
        shared[row].append(number)
    plan = []
    for row, together in shared.items():
        count, phases, selected, granules, _ = tables.sampled[row].tolist()
        listed = tables.indices[starts[row] : starts[row + 1]].long()
        listed[: 0 if selected else count] += draw % phases
        key = blocks[listed].flatten()  # only the last block of a row can be cut short
        if filling and int(listed[-1]) in cut_short:
            key = key[:-filling]
        bias = None
        if count:
            bias = torch.zeros(len(key) + (count + selected) * tables.block_k * (selected > 0), dtype=torch.float32)
            bias[: count * tables.block_k] = float(tables.weight[row]) * math.log(2)
        if not selected:
            query = torch.cat([queries[number] for number in together])
            plan += [_Part(some, key, bias) for some in query.split(MAX_QUERIES)]
            continue
        assert head is not None
        drawn = blocks[granules:].flatten()[: of_order.numel()].view(phases, len(of_order), -1)[draw % phases]
        for number, own in zip(together, head.block_lists(tables, selected)[together], strict=True):
            before = drawn[own[:-selected]].flatten(), of_order[own[-selected:]].flatten()
            plan.append(_Part(queries[number], torch.cat([*before, key]), bias))
    return plan


def _heads(x: Tensor, heads: list[int]) -> Tensor:
    """Some heads of ``[H, S, D]`` as ``[S, heads, D]``: in this layout, taking a token moves one run of memory."""
    x = x.transpose(0, 1)
    return x if heads == list(range(x.shape[1])) else x.index_select(1, torch.tensor(heads))


def _take(x: Tensor | None, tokens: Tensor | None) -> Any:
    return x if x is None or tokens is None else x.index_select(0, tokens)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Dense attention, ``[tokens, heads, head_dim]`` each; a query without any visible key gives 0."""
    if mask is not None and mask.dtype == torch.bool:
        if not bool(mask.any()):
            return torch.zeros_like(q)
        k, v, bias, mask = k[mask], v[mask], None if bias is None else bias[mask], None  # padding needs no work at all
    if bias is not None:
        mask = bias if mask is None else mask + bias
    if mask is not None:
        mask = mask.to(q.dtype).expand(1, 1, q.shape[0], -1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return torch._C._nn.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)
