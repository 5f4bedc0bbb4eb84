# SPDX-License-Identifier: Apache-2.0
"""What the operators mean, slowly: dense scores, a mask, a softmax in float64. Tests and doubts are settled here."""

from __future__ import annotations

import torch
from torch import Tensor

from rainfusion_compile.sparsity.block_tables import AttentionTables, ProbeTables, key_blocks


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, choice: Tensor, key_mask: Tensor | None, tables: AttentionTables, scale: float
) -> Tensor:
    """Arguments as in :func:`rainfusion_compile.kernels.operators.block_sparse_attention`; float64 ``[B, H, S, D]``."""
    (batch, heads, tokens, _), group = q.shape, q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    listed = key_blocks(tables.key_order, tokens, tables.block_k)
    for b in range(batch):
        for h in range(heads):
            key, value = k[b, h // group].double(), v[b, h // group].double()
            for block, query in enumerate(tables.order.long().split(tables.block_q)):
                row = int(tables.rows[int(choice[b, h]), block])
                blocks = tables.indices[tables.row_ptr[row] : tables.row_ptr[row + 1]]
                kept = torch.cat([listed[int(i)] for i in blocks])
                visible = torch.bincount(kept, minlength=tokens)
                assert visible.max() == 1, "a row names a token twice"
                bias = torch.where(visible > 0, 0.0, float("-inf")) + _bias(key_mask, b, h, tokens, q.device)
                scores = q[b, h, query].double() @ key.T * scale + bias
                out[b, h, query] = torch.nan_to_num(scores.softmax(-1)) @ value
    return out


def sampled_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    tables: ProbeTables,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What comes out of the sampled queries under each candidate, last under dense attention.

    Returns:
        The outputs, float64 ``[B, H, P + 1, n, D]``, and the share of attention that each keeps, ``[B, H, P + 1, n]``;
        0 for queries that a bool key mask hides.
    """
    batch, heads, tokens, dim = q.shape
    group, patterns, samples = heads // k.shape[1], len(tables.density), tables.samples.long()
    place = tables.order.long().argsort()
    candidates = torch.arange(patterns + 1, device=q.device).view(-1, 1, 1)
    kept = ((tables.sample_keep[:, place // tables.block_k] >> candidates) & 1).double()  # [P + 1, n, tokens]
    for number in range(tables.gathering):
        kept[number] = torch.maximum(kept[number], (tables.key_bits[place] >> number & 1).double())
    out = torch.zeros(batch, heads, patterns + 1, len(samples), dim, dtype=torch.float64, device=q.device)
    shares = torch.zeros(out.shape[:-1], dtype=torch.float64, device=q.device)
    for b in range(batch):
        for h in range(heads):
            bias = _bias(key_mask, b, h, tokens, q.device)
            mass = torch.nan_to_num(
                (q[b, h, samples].double() @ k[b, h // group].double().T * scale + bias).softmax(-1)
            )
            if key_mask is not None and key_mask.dtype == torch.bool:
                mass = mass * torch.isfinite(bias[samples])[:, None]
            shares[b, h] = (mass * kept).sum(-1)
            out[b, h] = (
                (mass * kept) @ v[b, h // group].double() / shares[b, h].masked_fill(shares[b, h] == 0, 1)[..., None]
            )
    return out, shares


def _bias(key_mask: Tensor | None, b: int, h: int, tokens: int, device: torch.device) -> Tensor:
    """The key mask of one sample and head as an additive float64 bias ``[tokens]``."""
    if key_mask is None:
        return torch.zeros(tokens, dtype=torch.float64, device=device)
    mask = key_mask[b % key_mask.shape[0], h % key_mask.shape[1]]
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    return mask.double()
