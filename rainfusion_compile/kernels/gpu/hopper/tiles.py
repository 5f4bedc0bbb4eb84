# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Which tile a program of the Hopper kernel computes, and which keys belong to it.

Every warp group finds out by itself: whatever one told the others would go through shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def bounded(index, length):
    """As :func:`rainfusion_compile.kernels.gpu.rows.bounded`."""
    last = (length - 1).to(gl.uint32, bitcast=True)
    return gl.minimum(index.to(gl.uint32, bitcast=True), last).to(gl.int32, bitcast=True)


@gluon.constexpr_function
def every_warp(length):
    """A vector of which each warp has all: it needs no shared memory to sum over it."""
    return gl.BlockedLayout([length // 32], [32], [4], [0])


@gluon.jit
def _dense_first(choice, dense, rank, batch_heads, ALL_HEADS: gl.constexpr):
    """The (batch, head) of this rank when the heads that stayed dense come first."""
    each = gl.arange(0, ALL_HEADS, layout=every_warp(ALL_HEADS))
    real = each < batch_heads
    is_dense = (gl.load(choice + each, mask=real, other=-1) == dense).to(gl.int32)
    before = gl.associative_scan(is_dense, 0, _add) - is_dense  # dense heads before this one
    place = gl.where(is_dense != 0, before, gl.sum(is_dense, 0) + each - before)
    return gl.sum(gl.where(real & (place == rank), each, 0), 0)


@gluon.jit
def blocks_below(indices, blocks, bound):
    """How many of a row's key blocks have a number below bound."""
    CHUNK: gl.constexpr = 1024
    offsets = gl.arange(0, CHUNK, layout=every_warp(CHUNK))
    count = 0
    for start in range(0, blocks, CHUNK):
        block = gl.load(indices + start + offsets, mask=start + offsets < blocks, other=bound)
        count += gl.sum((block < bound).to(gl.int32), 0)
    return count


@gluon.jit
def find_tile(
    work, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, DENSE_FIRST: gl.constexpr,
    ALL_HEADS: gl.constexpr,
):  # fmt: skip
    """This program's tile: (batch, head), the position of its first query, and its row of key blocks."""
    choice, rows, row_ptr, indices, patterns, batch_heads, heads, query_blocks, query_tiles, table_rows, listed = work
    batch_head = gl.program_id(0) // query_tiles
    if DENSE_FIRST:
        batch_head = _dense_first(choice, patterns, batch_head, batch_heads, ALL_HEADS)
    # The last rows and the first ones (text, first frame) are the long ones: start with them.
    tile_q = (gl.program_id(0) % query_tiles + query_tiles - query_tiles // 8) % query_tiles
    pattern = bounded(gl.load(choice + batch_head), patterns + 1)
    row = bounded(gl.load(rows + pattern * query_blocks + tile_q * TILE_Q // BLOCK_Q), table_rows)
    begin = bounded(gl.load(row_ptr + row), listed)
    last = gl.maximum(bounded(gl.load(row_ptr + row + 1) - 1, listed) - begin, 0)
    at = ((batch_head // heads).to(gl.int64), (batch_head % heads).to(gl.int64))
    return at, tile_q * TILE_Q, indices + begin, last


@gluon.jit
def extent(indices, last, first_run, tokens, BLOCK_K: gl.constexpr):
    """Whether a row's blocks are runs, and how many keys it has."""
    # The last of the blocks of `order`, and of the runs that follow them, may be cut short.
    end = bounded(gl.load(indices + last), first_run + gl.cdiv(tokens, BLOCK_K))
    is_run = end >= first_run
    left = tokens - (end - gl.where(is_run, first_run, first_run - gl.cdiv(tokens, BLOCK_K))) * BLOCK_K
    return is_run, last * BLOCK_K + gl.minimum(BLOCK_K, left)
