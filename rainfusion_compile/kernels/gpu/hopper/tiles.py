# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Which tile of queries a program computes, and which key blocks its row lists."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rainfusion_compile.kernels.gpu import rows as shared
from rainfusion_compile.kernels.gpu.hopper.loads import bounded

dense_heads_first = gluon.jit(shared.dense_heads_first.fn)


@gluon.constexpr_function
def every_warp(length):
    """A vector of which each warp has all: it needs no shared memory to sum over it."""
    return gl.BlockedLayout([length // 32], [32], [4], [0])


@gluon.constexpr_function
def product_layout(width, int8=False):
    """Accumulator of a warp group's [64, width] product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 32 if int8 else 16])


@gluon.jit
def find_tile(
    work, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, DENSE_FIRST: gl.constexpr,
    ALL_HEADS: gl.constexpr,
):  # fmt: skip
    """This program's tile: (batch, head), the position of its first query, its row and the row's key blocks.

    Every warp group finds out by itself: whatever one told the others would go through shared memory.
    """
    choice, rows, row_ptr, indices, patterns, batch_heads, heads, query_blocks, query_tiles, table_rows, listed = work
    batch_head = gl.program_id(0) // query_tiles
    if DENSE_FIRST:
        each = gl.arange(0, ALL_HEADS, layout=every_warp(ALL_HEADS))
        batch_head = dense_heads_first(choice, patterns, batch_head, batch_heads, each)
    # The last rows and the first ones (text, first frame) are the long ones: start with them.
    tile_q = (gl.program_id(0) % query_tiles + query_tiles - query_tiles // 8) % query_tiles
    pattern = bounded(gl.load(choice + batch_head), patterns + 1)
    row = bounded(gl.load(rows + pattern * query_blocks + tile_q * TILE_Q // BLOCK_Q), table_rows)
    begin = bounded(gl.load(row_ptr + row), listed)
    last = gl.maximum(bounded(gl.load(row_ptr + row + 1) - 1, listed) - begin, 0)
    at = ((batch_head // heads).to(gl.int64), (batch_head % heads).to(gl.int64))
    lists_row = batch_head.to(gl.int64) * query_blocks + tile_q * TILE_Q // BLOCK_Q
    return at, tile_q * TILE_Q, row, indices + begin, last, lists_row
