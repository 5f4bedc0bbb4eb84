# SPDX-License-Identifier: Apache-2.0
"""Block tables: which key blocks each query block reads, for every pattern, for one grid.

They depend on grid, text position and options only, so they are built once, on the CPU. A block pair is kept when any
of its token pairs is, so the block mask covers the token pattern, and every density here is the realised one: kept
token pairs over all token pairs.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rainfusion_compile.sparsity.build_tables import build
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import BY_NAME, PatternName, Radii

BLOCK_Q = 128
BLOCK_K = 64


class AttentionTables(NamedTuple):
    """What ``torch.ops.rainfusion.block_sparse_attention`` takes between key mask and scale: see `BlockTables`."""

    order: Tensor
    key_order: Tensor
    rows: Tensor
    row_ptr: Tensor
    indices: Tensor
    block_q: int
    block_k: int


class ProbeTables(NamedTuple):
    """What ``torch.ops.rainfusion.arm_probe`` takes between key mask and scale: see `BlockTables`; P patterns."""

    order: Tensor
    samples: Tensor
    sample_keep: Tensor
    key_weight: Tensor
    key_pattern: int
    patterns: int
    block_k: int


@dataclass(frozen=True, eq=False)
class BlockTables:
    """What the operators need to know of one grid. P patterns, sparsest first; pattern number P is dense attention.

    Query blocks are ``block_q`` positions of ``order``, one after the other. Key blocks are ``block_k`` entries of
    ``key_order`` each: whole blocks that gather the textural pattern's keys (a checkerboard is scattered over all other
    blocks, so it gets compact ones of its own), then those of ``order`` again, then *runs*: all tokens as they lie in
    memory. Rows that keep whole frames (spatial) or everything read runs, where nothing needs gathering; all others
    read none. A row names a token at most once.

    Attributes:
        layout: grid and text.
        patterns: names, by ascending realised density. Without "spatial" for a single frame, of which it keeps all.
        densities: realised density of each, in (0, 1].
        radii: the reach of each pattern that `sparsity` came to, by name.
        block_q, block_k: tokens in a query block and in a key block.
        order: int32 ``[tokens]``, ``order[position] = token``.
        key_order: int32 ``[nK * block_k]``. The part of ``order`` and the runs are both filled up to whole blocks with
            their last token, which does not count there. The runs are the last ``ceil(tokens / block_k)`` blocks.
        rows: int32 ``[P + 1, nQ]``, the row of each pattern and query block. Equal rows are stored once.
        row_ptr: int32 ``[R + 1]``, row ``r`` keeps the key blocks ``indices[row_ptr[r]:row_ptr[r + 1]]``.
        indices: int32 ``[nnz]``, key block numbers, ascending in each row.
        samples: int32 ``[n]``, the tokens whose attention the ARM probe looks at.
        sample_keep: uint8 ``[n, ceil(tokens / block_k)]``, over the blocks of ``order``: bit p set where pattern p
            keeps the whole block for that sample.
        key_weight: float32 ``[tokens]`` by position, 1 where pattern ``key_pattern`` keeps the key for every query,
            else 0.
    """

    layout: VideoLayout
    patterns: tuple[PatternName, ...]
    densities: tuple[float, ...]
    radii: Radii
    block_q: int
    block_k: int
    order: Tensor
    key_order: Tensor
    rows: Tensor
    row_ptr: Tensor
    indices: Tensor
    samples: Tensor
    sample_keep: Tensor
    key_weight: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("order", "key_order", "rows", "row_ptr", "indices", "samples", "sample_keep", "key_weight")
        return {name: getattr(self, name) for name in names}

    @property
    def key_pattern(self) -> int:
        """The number of the pattern that keeps single keys besides whole blocks (textural), or -1."""
        gathers = (number for number, name in enumerate(self.patterns) if BY_NAME[name].gathers_keys)
        return next(gathers, -1)

    @property
    def probe_arguments(self) -> ProbeTables:
        sampled = (self.order, self.samples, self.sample_keep, self.key_weight)
        return ProbeTables(*sampled, self.key_pattern, len(self.patterns), self.block_k)

    @property
    def attention_arguments(self) -> AttentionTables:
        kept = (self.order, self.key_order, self.rows, self.row_ptr, self.indices)
        return AttentionTables(*kept, self.block_q, self.block_k)

    def out_of_reach(self, sparsity: float) -> str | None:
        """What to tell a user who asked for so much, if even the sparsest pattern keeps a quarter more pairs than that.

        With few frames, long text or small frames, what is always kept, or one block, is most of all there is.
        """
        lowest = min(self.densities)
        if lowest <= 1.25 * (1 - sparsity):
            return None
        grid = " and ".join("x".join(map(str, grid)) for grid in self.layout.grids)
        text = f" with text {self.layout.text}" if any(self.layout.text) else ""
        return f"sparsity={sparsity:g} is out of reach for grid {grid}{text}: lowest density {lowest:.3f}"

    @functools.cached_property
    def key_blocks(self) -> tuple[Tensor, ...]:
        """The tokens of every key block, int64, by its number."""
        return key_blocks(self.key_order, self.layout.tokens, self.block_k)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device) -> BlockTables:
        """The same tables on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, **moved)

    def block_mask(self, pattern: int) -> Tensor:
        """Block mask of pattern number ``pattern`` (P: dense), bool ``[nQ, nK]``; for reports and tests."""
        blocks = len(self.key_order) // self.block_k
        lengths = self.row_ptr.diff().long()
        rows = torch.zeros(len(lengths), blocks, dtype=torch.bool, device=self.rows.device)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=self.rows.device), lengths)
        rows[owner, self.indices.long()] = True
        return rows[self.rows[pattern].long()]


def key_blocks(key_order: Tensor, tokens: int, block_k: int) -> tuple[Tensor, ...]:
    """The tokens of every key block, int64, by its number: see :class:`BlockTables`."""
    filling = -tokens % block_k
    listed, runs = key_order.long().split([len(key_order) - tokens - filling, tokens + filling])
    parts = (part[: len(part) - filling] for part in (listed, runs) if len(part))
    return tuple(block for part in parts for block in part.split(block_k))


@functools.lru_cache(maxsize=64)
def block_tables(
    layout: VideoLayout,
    *,
    sparsity: float,
    patterns: tuple[PatternName, ...],
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    device: torch.device | None = None,
) -> BlockTables:
    """Tables of ``patterns`` whose realised densities come as near to ``1 - sparsity`` as the grid lets them.

    Cached by value: equal arguments give the same tables, different grids never share any. Vectorised; well
    under a second for 118,800 tokens on two CPU cores.

    Args:
        layout: grid and text.
        sparsity: wanted share of dropped token pairs, in [0, 1).
        patterns: which patterns, at least one.
        block_q, block_k: tokens in a query block and in a key block.
        device: where the tables are wanted (default: CPU).
    """
    if device is not None and device.type != "cpu":
        on_cpu = block_tables(layout, sparsity=sparsity, patterns=patterns, block_q=block_q, block_k=block_k)
        return on_cpu.to(device)
    with torch.device("cpu"):  # whatever the process's default device is
        return BlockTables(**build(layout, 1.0 - sparsity, patterns, block_q, block_k))
