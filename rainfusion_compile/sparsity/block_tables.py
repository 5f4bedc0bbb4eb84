# SPDX-License-Identifier: Apache-2.0
"""Block tables: which key blocks each query block reads, for every pattern, for one grid.

They depend on grid, text position and options only, so they are built once, on the CPU, from block occupancies: no
tensor of ``tokens * tokens`` elements is ever made. A block pair is kept when any of its token pairs is, so the block
mask covers the token pattern, and every density here is the realised one: kept token pairs over all token pairs.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rainfusion_compile.sparsity.blocks import Blocks, distinct_rows
from rainfusion_compile.sparsity.candidates import all_candidates
from rainfusion_compile.sparsity.layout import VideoLayout, grid_text
from rainfusion_compile.sparsity.patterns import BY_NAME, PatternName

BLOCK_Q = 128
BLOCK_K = 64
SAMPLES = 64
LEAST_KEYS, MOST_STRIDE = 16384, 4  # the ARM probe reads so many keys of a long video, and one of so many at least
_GOLDEN = 0.6180339887498949


class AttentionTables(NamedTuple):
    """What ``torch.ops.rainfusion.block_sparse_attention`` takes between key mask and scale: see `BlockTables`."""

    order: Tensor
    key_order: Tensor
    rows: Tensor
    row_ptr: Tensor
    indices: Tensor
    sampled: Tensor
    weight: Tensor
    selected: Tensor
    free: Tensor
    block_q: int
    block_k: int
    int8: bool = False


class ProbeTables(NamedTuple):
    """What ``torch.ops.rainfusion.arm_probe`` takes between key mask and scale: see `BlockTables`."""

    order: Tensor
    keys: Tensor
    samples: Tensor
    sample_blocks: Tensor
    sample_keep: Tensor
    excess: Tensor
    directions: Tensor
    density: Tensor
    selected: Tensor
    free: Tensor
    stride: int
    block_q: int
    block_k: int
    int8: bool = False


@dataclass(frozen=True, eq=False)
class BlockTables:
    """What the operators need to know of one grid. P candidates, each a pattern at one sparsity; number P is dense.

    Query blocks are ``block_q`` positions of ``order``, one after the other. Key blocks are ``block_k`` entries of
    ``key_order`` each: samples of the keys of each candidate (:mod:`sampled_keys`, :mod:`selected_blocks`), then those
    of ``order`` again, then *runs*: all tokens as they lie in memory. Rows that keep everything read runs, and so do
    windows of whole frames without samples; all others read none. A row names a token at most once.

    Attributes:
        layout: grid and text.
        patterns: names. Candidates come by ascending realised density. None is there twice; without "spatial" for a
            single frame, of which it keeps all.
        sparsities: the sparsity that each was made for.
        densities: realised density of each, in (0, 1].
        radii: the radius of each one's windows, or how many key blocks its heads select, and how many phases its
            samples have (0: no samples).
        block_q, block_k: tokens in a query block and in a key block.
        order: int32 ``[tokens]``, ``order[position] = token``.
        key_order: int32 ``[nK * block_k]``. The part of ``order`` and the runs are both filled up to whole blocks with
            their last token, which does not count there. The runs are the last ``ceil(tokens / block_k)`` blocks.
        rows: int32 ``[P + 1, nQ]``, the row of each candidate and query block. Equal rows are stored once.
        row_ptr: int32 ``[R + 1]``, row ``r`` keeps the key blocks ``indices[row_ptr[r]:row_ptr[r + 1]]``.
        indices: int32 ``[nnz]``, key block numbers, ascending in each row.
        sampled: int32 ``[R, 5]``: how many of a row's blocks, the first ones, are samples, and how many phases these
            have. They are listed at phase 0; a head that draws phase f reads the f-th block after each. Then, of rows
            whose heads select blocks, else 0: how many; the first block of the granules; and the first block of `order`
            after all that are free. Such a row reads samples and what is selected beside the blocks that it lists.
        weight: float32 ``[R]``, the binary logarithm of how many keys each of a row's sampled ones stands for.
        free: int32 ``[ceil(tokens / block_k)]``, 1 for the blocks of ``order`` that heads may select.
        samples: int32 ``[n]``, the tokens whose attention the ARM probe looks at.
        keys: int32 ``[ceil(tokens / stride)]``, the tokens that it reads as keys: of each run of ``stride`` positions
            of ``order`` one, so that key blocks keep their numbers, and have ``block_k / stride`` of these each.
        stride: see ``keys``; 1 if any candidate drops keys, and over less than `LEAST_KEYS` * 2 tokens.
        sample_blocks: int32 ``[n]``, the query block of each.
        sample_keep: int32 ``[n, ceil(tokens / block_k)]``, over the blocks of ``order``: bit p set where candidate p
            reads the whole block for that sample; bit P always.
        excess: float32 ``[P, n]``: how many keys, beside itself, each one that a candidate samples for a query stands
            for; -1 where it drops all keys but those it reads.
        directions: float32 ``[256, 16]``, random signs over the root of 14: in which directions the probe looks at the
            first head_dim numbers of a value. The last two columns are 0.
        density: float32 ``[P]``, `densities`.
        selected: int32 ``[P]``: how many free blocks a query block selects beside those of ``sample_keep``; ``[0]`` if
            no candidate selects any.
        int8: whether queries and keys are multiplied as 8-bit integers.
    """

    layout: VideoLayout
    patterns: tuple[PatternName, ...]
    sparsities: tuple[float, ...]
    densities: tuple[float, ...]
    radii: tuple[Any, ...]
    block_q: int
    block_k: int
    order: Tensor
    key_order: Tensor
    rows: Tensor
    row_ptr: Tensor
    indices: Tensor
    sampled: Tensor
    weight: Tensor
    free: Tensor
    keys: Tensor
    samples: Tensor
    sample_blocks: Tensor
    sample_keep: Tensor
    excess: Tensor
    directions: Tensor
    density: Tensor
    selected: Tensor
    stride: int
    int8: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def probe_arguments(self) -> ProbeTables:
        return ProbeTables(*(getattr(self, name) for name in ProbeTables._fields))

    @property
    def attention_arguments(self) -> AttentionTables:
        return AttentionTables(*(getattr(self, name) for name in AttentionTables._fields))

    def out_of_reach(self, sparsity: float | tuple[float, ...]) -> str | None:
        """What to tell a user who asked for so much, if even the sparsest pattern keeps a quarter more pairs than that.

        Of several sparsities, the lowest counts: the others are there for grids that reach them. With few frames, long
        text or small frames, what is always kept, or one block, is most of all there is.
        """
        sparsity, lowest = min(sparsity) if isinstance(sparsity, tuple) else sparsity, min(self.densities)
        if lowest <= 1.25 * (1 - sparsity):
            return None
        grid = grid_text(self.layout.grids)
        text = f" with text {self.layout.text}" if any(self.layout.text) else ""
        kept = f"lowest density {lowest:.3f}, for text, first frames and whole blocks are kept"
        out_of_reach = f"sparsity={sparsity:g} is out of reach for grid {grid}{text}: {kept}"
        return f"{out_of_reach}; expect no less than {lowest:.0%} of the work"

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

    def block_mask(self, candidate: int) -> Tensor:
        """Listed blocks of a candidate by its number (P: dense), bool ``[nQ, nK]``; for tests and benchmarks."""
        lengths, device = self.row_ptr.diff().long(), self.rows.device
        rows = torch.zeros(len(lengths), len(self.key_order) // self.block_k, dtype=torch.bool, device=device)
        rows[torch.arange(len(lengths), device=device).repeat_interleave(lengths), self.indices.long()] = True
        return rows[self.rows[candidate].long()]


def key_blocks(key_order: Tensor, tokens: int, block_k: int) -> tuple[Tensor, ...]:
    """The tokens of every key block, int64, by its number: see :class:`BlockTables`."""
    filling = -tokens % block_k
    listed, runs = key_order.long().split([len(key_order) - tokens - filling, tokens + filling])
    parts = (part[: len(part) - filling] for part in (listed, runs) if len(part))
    return tuple(block for part in parts for block in part.split(block_k))


@functools.lru_cache(maxsize=64)
def block_tables(
    layout: VideoLayout, *, sparsity: float | tuple[float, ...], patterns: tuple[PatternName, ...],
    sampled: bool = True, int8: bool = False, block_q: int = BLOCK_Q, block_k: int = BLOCK_K,
    device: torch.device | None = None,
) -> BlockTables:  # fmt: skip
    """Tables of ``patterns`` at each ``sparsity``: densities as near to ``1 - sparsity`` as the grid lets them be.

    Cached by value: equal arguments give the same tables, different grids never share any.

    Args:
        sparsity: wanted shares of dropped token pairs, one or several in [0, 1).
        patterns: which patterns, at least one.
        sampled: whether keys outside the windows of "spatial" and "temporal" are sampled, or dropped.
        int8: whether queries and keys are multiplied as 8-bit integers.
        block_q, block_k: tokens in a query block and in a key block.
        device: where the tables are wanted (default: CPU).
    """
    if device is not None and device.type != "cpu":
        on_cpu = block_tables(
            layout, sparsity=sparsity, patterns=patterns, sampled=sampled, int8=int8, block_q=block_q, block_k=block_k
        )
        return on_cpu.to(device)
    with torch.device("cpu"):  # whatever the process's default device is
        ladder = sparsity if isinstance(sparsity, tuple) else (sparsity,)
        return dataclasses.replace(_build(Blocks(layout, block_q, block_k), ladder, patterns, sampled), int8=int8)


def _build(blocks: Blocks, ladder: tuple[float, ...], names: tuple[PatternName, ...], sampled: bool) -> BlockTables:
    """Reaches are searched, the candidates' rows laid side by side, equal rows stored once."""
    layout, block_k = blocks.layout, blocks.block_k
    found = all_candidates(blocks, ladder, names, sampled)

    # Rows over the blocks of samples, those of `order`, then the runs of memory; and marks that keep rows of the same
    # blocks apart where heads select others beside them.
    width, before = sum(len(one.rows.keys) for one in found) // block_k, 0
    listed, row_of, counts, weights = [], [], [], []
    last_free = int(_last(~blocks.full_columns))
    for number, (name, _, _, rows_of, _) in enumerate(found):
        mask, strata, keys, phases, weight, selected = rows_of
        narrow, which = distinct_rows(torch.cat([strata, mask], dim=1))  # of each candidate: all rows at once are wide
        own, some = len(keys) // block_k, _one_of_each(which)
        first_phases = torch.zeros(len(narrow), own, dtype=torch.bool)
        if strata.shape[1]:
            first_phases[:, :: max(phases, 1)] = narrow[:, : strata.shape[1]]
        of_order = narrow[:, strata.shape[1] :]
        wide = torch.cat([pad(first_phases, (before, width - before - own)), of_order], dim=1)
        selects = (rows_of.beside[some] > 0) & (selected > 0)
        mark = pad(selects[:, None], (number, len(found) - 1 - number))
        wide = _with_runs(wide, blocks.n_b, all_runs=BY_NAME[name].reads_runs and not phases)
        listed.append(torch.cat([wide, mark], dim=1))
        row_of.append(which + sum(map(len, listed[:-1])))
        count = torch.where(selects, rows_of.beside[some] - selected, first_phases.sum(1))
        beside = torch.tensor([selected, before, last_free + 1]) * selects[:, None]
        counts.append(torch.cat([count[:, None], torch.full((len(narrow), 1), max(phases, 1)), beside], dim=1))
        weights.append(weight[some])
        before += own
    dense = pad(torch.ones(1, blocks.n_b, dtype=torch.bool), (width, 0))
    row_of.append(torch.full((blocks.n_q,), sum(map(len, listed))))
    listed.append(pad(_with_runs(dense, blocks.n_b, all_runs=True), (0, len(found))))
    counts.append(torch.tensor([[0, 1, 0, 0, 0]]))
    weights.append(torch.ones(1, dtype=torch.float64))
    distinct, which = distinct_rows(torch.cat(listed))
    some, rows, distinct = _one_of_each(which), which[torch.stack(row_of)], distinct[:, : width + 2 * blocks.n_b]
    in_memory = torch.arange(layout.tokens)
    key_order = [*(blocks.order[one.rows.keys] for one in found)]
    key_order += [_filled_up(tokens, block_k) for tokens in (blocks.order, in_memory)]

    positions = _sample_positions(blocks)
    of_sample = positions // blocks.block_q
    sample_keep = torch.full((len(positions), blocks.n_b), 1 << len(found), dtype=torch.int32)
    excess = torch.empty(len(found), len(positions), dtype=torch.float32)
    for number, one in enumerate(found):
        sample_keep |= one.rows.mask[of_sample].int() << number
        excess[number] = one.rows.weight[of_sample] - 1 if one.rows.phases else -1.0
    densities, any_selects = tuple(one.density for one in found), any(one.rows.selected for one in found)
    all_sampled = all(one.rows.phases or bool(one.rows.mask.all()) for one in found)
    stride = _probe_stride(layout.tokens, block_k) if all_sampled else 1
    return BlockTables(
        layout, tuple(one.name for one in found), tuple(one.sparsity for one in found), densities,
        tuple(one.radius for one in found), blocks.block_q, block_k,
        order=blocks.order.int(), key_order=torch.cat(key_order).int(),
        rows=rows.int(), row_ptr=pad(distinct.sum(1).cumsum(0), (1, 0)).int(),
        indices=distinct.nonzero()[:, 1].int(), sampled=torch.cat(counts)[some].int(),
        weight=torch.cat(weights)[some].log2().float(), free=(~blocks.full_columns).int(),
        keys=blocks.order[_one_of_each_run(layout.tokens, stride)].int(), stride=stride,
        samples=blocks.order[positions].int(), sample_blocks=of_sample.int(), sample_keep=sample_keep, excess=excess,
        directions=_directions(), density=torch.tensor(densities, dtype=torch.float32),
        selected=torch.tensor([one.rows.selected for one in found if any_selects], dtype=torch.int32),
    )  # fmt: skip


