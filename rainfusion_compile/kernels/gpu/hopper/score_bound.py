# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Whether scores can grow too large for weights relative to the reference that a row of the Hopper kernel begins with.

A score is at most the length of its query times that of the longest key (Cauchy and Schwarz). Where this is not too far
above the largest score of a row's first tile, weights relative to that one stay in range all along: then the softmax
need not look at them again. bfloat16 has the range of float32, so it is so for most models; float16 has not.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rainfusion_compile.kernels.gpu.hopper.softmax import references_of
from rainfusion_compile.kernels.gpu.hopper.tiles import every_warp, product_layout
from rainfusion_compile.kernels.gpu.key_norms import SPLITS as _SPLITS

SPLITS = gl.constexpr(_SPLITS)


@gluon.constexpr_function
def most(dtype):
    """How far above its reference a score may be, in base-2 units. float16 holds weights below 2**16; of bfloat16 and
    float32 it is sums of weights, and of values times weights, that may not overflow."""
    return 14.0 if dtype == gl.float16 else 64.0


@gluon.jit
def _squares(q, ROW: gl.constexpr, WIDTH: gl.constexpr):
    x = q.load(product_layout(WIDTH)).to(gl.float32)
    return gl.convert_layout(gl.sum(x * x, 1), ROW)


@gluon.jit
def scores_are_bounded(q0, q1, state, unit, key_norms, D0: gl.constexpr, D1: gl.constexpr):
    """Whether no score of queries [64, D0] and [64, D1] in shared memory can be too far above its row's reference.

    key_norms: squared lengths, of which one is that of the head's longest key. Rows whose scores are no numbers do not
    count, as whatever is computed for them is none; with rows that saw no key in the first tile it is not so.
    """
    ROW: gl.constexpr = gl.SliceLayout(1, product_layout(D0))
    squares = _squares(q0, ROW, D0)
    if D1 > 0:
        squares += _squares(q1, ROW, D1)
    longest = gl.max(gl.load(key_norms + gl.arange(0, SPLITS, layout=every_warp(SPLITS))), 0)
    above = gl.sqrt(squares * longest) * unit - references_of(state, ROW)
    return gl.max(above, 0) <= most(q0.dtype)  # as integers, ptxas would lay out the loops that follow badly
