# SPDX-License-Identifier: Apache-2.0
"""Which free key blocks each query block of a head selects: :mod:`rainfusion_compile.sparsity.selected_blocks`.

By the product of the block's mean query and mean key. On a GPU, :mod:`rainfusion_compile.kernels.gpu.selection` does
the same; where two blocks are as good but for rounding, the engines may differ in which they take.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rainfusion_compile.sparsity.block_tables import AttentionTables, BlockTables, ProbeTables


def block_means(
    x: Tensor, order: Tensor, block: int, mask: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Means of ``x [S, D]`` over each ``block`` positions of `order`, ``[n, D]``.

    Without tokens that a key mask ``[S]`` hides, as padding may hold anything; 0 where it hides all.
    """
    seen = torch.ones(len(x), 1, dtype=dtype, device=x.device)
    if mask is not None:
        seen = visible(mask).to(dtype)[:, None]
        x = torch.where(seen > 0, x, 0.0)
    each = torch.cat([x.to(dtype), seen], 1).index_select(0, order.long())
    sums = F.pad(each, (0, 0, 0, -len(each) % block)).unflatten(0, (-1, block)).sum(1)
    return sums[:, :-1] / sums[:, -1:].clamp_min(1)


def visible(mask: Tensor) -> Tensor:
    """Which keys a mask, bool or additive, leaves to be seen."""
    return mask if mask.dtype == torch.bool else mask != float("-inf")


def mask_of(key_mask: Tensor | None, b: int, h: int) -> Tensor | None:
    """The key mask of one sample and head, ``[S]``."""
    return None if key_mask is None else key_mask[b % key_mask.shape[0], h % key_mask.shape[1]]


def rank_blocks(
    q: Tensor, k: Tensor, mask: Tensor | None, tables: AttentionTables | ProbeTables | BlockTables, scale: float, *,
    which: Tensor | slice = slice(None), dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """`ranks` of a head, for all its query blocks or those that ``which`` names; ``q``, ``k`` ``[S, D]``.

    By the mean keys that the tables' user knows: the probe only those of the keys that it reads.
    """
    keys, each = tables.order, tables.block_k
    if isinstance(tables, ProbeTables):
        keys, each = tables.keys, tables.block_k // tables.stride
    q_means = block_means(q, tables.order, tables.block_q, dtype=dtype)[which]
    k_means = block_means(k, keys, each, mask, dtype)
    return ranks(mean_scores(q_means, k_means, scale), tables.free)


def mean_scores(q_means: Tensor, k_means: Tensor, scale: float) -> Tensor:
    """``[n, nB]``, as good as the softmax scale's sign makes them."""
    return (q_means if scale >= 0 else -q_means) @ k_means.T


def ranks(score: Tensor, free: Tensor) -> Tensor:
    """The place of each free block among the free ones, the best being 0; ``nB`` for others. int64 ``[n, nB]``."""
    best = score.masked_fill(free == 0, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return best.argsort(-1).masked_fill(free == 0, score.shape[-1])


def block_lists(rank: Tensor, free: Tensor, count: int) -> Tensor:
    """For each query block the free blocks, int64 ``[n, free]``: those not selected, then the ``count`` selected.

    Both in ascending order.
    """
    blocks = free.nonzero().flatten()
    return blocks[(rank[:, blocks] < count).int().argsort(dim=-1, stable=True)]
