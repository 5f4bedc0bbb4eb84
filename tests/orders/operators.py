# SPDX-License-Identifier: Apache-2.0
"""Operators that no pass has a rule for: they reorder a dim of a tensor, or do not. Functional, in place, and `out`."""

from __future__ import annotations

import torch
from torch import Tensor


def _ordered(x: Tensor, dim: int, order: list[int]) -> Tensor:
    return x.index_select(dim, torch.tensor(order, device=x.device)).clone()


@torch.library.custom_op("orders::pick", mutates_args=())
def pick(x: Tensor, dim: int, order: list[int]) -> Tensor:
    return _ordered(x, dim, order)


@pick.register_fake
def _(x: Tensor, dim: int, order: list[int]) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("orders::pick_", mutates_args={"x"})
def pick_(x: Tensor, dim: int, order: list[int]) -> None:
    x.copy_(_ordered(x, dim, order))


@pick_.register_fake
def _(x: Tensor, dim: int, order: list[int]) -> None:
    return None


@torch.library.custom_op("orders::pick_out", mutates_args={"out"})
def pick_out(x: Tensor, dim: int, order: list[int], out: Tensor) -> None:
    out.copy_(_ordered(x, dim, order))


@pick_out.register_fake
def _(x: Tensor, dim: int, order: list[int], out: Tensor) -> None:
    return None


@torch.library.custom_op("orders::scramble", mutates_args=())
def scramble(x: Tensor, a: int, b: int) -> Tensor:
    """Dims `a` and `b` exchanged in memory, sizes kept."""
    return x.transpose(a, b).reshape(x.shape).clone()


@scramble.register_fake
def _(x: Tensor, a: int, b: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def near(conv: torch.nn.Module) -> torch.nn.Module:
    """A convolution whose tokens come from their own place, but for a thousandth from their neighbours."""
    weight = conv.weight.data
    middle = tuple(size // 2 for size in weight.shape[2:])
    own = weight[(slice(None), slice(None), *middle)].clone()
    weight.mul_(1e-3)[(slice(None), slice(None), *middle)] = own
    return conv
