# SPDX-License-Identifier: Apache-2.0
"""Where it was lost what the tokens of a dimension are."""

from __future__ import annotations

from rainfusion_compile.passes.provenance.axes import Axis, Dim, find, resolve


def lost_axes(dim: Dim) -> dict[Axis, str]:
    """The axes below a dim of which nothing is known, each with the node or input of the graph that it came out of."""
    found: dict[Axis, str] = {}
    for axis in map(find, resolve(dim)):
        below: tuple[Dim, ...] = axis.parts
        if axis.cut is not None:
            below = ((axis.cut.whole,),)
        elif axis.digit is not None:
            below = ((axis.digit[0],),)
        for part in below:
            found |= lost_axes(part)
        known = axis.role or axis.coordinate or axis.permuted or any(not source.rank for source, _ in axis.sources)
        if not below and axis.size > 1 and (axis.lost or not known):
            found[axis] = axis.origin or "an operator that keeps no axes"
    return found
