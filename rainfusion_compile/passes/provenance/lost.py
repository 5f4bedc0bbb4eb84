# SPDX-License-Identifier: Apache-2.0
"""Where it was lost what the tokens of a dimension are."""

from __future__ import annotations

from rainfusion_compile.passes.provenance.axes import origins, resolve
from rainfusion_compile.passes.provenance.axis import Axis, Dim


def lost_axes(dim: Dim) -> dict[Axis, str]:
    """The axes below a dim of which nothing is known, each with the node or input of the graph that it came out of."""
    below = dict.fromkeys(one for axis in resolve(dim) for one in origins(axis))
    atoms = [axis for axis in below if axis.size > 1 and not (axis.bound or axis.parts or axis.digit or axis.cut)]
    return {axis: axis.origin or "an operator that keeps no axes" for axis in atoms if axis.lost or not _tells(axis)}


def _tells(axis: Axis) -> bool:
    return bool(axis.role or axis.coordinate or axis.permuted) or any(not source.rank for source, _ in axis.sources)
