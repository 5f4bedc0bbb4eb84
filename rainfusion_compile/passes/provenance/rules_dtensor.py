# SPDX-License-Identifier: Apache-2.0
"""Provenance of DTensors. One stands for the tensor that all ranks have together, and functions of it for that of all.

So only what makes a DTensor of a rank's own tensor, or takes that out again, needs a rule.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from rainfusion_compile.passes.graph.nodes import example_of
from rainfusion_compile.passes.provenance.axis import Dims, size_of
from rainfusion_compile.passes.provenance.rules import fresh_dims

# "prim_" stands before these in graphs of some versions of torch
_WHOLE = ("redistribute", "full_tensor")  # of the same tensor of all ranks
_BETWEEN = ("from_local", "to_local", *_WHOLE)


def is_between_ranks(node: fx.Node, name: str) -> bool:
    """Whether a node makes a DTensor of a rank's own tensor, takes that out again, or only hands it on to others."""
    torchs = node.op == "call_method" or (getattr(node.target, "__module__", None) or "").startswith("torch.")
    known = torchs and name.removeprefix("prim_") in _BETWEEN
    return known and bool(node.args) and _placements(node) is not None


def between_ranks(node: fx.Node, name: str, dims: Dims, shape: tuple[int, ...]) -> Dims:
    """The dims of what it makes, in a shape, of what has `dims`: the same but for those that are split over ranks."""
    if name.removeprefix("prim_") in _WHOLE:
        return dims
    placements = _placements(node) or ()
    known = all(placement.is_shard() or placement.is_replicate() for placement in placements)
    sharded = {placement.dim % len(shape) for placement in placements if placement.is_shard()}
    split = sharded if known else set(range(len(shape)))
    lost = fresh_dims(shape, lost=f"{name} ({', '.join(map(str, placements))})")
    alike = (at not in split and size_of(dim) == size for at, (dim, size) in enumerate(zip(dims, shape, strict=True)))
    return tuple(dim if same else other for same, dim, other in zip(alike, dims, lost, strict=True))


def _placements(node: fx.Node) -> tuple[Any, ...] | None:
    """Where the DTensor is that a node makes or takes."""
    source = node.args[0]
    values: list[Any] = [example_of(node), example_of(source) if isinstance(source, fx.Node) else None]
    return next((value.placements for value in values if hasattr(value, "placements")), None)
