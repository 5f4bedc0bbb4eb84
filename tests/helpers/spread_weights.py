# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does in tests/runtime/test_spread_weights.py: all tokens, by its part of the weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sequence_parallel import FIXED, GRIDS, Found, Video, compiled, error, latents_of, ranks, seen
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from rainfusion_compile.kernels import cpu

GRID = GRIDS[0]
SPARSITY = 0.5


def columns() -> dict[str, ParallelStyle]:
    """Heads split over ranks, and put together by the last layer."""
    return {**{name: ColwiseParallel() for name in "qkv"}, "out": RowwiseParallel()}


def split_heads(model: Video, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        parallelize_module(block, mesh, columns())


def split_heads_of_prepared_inputs(model: Video, mesh: DeviceMesh) -> None:
    """Inputs are made DTensors once for a block, not once for each layer."""
    prepare = PrepareModuleInput(
        input_layouts=(Replicate(), None), desired_input_layouts=(Replicate(), None), use_local_output=True
    )
    for block in model.blocks:
        parallelize_module(block, mesh, {"": prepare, **columns()})


def split_weights(model: Video, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def split_weights_and_compile_blocks(model: Video, mesh: DeviceMesh) -> None:
    split_weights(model, mesh)
    options: dict[str, Any] = {**FIXED, "sparsity": SPARSITY}
    for block in model.blocks:
        block.compile(backend="rainfusion", options=options)


WAYS: Mapping[str, Callable[[Video, DeviceMesh], None]] = {
    way.__name__: way
    for way in (split_heads, split_heads_of_prepared_inputs, split_weights, split_weights_and_compile_blocks)
}


class PartOfTokens(nn.Module):
    """A rank attends to its own part of the tokens, taken out of a DTensor."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mesh, self.patch, self.qkv = mesh, nn.Conv3d(4, 32, 1), nn.Linear(32, 96)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.patch(latents).flatten(2).transpose(1, 2)
        x = DTensor.from_local(x, self.mesh, (Replicate(),)).redistribute(placements=(Shard(1),)).to_local()
        return F.scaled_dot_product_attention(*self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0))


def same_draws(q: Tensor, order: Tensor) -> Tensor:
    """The same sampled keys for all heads: by the bits of queries, which rounding changes, no two runs compare."""
    return torch.zeros(q.shape[:2], dtype=torch.long)


def one_way(name: str, mesh: DeviceMesh) -> Found:
    """Against what one process computes by itself, and how far that is from dense."""
    model, latents = Video().eval(), latents_of(GRID)
    with torch.no_grad():
        dense = model(latents)
    whole, *_ = seen(compiled(model, SPARSITY), latents)
    WAYS[name](model, mesh)
    torch._dynamo.reset()
    function = model if "blocks" in name else compiled(model, SPARSITY)
    out, grids, reasons = seen(function, latents)
    return Found(grids, reasons, error(out, whole), error(whole, dense))


def work(rank: int, folder: str) -> None:
    cpu.draws = same_draws
    with ranks(rank, 2, os.path.join(folder, "meeting")):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        found = {name: one_way(name, mesh) for name in WAYS}
        part = compiled(PartOfTokens(mesh), SPARSITY)
        found["part of tokens"] = Found(*seen(part, latents_of((4, 10, 12)))[1:])
        torch.save(found, os.path.join(folder, str(rank)))