def _last(mask: Tensor) -> Tensor:
    """The number of the last that is True, -1 if none is."""
    return pad(mask.nonzero().flatten(), (1, 0), value=-1)[-1]


def _one_of_each(which: Tensor) -> Tensor:
    """The number of some row of each kind."""
    return torch.zeros(int(which.max()) + 1, dtype=torch.int64).index_copy(0, which, torch.arange(len(which)))


def _probe_stride(tokens: int, block_k: int) -> int:
    """Of how many keys the probe reads one: a power of two that leaves enough, and whole runs in a key block.

    What is rare in 16k keys is more often there in 75k: as many keys tell as much of a longer video.
    """
    stride = 1
    while stride < MOST_STRIDE and tokens >= 2 * stride * LEAST_KEYS and block_k % (32 * stride) == 0:
        stride *= 2
    return stride


def _one_of_each_run(positions: int, length: int) -> Tensor:
    """A random position of each run of so many, int64; the last run may be shorter."""
    start = torch.arange(0, positions, length)
    left = (positions - start).clamp(max=length)
    return (
        start + (torch.rand(len(start), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * left).long()
    )


def _directions() -> Tensor:
    """14 random directions, of which any first numbers will do: a value keeps its squared length on average."""
    signs = torch.randint(2, (256, 14), generator=torch.Generator().manual_seed(0))
    return pad((2 * signs - 1).float() / 14**0.5, (0, 2))


def _filled_up(tokens: Tensor, block: int) -> Tensor:
    return torch.cat([tokens, tokens[-1:].expand(-len(tokens) % block)])


def _with_runs(mask: Tensor, runs: int, *, all_runs: bool) -> Tensor:
    """A block mask with columns for runs after the others: rows that keep everything read these, or all rows do.

    `order` keeps frames and text in place, so runs hold the same frames as its blocks.
    """
    as_runs = torch.cat([torch.zeros_like(mask), mask[:, -runs:]], dim=1)
    everything = mask[:, -runs:].all(1, keepdim=True)
    return as_runs if all_runs else torch.where(everything, as_runs, pad(mask, (0, runs)))


def _sample_positions(blocks: Blocks) -> Tensor:
    """Positions of the ARM's sample: one in each of n equal strata of the queries that do not see everything.

    A golden-ratio jitter inside the strata spreads them over places even where strata and frames are in step.
    """
    tokens = blocks.layout.tokens
    candidates = (~blocks.always.all(1))[torch.arange(tokens) // blocks.block_q] & blocks.is_video
    positions = candidates.nonzero().flatten()
    if len(positions) == 0:  # every block sees everything; any query tells that
        positions = blocks.is_video.nonzero().flatten()
    count = min(SAMPLES, len(positions))
    edges = torch.arange(count + 1) * len(positions) // count
    jitter = (torch.arange(count, dtype=torch.float32) * _GOLDEN).frac()
    return positions[edges[:-1] + (jitter * edges.diff()).long()]
