# SPDX-License-Identifier: Apache-2.0
"""Dims in another order than the axes that they hold: turned round, or in an order that nobody knows.

Both are axes of their own, marked as `permuted`. An axis that was turned round is known again once it is turned back,
unless an operator has paired it with indices in another order meanwhile.
"""

from __future__ import annotations

from rainfusion_compile.passes.provenance.axes import product, resolve
from rainfusion_compile.passes.provenance.axis import Axis, Dim, size_of


def reordered(size: int) -> Dim:
    """A dim in an unknown order."""
    return () if size == 1 else (Axis(size, permuted=True),)


def is_permuted(dim: Dim) -> bool:
    """Whether the order of a dim is unknown."""
    return any(axis.permuted for axis in resolve(dim))


def permuted(dim: Dim) -> Dim:
    """A dim in an unknown order; the same one again for the same dim."""
    if size_of(dim) == 1 or is_permuted(dim):
        return dim
    return (_reordered(product(resolve(dim))),)


def flipped(dim: Dim) -> Dim:
    """A dim turned round."""
    if size_of(dim) == 1:
        return dim
    whole = product(resolve(dim))
    if whole.mirror is None:
        mirror = Axis(whole.size, permuted=True)
        whole.mirror, mirror.mirror = mirror, whole
    return (whole.mirror,)


def mixed(dim: Dim, others: list[Axis]) -> Dim:
    """A permuted dim whose indices an operator pairs with others: if these tell an order, it is turned back no more."""
    if not any(axis.known or axis.permuted for axis in others if axis not in dim):
        return dim
    taken = [axis.mirror or axis.digit or axis.cut for axis in dim]
    return tuple(_reordered(axis) if axis.permuted and some else axis for axis, some in zip(dim, taken, strict=True))


def _reordered(axis: Axis) -> Axis:
    axis.reordered = axis.reordered or Axis(axis.size, permuted=True, lost=axis.lost)
    return axis.reordered
