# SPDX-License-Identifier: Apache-2.0
"""Calls of attention outside all graphs, and what is reported of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import randn
from torch import Tensor

import rainfusion_compile
from rainfusion_compile import observe, sparse_eager_attention

GRID = (6, 12, 16)
N = 6 * 12 * 16
Entries = list[dict[str, Any]]
HALF: dict[str, Any] = {"min_tokens": 0, "sparsity": 0.5, "error": 1.0}


def operands(tokens: int = N, heads: int = 2, kv_heads: int = 2, head_dim: int = 16) -> list[Tensor]:
    """``[B, H, S, D]`` in ``[B, S, H, D]`` memory, as models have it."""
    shapes = ((2, tokens, count, head_dim) for count in (heads, kv_heads, kv_heads))
    return [randn(*shape, seed=seed).transpose(1, 2) for seed, shape in enumerate(shapes)]


def entries(report: rainfusion_compile.Report) -> Entries:
    return report.to_dict()["attentions"]


def call(function: Callable[..., Any], *args: Any, grid: Any = GRID, **options: Any) -> tuple[Any, Entries]:
    with torch.no_grad(), observe() as report, sparse_eager_attention(grid, **options):
        out = function(*args)
    return out, entries(report)


sdpa = F.scaled_dot_product_attention
