# SPDX-License-Identifier: Apache-2.0
"""What hypothesis draws: layouts, tables and attention inputs of every shape that users may come with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rainfusion_compile.kernels import reference
from rainfusion_compile.sparsity.block_tables import AttentionTables, BlockTables, _one_of_each_run, block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import BY_NAME

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (32, 40, 64, 72, 80, 96, 128)

_grids = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))


def by_error(error: float, device: Any = None) -> tuple[bool, Tensor]:
    """What the operators take to choose by error."""
    return True, torch.tensor([[error, 0.0]], device=device)


def by_recall(recall_target: float, min_recall: float, device: Any = None) -> tuple[bool, Tensor]:
    """What the operators take to choose by recall."""
    return False, torch.tensor([[recall_target, min_recall]], device=device)


@st.composite
def _layouts(draw: st.DrawFn) -> VideoLayout:
    """One video, with text or not; sometimes several."""
    grids = draw(st.one_of(_grids.map(lambda grid: (grid,)), st.lists(_grids, min_size=2, max_size=3).map(tuple)))
    return VideoLayout(grids, tuple(draw(st.integers(0, 20)) for _ in range(len(grids) + 1)))


layouts = _layouts()
subsets = st.lists(st.sampled_from(tuple(BY_NAME)), min_size=1, max_size=4, unique=True).map(tuple)
booleans = st.booleans()
sparsities = st.sampled_from([0.0, 0.3, 0.5, 0.64, 0.8, 0.95])
ladders = st.one_of(sparsities, st.sampled_from([(0.8, 0.5), (0.95, 0.7, 0.0)]))
block_sizes = st.sampled_from([(16, 8), (8, 16), (32, 16), (128, 64)])


@st.composite
def tables(
    draw: st.DrawFn,
    blocks: st.SearchStrategy[tuple[int, int]] = block_sizes,
    sampled: st.SearchStrategy[bool] = booleans,
    layouts: st.SearchStrategy[VideoLayout] = layouts,
) -> BlockTables:
    (block_q, block_k), layout, sparsity, patterns = draw(blocks), draw(layouts), draw(ladders), draw(subsets)
    return block_tables(
        layout, sparsity=sparsity, patterns=patterns, sampled=draw(sampled), block_q=block_q, block_k=block_k
    )


@dataclass
class OperatorCall:
    """One call of the operators."""

    tables: BlockTables
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    choice: Tensor
    scale: float

    def attention_args(self, *, flat: bool = True) -> tuple[Any, ...]:
        """Of the operator; of an engine if not flat."""
        tables = self.tables.attention_arguments
        return self.q, self.k, self.v, self.choice, self.key_mask, *(tables if flat else (tables,)), self.scale

    def probe_args(self, *, flat: bool = True) -> tuple[Any, ...]:
        tables = self.tables.probe_arguments
        return self.q, self.k, self.v, self.key_mask, *(tables if flat else (tables,)), self.scale


def by_a_part(tables: BlockTables, stride: int) -> BlockTables:
    """The same tables for a probe that reads one of so many keys."""
    some = _one_of_each_run(tables.layout.tokens, stride)
    return dataclasses.replace(tables, keys=tables.order[some], stride=stride)


@st.composite
def cases(
    draw: st.DrawFn,
    masks: tuple[str | None, ...] = (None, "bool", "additive"),
    dense: bool = True,
    blocks: st.SearchStrategy[tuple[int, int]] = block_sizes,
    layouts: st.SearchStrategy[VideoLayout] = layouts,
) -> OperatorCall:
    table = draw(tables(blocks, layouts=layouts))
    whole = [stride for stride in (1, 2, 4) if stride == 1 or table.block_k // stride % 16 == 0]
    table = by_a_part(table, draw(st.sampled_from(whole)))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 3]))
    heads, tokens, dim = kv_heads * group, table.layout.tokens, draw(st.sampled_from(HEAD_DIMS))
    dtype, permuted = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(count: int) -> Tensor:
        if permuted:
            return torch.randn(batch, tokens, count, dim, generator=generator).to(dtype).permute(0, 2, 1, 3)
        return torch.randn(batch, count, tokens, dim, generator=generator).to(dtype)

    q, k, v = tensor(heads), tensor(kv_heads), tensor(kv_heads)
    kind = draw(st.sampled_from(masks))
    shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), tokens)
    key_mask = None
    if kind == "bool":
        key_mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
        for _ in range(draw(st.integers(0, 2))):  # padding of a text somewhere
            begin = draw(st.integers(0, tokens - 1))
            key_mask[..., begin : begin + draw(st.integers(1, 40))] = False
    elif kind == "additive":
        key_mask = torch.randn(shape, generator=generator).to(dtype)
    choice = torch.randint(0, len(table.patterns) + dense, (batch, heads), generator=generator, dtype=torch.int32)
    return OperatorCall(table, q, k, v, key_mask, choice, dim**-0.5)


def lists_of_the_gpu(
    q: Tensor, k: Tensor, choice: Tensor, key_mask: Tensor | None, tables: AttentionTables, scale: float
) -> Tensor | None:
    """What Triton's engine selects, as the reference takes it: two blocks may be as good but for rounding."""
    from rainfusion_compile.kernels.gpu.selection import select_blocks

    if not len(tables.selected):
        return None
    return select_blocks(q, k, choice, key_mask, tables, scale)[..., : int(tables.free.sum())].long()


def expected_errors(case: OperatorCall) -> Tensor:
    """The reference's errors, float64 ``[B, H, P + 1]``, of values that are seen in the probe's directions alone.

    But for the dense outputs' squares, which are of whole values.
    """
    return reference.arm_errors(*case.probe_args(flat=False), case.tables.directions)[0]


def chosen_by_recall(recall: list[float], told: bool, target: float, min_recall: float) -> int:
    """The paper's rule, of one head whose sampled queries tell something or not."""
    allowed = [p for p, r in enumerate(recall) if r >= min_recall and told]
    reaching = [p for p in allowed if recall[p] >= target]
    return reaching[0] if reaching else recall.index(max(recall)) if allowed else len(recall)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Rounding of inputs to and outputs from one dtype; softmax weights stay below one, values are of order one."""
    return {
        torch.float32: {"rtol": 1e-4, "atol": 1e-5},
        torch.float16: {"rtol": 4e-3, "atol": 4e-3},
        torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
    }[dtype]
