# SPDX-License-Identifier: Apache-2.0
"""One video self-attention, ready to be timed: tensors as models lay them out, block tables, a choice for each head.

Heads take the candidates of the three static patterns in turn, whatever the ARM would choose of such random tensors:
the kernels' time does not depend on what these hold. The ARM runs in every call all the same.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import measure
from rainfusion_compile.kernels import operators
from rainfusion_compile.kernels.gpu import attention
from rainfusion_compile.kernels.gpu.configs import attention_config
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.block_tables import BlockTables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS

GRAPH_TOKENS = 40_000  # up to here launches may matter, so a whole call is also timed as a CUDA graph


def one_phase(tables: BlockTables) -> BlockTables:
    """Tables that give all heads the same samples, in every call; of patterns that select no blocks."""
    assert not len(tables.selected)
    sampled = tables.sampled.clone()
    sampled[:, 1] = 1
    return replace(tables, sampled=sampled)


def tables_of(layout: VideoLayout, sparsity: float) -> BlockTables:
    """Tables whose samples count once and have one phase, so that a block mask tells all, to any kernel."""
    tables = one_phase(Options(sparsity=sparsity, patterns=PATTERNS).tables(layout, measure.DEVICE))
    return replace(tables, weight=torch.zeros_like(tables.weight))


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Heads take the candidates of `tables` in turn (``choice``)."""

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

    def probe(self, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The ARM alone."""
        scale, rule = self.q.shape[-1] ** -0.5, Options().rule(self.q.device)
        return operators.arm_probe(self.q, self.k, self.v, key_mask, *self.tables.probe_arguments, scale, *rule)

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
        self.probe(key_mask)
        return self.attend(key_mask=key_mask)


def make_call(
    layout: VideoLayout, heads: int, head_dim: int, sparsity: float, *, dtype: torch.dtype = torch.bfloat16,
    tables: BlockTables | None = None,
) -> AttentionCall:  # fmt: skip
    """Random queries, keys and values; ``[B, H, S, D]`` in ``[B, S, H, D]`` memory. ``tables``: not `tables_of`."""
    tables = tables or tables_of(layout, sparsity)
    generator = torch.Generator(measure.DEVICE).manual_seed(1)
    shape = (3, 1, layout.tokens, heads, head_dim)
    q, k, v = torch.randn(shape, device=measure.DEVICE, dtype=dtype, generator=generator).transpose(2, 3)
    choice = (torch.arange(heads, device=measure.DEVICE, dtype=torch.int32) % len(tables.patterns))[None]
    return AttentionCall(layout, sparsity, tables, q, k, v, choice)
