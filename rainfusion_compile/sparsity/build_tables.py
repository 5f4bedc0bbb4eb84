# SPDX-License-Identifier: Apache-2.0
"""How block tables are made: reaches are searched, the patterns' covers laid side by side, equal rows stored once.

Everything comes from block occupancies: no tensor of ``tokens * tokens`` elements is ever made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rainfusion_compile.sparsity.blocks import Blocks, distinct_rows
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import BY_NAME, PatternName

LONG = 1 << 15  # tokens from which on the ARM can afford twice the sample
_GOLDEN = 0.6180339887498949


def build(
    layout: VideoLayout, target: float, names: tuple[PatternName, ...], block_q: int, block_k: int
) -> dict[str, Any]:
    """The fields of :class:`BlockTables` for patterns of density ``target``, or as near to it as the grid lets them."""
    if all(frames == 1 for frames, _, _ in layout.grids):
        names = tuple(name for name in names if not BY_NAME[name].needs_frames) or names
    blocks = Blocks(layout, block_q, block_k)
    patterns = [BY_NAME[name](blocks) for name in names]
    if sum(pattern.gathers_keys for pattern in patterns) > 1:
        raise NotImplementedError(f"one pattern at most may gather keys; {', '.join(names)} have more")
    radii = {pattern.name: pattern.radius(target) for pattern in patterns}
    covers = {pattern.name: pattern.cover(radii[pattern.name]) for pattern in patterns}
    gathered = torch.empty(0, dtype=torch.int64)
    for cover in covers.values():
        gathered = gathered if cover.gathered is None else cover.gathered
    masks = {name: blocks.with_gathered(*cover) for name, cover in covers.items()}
    densities = {name: blocks.density(mask) for name, mask in masks.items()}
    names = tuple(sorted(names, key=densities.__getitem__))

    # Rows over the gathered blocks, those of `order`, then the runs of memory.
    width = len(gathered) // block_k + blocks.n_b
    masks = {name: pad(mask, (width - mask.shape[1], 0)) for name, mask in masks.items()}
    masks["dense"] = pad(torch.ones_like(blocks.always), (width - blocks.n_b, 0))
    runs = {"dense": True} | {name: BY_NAME[name].reads_runs for name in names}
    listed = [_with_runs(masks[name], blocks.n_b, all_runs=runs[name]) for name in (*names, "dense")]
    rows, row_ptr, indices = _compress(torch.stack(listed))
    in_memory = torch.arange(layout.tokens)
    key_order = [blocks.order[gathered], *(_filled_up(tokens, block_k) for tokens in (blocks.order, in_memory))]

    positions = _sample_positions(blocks)
    sample_keep = torch.zeros(len(positions), blocks.n_b, dtype=torch.uint8)
    for number, name in enumerate(names):
        sample_keep |= covers[name].mask[positions // block_q].to(torch.uint8) << number
    key_weight = torch.zeros(layout.tokens, dtype=torch.float32)
    key_weight[gathered] = 1.0
    return {
        "layout": layout,
        "patterns": names,
        "densities": tuple(densities[name] for name in names),
        "radii": radii,
        "block_q": block_q,
        "block_k": block_k,
        "order": blocks.order.int(),
        "key_order": torch.cat(key_order).int(),
        "rows": rows.int(),
        "row_ptr": row_ptr.int(),
        "indices": indices.int(),
        "samples": blocks.order[positions].int(),
        "sample_keep": sample_keep,
        "key_weight": key_weight,
    }


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
    count = min(128 if tokens >= LONG else 64, len(positions))
    edges = torch.arange(count + 1) * len(positions) // count
    jitter = (torch.arange(count, dtype=torch.float32) * _GOLDEN).frac()
    return positions[edges[:-1] + (jitter * edges.diff()).long()]


def _compress(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of bool ``[P, nQ, nK]`` masks, each different one stored once: ``(rows [P, nQ], row_ptr, indices)``."""
    distinct, which = distinct_rows(masks.flatten(0, 1))
    row, index = distinct.nonzero(as_tuple=True)
    row_ptr = torch.zeros(len(distinct) + 1, dtype=torch.int64)
    row_ptr[1:] = torch.bincount(row, minlength=len(distinct)).cumsum(0)
    return which.view(masks.shape[:2]), row_ptr, index
