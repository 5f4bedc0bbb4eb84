# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Queries and keys as 8-bit integers, whose products take half as long, in the Hopper kernel.

Products of integers come as integers. Converting them would take a third of what was won, so sums begin with ZERO_BITS
instead of 0: the bits of a float whose lowest bit means 1. What is added to it as an integer is added to the float. All
scores are ZERO higher then, which the softmax takes off with a row's reference.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rainfusion_compile.kernels.gpu.hopper.loads import REINTERPRETS, shared_layout
from rainfusion_compile.kernels.gpu.hopper.tiles import product_layout
from rainfusion_compile.kernels.gpu.int8_keys import LARGEST as _LARGEST
from rainfusion_compile.kernels.gpu.int8_keys import ZERO as _ZERO

LARGEST = gl.constexpr(_LARGEST)
ZERO, ZERO_BITS = gl.constexpr(_ZERO), gl.constexpr(0x4B400000)  # sums of 128 products stay below 2**22


@gluon.jit
def as_int8(smem):
    """Rows of 16-bit elements in shared memory as rows of twice as many of 8 bits."""
    KEYS: gl.constexpr = smem.shape[0]
    WIDTH: gl.constexpr = 2 * smem.shape[1]
    LAYOUT: gl.constexpr = shared_layout(gl.int8, KEYS, WIDTH)
    if REINTERPRETS:
        return smem.reinterpret(gl.int8, [KEYS, WIDTH], LAYOUT)
    else:  # Triton compiles what follows a return
        return smem._reinterpret(gl.int8, [KEYS, WIDTH], LAYOUT)


@gluon.jit
def as_floats(s, MASK_KIND: gl.constexpr):
    """Sums that began with ZERO_BITS as floats, ZERO too high, but where something is to be added to true scores."""
    s = s.to(gl.float32, bitcast=True)
    if MASK_KIND == 2:
        s -= ZERO
    return s


@gluon.jit
def round_queries(q, rounded, WIDTH: gl.constexpr):
    """Write queries [64, WIDTH] as integers, by one scale for all, which is returned."""
    x = q.load(product_layout(WIDTH)).to(gl.float32)
    size = gl.abs(x)
    largest = gl.max(gl.max(gl.where(size < float("inf"), size, 0.0), 1), 0)  # one row's must not be all rows' affair
    scale = gl.where(largest > 0.0, largest / LARGEST, 1.0)
    rounded.store((x / scale + ZERO - ZERO).to(gl.int8))  # floats around ZERO are whole, so adding it rounds
    return scale


@gluon.jit
def broken_rows(q, ROW: gl.constexpr, WIDTH: gl.constexpr):
    """NaN for the queries that have a number that is none, which no integer is, 0 for the others: [64]."""
    x = q.load(product_layout(WIDTH)).to(gl.float32)
    return gl.convert_layout(gl.sum(x - x, 1), ROW)
