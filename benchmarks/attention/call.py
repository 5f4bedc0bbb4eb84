# SPDX-License-Identifier: Apache-2.0
"""One video self-attention, ready to be timed: tensors as models lay them out, block tables, and what the ARM chose."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

import rainfusion_compile
from benchmarks import measure
from benchmarks.attention.structured import structured_qk
from rainfusion_compile.kernels import operators
from rainfusion_compile.kernels.gpu import attention
from rainfusion_compile.kernels.gpu.configs import attention_config
from rainfusion_compile.sparsity.block_tables import BlockTables, block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS

RECALL_TARGET = 0.9
MIN_RECALL = 0.5
GRAPH_TOKENS = 40_000  # up to here launches may matter, so a whole call is also timed as a CUDA graph


def tables_of(layout: VideoLayout, sparsity: float) -> BlockTables:
    return block_tables(layout, sparsity=sparsity, patterns=PATTERNS, device=measure.DEVICE)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Heads follow the three patterns in turn, and the ARM has found out which (``choice``)."""

    layout: VideoLayout
    sparsity: float
    tables: BlockTables
    q: Tensor
    k: Tensor
    v: Tensor
    choice: Tensor

    @property
    def chosen(self) -> list[int]:
        """The pattern number of each head."""
        return self.choice[0].tolist()

    @property
    def density(self) -> float:
        """Realised: kept token pairs over all token pairs, mean over heads."""
        densities = (*self.tables.densities, 1.0)
        return statistics.mean(densities[number] for number in self.chosen)

    @property
    def flop(self) -> int:
        """Of dense attention."""
        _, heads, tokens, head_dim = self.q.shape
        return 4 * heads * tokens**2 * head_dim

    @property
    def all_dense(self) -> Tensor:
        """The choice of heads that all stay dense."""
        return torch.full_like(self.choice, len(self.tables.patterns))

    def probe(self, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The ARM alone."""
        return _probe(self.q, self.k, self.tables, key_mask)

    def attend(self, choice: Tensor | None = None, key_mask: Tensor | None = None, *, portable: bool = False) -> Tensor:
        """Attention alone, by the kernel that this GPU gets, or by the portable one as it would run on Hopper."""
        choice = self.choice if choice is None else choice
        head_dim = self.q.shape[-1]
        args, tables, scale = (
            (self.q, self.k, self.v, choice, key_mask),
            self.tables.attention_arguments,
            head_dim**-0.5,
        )
        if portable:
            config = attention_config(head_dim, self.q.dtype, None)
            return attention.block_sparse_attention(*args, tables, scale, config=config)
        return operators.block_sparse_attention(*args, *tables, scale)

    def whole(self, key_mask: Tensor | None = None) -> Tensor:
        """What a model calls: the ARM, then attention."""
        return rainfusion_compile.attention(
            self.q,
            self.k,
            self.v,
            grid=self.layout.grid,
            text=self.layout.text,
            sparsity=self.sparsity,
            recall_target=RECALL_TARGET,
            min_recall=MIN_RECALL,
            key_mask=key_mask,
        )


def make_call(
    layout: VideoLayout, heads: int, head_dim: int, sparsity: float, *, dtype: torch.dtype = torch.bfloat16
) -> AttentionCall:
    """Structured queries and keys, random values; ``[B, H, S, D]`` in ``[B, S, H, D]`` memory."""
    tables = tables_of(layout, sparsity)
    kinds = [PATTERNS[number % len(PATTERNS)] for number in range(heads)]
    qk = structured_qk(layout, kinds, head_dim=head_dim, classes=tables.radii["textural"], device=measure.DEVICE)
    q, k = (x.to(dtype) for x in qk)
    generator = torch.Generator(measure.DEVICE).manual_seed(1)
    v = torch.randn(1, layout.tokens, heads, head_dim, device=measure.DEVICE, dtype=dtype, generator=generator)
    choice, _ = _probe(q, k, tables)
    return AttentionCall(layout, sparsity, tables, q, k, v.permute(0, 2, 1, 3), choice)


def _probe(q: Tensor, k: Tensor, tables: BlockTables, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    return operators.arm_probe(q, k, key_mask, *tables.probe_arguments, scale, RECALL_TARGET, MIN_RECALL)
