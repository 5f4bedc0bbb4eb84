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


def recall(q: Tensor, k: Tensor, key_mask: Tensor | None, tables: ProbeTables, scale: float) -> Tensor:
    """Recalls as :func:`~rainfusion_compile.kernels.operators.arm_probe` has them; float64 ``[B, H, P]``."""
    (batch, heads, tokens, _), group = q.shape, q.shape[1] // k.shape[1]
    out = torch.zeros(batch, heads, tables.patterns, dtype=torch.float64, device=q.device)
    place = tables.order.long().argsort()
    bits = tables.sample_keep[:, place // tables.block_k]  # [n, tokens], in token order
    if tables.key_pattern >= 0:
        bits = bits | ((tables.key_weight[place] != 0).to(torch.uint8) << tables.key_pattern)
    for b in range(batch):
        for h in range(heads):
            bias = _bias(key_mask, b, h, tokens, q.device)
            used = tables.samples.long()
            if key_mask is not None and key_mask.dtype == torch.bool:
                used = used[torch.isfinite(bias[used])]
            kept = bits[torch.isin(tables.samples, used)]
            mass = torch.nan_to_num((q[b, h, used].double() @ k[b, h // group].double().T * scale + bias).softmax(-1))
            for p in range(tables.patterns if len(used) else 0):
                out[b, h, p] = (mass * ((kept >> p) & 1)).sum(-1).mean()
    return out


def _bias(key_mask: Tensor | None, b: int, h: int, tokens: int, device: torch.device) -> Tensor:
    """The key mask of one sample and head as an additive float64 bias ``[tokens]``."""
    if key_mask is None:
        return torch.zeros(tokens, dtype=torch.float64, device=device)
    mask = key_mask[b % key_mask.shape[0], h % key_mask.shape[1]]
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    return mask.double()
