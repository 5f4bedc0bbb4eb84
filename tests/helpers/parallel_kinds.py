# SPDX-License-Identifier: Apache-2.0
"""What each process does in tests/runtime/test_parallel_kinds.py: kinds of parallelism beside that of two ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_ranks
from sequence_parallel import (
    FIXED,
    WIDTH,
    Block,
    Found,
    Grid,
    compiled,
    diffusers,
    error,
    exchanged,
    gathered,
    latents_of,
    of_one_process,
    part,
    ranks,
    seen,
)
from torch import Tensor, nn

import rainfusion_compile

GRID: Grid = (5, 8, 12)  # four ranks split it inside a frame
TEXT = 8


class Joint(nn.Module):
    """A text before the video, both split as one sequence; gathered again after each of two attentions.

    `mine`: which part this rank takes, by default its own.
    """

    def __init__(self, group: Any, mine: Callable[[], int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.group, self.mine = group, mine or dist.get_rank
        self.patch, self.text = nn.Conv3d(4, WIDTH, 1), nn.Linear(4, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([self.text(text), self.patch(latents).flatten(2).transpose(1, 2)], 1)
        for layer in self.layers:
            x = x + self.attention(layer, x)
        return x

    def attention(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.group is None:
            q, k, v = (one.transpose(1, 2) for one in layer(x).unflatten(-1, (3, 4, 16)).unbind(2))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x.chunk(dist.get_world_size(), 1)[self.mine()]
        q, k, v = (exchanged(one, self.group) for one in layer(x).unflatten(-1, (3, 4, 16)).unbind(2))
        y = F.scaled_dot_product_attention(q, k, v)
        heads = gathered(y.transpose(0, 1).contiguous().transpose(0, 1), self.group)
        return heads.transpose(1, 2).flatten(2)


def joint(mine: Callable[[], int] | None = None, text: int = TEXT) -> Found:
    """Against one process that does the same."""
    inputs = latents_of(GRID), torch.randn(2, text, 4, generator=torch.Generator().manual_seed(1))
    out, grids, reasons = seen(compiled(Joint(dist.group.WORLD, mine), 0.5), *inputs)
    whole, *_ = of_one_process(seen, compiled(Joint(None), 0.5), *inputs)
    with torch.no_grad():
        dense = Joint(None)(*inputs)
    return Found(grids, reasons, error(out, whole), error(whole, dense))


def tables() -> list[Found]:
    """A block compiled by itself, whose part of the tokens and of the table are cut off outside of it."""
    found = []
    block, shared = Block(None, 4), Block(dist.group.WORLD, 4)
    shared.load_state_dict(block.state_dict())
    t, h, w = GRID
    steps = torch.meshgrid(*map(torch.arange, GRID), indexing="ij")
    speeds = 30 ** (-torch.arange(8) / 8)
    angles = torch.cat([one.flatten()[:, None] * speeds[:n] for one, n in zip(steps, (4, 2, 2), strict=True)], 1)[
        :, None
    ]
    x = torch.randn(2, t * h * w, WIDTH, generator=torch.Generator().manual_seed(1))
    for copied in (False, True):
        mine = part(angles, 0)
        whole, *_ = of_one_process(seen, compiled(block, 0.5), x, angles)
        out, grids, reasons = seen(compiled(shared, 0.5), part(x, 1).contiguous(), mine.clone() if copied else mine)
        found.append(Found(grids, reasons, error(out, part(whole, 1)), error(whole, block(x, angles).detach())))
    return found


def exchanged_by_lists(x: Tensor, scatter: int, gather: int) -> Tensor:
    """Runs of one dim go out, and what comes in is put together along another: no compiler traces this form."""
    sent = [run.contiguous() for run in x.chunk(dist.get_world_size(), scatter)]
    received = [torch.empty_like(run) for run in sent]
    dist.all_to_all(received, sent)
    return torch.cat(received, gather)


class Lists(nn.Module):
    """One attention of all tokens, of which a rank has a part, or of all of them on one process."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.group, self.patch, self.qkv = group, nn.Conv3d(4, WIDTH, 1), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.patch(latents).flatten(2).transpose(1, 2)
        x = x if self.group is None else part(x, 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).unbind(2)
        if self.group is not None:
            q, k, v = (exchanged_by_lists(one, 2, 1) for one in (q, k, v))
        y = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v))).transpose(1, 2)
        return y if self.group is None else exchanged_by_lists(y, 1, 2)


def lists(told: bool) -> Found:
    """Against one process; the grid is `told` of attention outside all graphs, or is not."""
    whole, *_ = of_one_process(seen, compiled(Lists(None), 0.5), latents_of(GRID))
    with torch.no_grad():
        dense = Lists(None)(latents_of(GRID))
    function = compiled(Lists(dist.group.WORLD), 0.5)
    options: dict[str, Any] = {**FIXED, "sparsity": 0.5}
    with rainfusion_compile.sparse_eager_attention(GRID, **options) if told else contextlib.nullcontext():
        out, grids, reasons = seen(function, latents_of(GRID))
    return Found(grids, reasons, error(out, part(whole if told else dense, 1)), error(whole, dense))


def of_two(rank: int, folder: str) -> None:
    with ranks(rank, 2, os.path.join(folder, "meeting")):
        found: dict[str, Any] = {
            "joint": joint(),
            "joint, the other part": joint(lambda: 1 - dist.get_rank(), TEXT + 2),
            "joint, one part": joint(lambda: 0, TEXT + 4),
            "tables": tables(),
        }
        if torch.__version__ >= "2.13":  # gloo of torch 2.11 has no such form
            found["lists"] = [lists(told) for told in (False, True)]
        torch.save(found, os.path.join(folder, str(rank)))


def of_four(rank: int, folder: str) -> None:
    with ranks(rank, 4, os.path.join(folder, "meeting")):
        found: dict[str, Any] = {"joint": joint(), "diffusers": diffusers(0.5, GRID)}
        torch.save(found, os.path.join(folder, str(rank)))


def run(work: Callable[..., None], folder: str, count: int) -> Sequence[dict[str, Any]]:
    """What each of so many processes found."""
    run_ranks(work, lambda rank: (rank, folder), count=count, seconds=600)
    return [torch.load(os.path.join(folder, str(rank)), weights_only=False) for rank in range(count)]
