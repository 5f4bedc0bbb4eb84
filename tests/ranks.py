# SPDX-License-Identifier: Apache-2.0
"""What one of two processes does in tests/test_contents.py; imports little, for each process starts anew."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from compared import carried_by, shown_by
from torch import Tensor

from rainfusion_compile.passes.provenance.known_tokens import CarriedDim
from rainfusion_compile.runtime.carry import attach
from rainfusion_compile.runtime.outside_knowledge import PositionInputs


def sent(rank: int, tensor: Tensor) -> None:
    """From the first to the second."""
    if rank == 0:
        dist.send(tensor, 1)
    else:
        dist.recv(tensor, 0)


def scattered(rank: int, tensor: Tensor) -> None:
    dist.scatter(tensor, [tensor.clone()] * 2 if rank == 0 else None)


COLLECTIVES = {
    "broadcast": lambda rank, tensor: dist.broadcast(tensor, 0),
    "all_reduce": lambda rank, tensor: dist.all_reduce(tensor if rank == 0 else tensor.zero_().data),
    "recv": sent,
    "scatter": scattered,
}


def in_place_of(grids: tuple[Any, Any], tables: tuple[Tensor, Tensor], rank: int, file: str) -> None:
    """Both ranks go from the first table to the second, which the first rank hands to the other."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        for name, collective in COLLECTIVES.items():
            inputs, table = PositionInputs(min_tokens=4), tables[0].clone()
            assert _grid(shown_by([table], inputs)) == grids[0]
            tokens = torch.arange(24.0).view(1, 12, 2)
            attach([tokens], ((None, CarriedDim((2, 2, 3), (0, 0), 0), None),), ())
            assert _grid(carried_by([tokens])) == (2, 2, 3)
            if rank == 0:
                table.copy_(tables[1])
                tokens.copy_(tokens.flip(1).clone())
            collective(rank, table)
            collective(rank, tokens)
            assert torch.equal(table, tables[1]), name
            assert _grid(shown_by([table], inputs)) == grids[1], name
            assert carried_by([tokens]) == (None,), name
    finally:
        dist.destroy_process_group()


def _grid(carried: Any) -> Any:
    return next((dim.grid for dim in carried[0] or () if dim), None)
