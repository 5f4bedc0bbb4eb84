# SPDX-License-Identifier: Apache-2.0
"""Errors at full size: a few heads and query rows against float64 attention over all the keys that they should see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import baselines, flash_attention_3
from benchmarks.attention.call import AttentionCall
from benchmarks.measure import relative_error
from rainfusion_compile.sparsity.block_tables import BlockTables


def attention_rows(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Float64 attention of ``q [n, D]`` over ``k, v [L, D]`` where ``kept [n, L]``: ``[n, D]``."""
    scores = q.double() @ k.double().T * q.shape[-1] ** -0.5
    return scores.masked_fill_(~kept, float("-inf")).softmax(-1) @ v.double()


def reference(call: AttentionCall, head: int, pattern: int, positions: Tensor) -> Tensor:
    """What the queries at these positions of ``order`` should give under a pattern's block mask: ``[n, D]``."""
    t = call.tables
    queries = call.q[0, head].index_select(0, t.order[positions])
    tokens = torch.cat(t.key_blocks)
    keys, values = (x[0, head].index_select(0, tokens) for x in (call.k, call.v))
    return attention_rows(queries, keys, values, kept_keys(t, pattern, positions))


def kept_keys(tables: BlockTables, pattern: int, positions: Tensor) -> Tensor:
    """Which keys of all key blocks, one after the other, the queries at these positions see: bool ``[n, L]``."""
    blocks = tables.block_mask(pattern)[positions // tables.block_q]
    lengths = torch.tensor([len(block) for block in tables.key_blocks], device=blocks.device)
    return blocks.repeat_interleave(lengths, 1)


def errors(call: AttentionCall, *, heads: int = 3, rows: int = 256) -> dict[str, Any]:
    """Relative L2 errors on ``rows`` query rows of each of the first ``heads`` heads (one of each pattern).

    Ours with all heads dense and PyTorch's dense kernel against dense float64 attention, ours sparse against float64
    attention under the same block mask; ours over PyTorch's; and FlashAttention-3's, where it is timed.
    """
    tokens = call.layout.tokens
    positions = torch.arange(rows, device=call.q.device) * tokens // rows
    at = call.tables.order[positions].long()
    chosen, dense = call.chosen[:heads], len(call.tables.patterns)
    dense_want = torch.stack([reference(call, head, dense, positions) for head in range(len(chosen))])
    sparse_want = torch.stack([reference(call, head, number, positions) for head, number in enumerate(chosen)])
    name, baseline = _dense_output(call)
    baseline_error = relative_error(baseline[0, : len(chosen), at], dense_want)
    ours_dense = relative_error(call.attend(call.all_dense)[0, : len(chosen), at], dense_want)
    ours_sparse = relative_error(call.attend()[0, : len(chosen), at], sparse_want)
    found = {
        "heads": len(chosen),
        "rows": rows,
        "reference": "float64",
        "baseline": name,
        "baseline_error": baseline_error,
        "all_dense_error": ours_dense,
        "sparse_error": ours_sparse,
        "all_dense_ratio": ours_dense / baseline_error,
        "sparse_ratio": ours_sparse / baseline_error,
    }
    if flash_attention_3.available() and call.q.dtype == torch.bfloat16:
        theirs = flash_attention_3.attention(call.q, call.k, call.v)[0, : len(chosen), at]
        found["flash_attention_3_error"] = relative_error(theirs, dense_want)
    return found


def _dense_output(call: AttentionCall) -> tuple[str, Tensor]:
    """The first dense backend that runs here, and what it gives."""
    for name in baselines.SDPA:
        try:
            return name, baselines.sdpa(name, call.q, call.k, call.v)
        except RuntimeError:
            continue
    raise RuntimeError("no dense attention kernel runs here")
