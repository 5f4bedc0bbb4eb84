# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The warp group of the Hopper kernel that fetches: where its queries, keys and values lie, and how to bring them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rainfusion_compile.kernels.gpu import rows as shared
from rainfusion_compile.kernels.gpu.hopper import loads
from rainfusion_compile.kernels.gpu.hopper.tiles import find_tile
from rainfusion_compile.kernels.gpu.rows import VECTOR

extent, sampled_blocks = gluon.jit(shared.extent.fn), gluon.jit(shared.sampled_blocks.fn)
before_listed, draws_of = gluon.jit(shared.before_listed.fn), gluon.jit(shared.draws_of.fn)


@gluon.jit
def producer(
    work, q, k, v, runs, order, key_order, sampled, lists, first_run, tokens, group, q_strides, k_strides, v_strides,
    smem, bars,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, OFFSET_BITS: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, DENSE_FIRST: gl.constexpr,
    ALL_HEADS: gl.constexpr, STAGES: gl.constexpr, SELECTS: gl.constexpr, K0: gl.constexpr,
    K1: gl.constexpr,
):  # fmt: skip
    """The warp group that fetches: this tile's queries, then keys and values."""
    at, position_q, row, indices, last, own = find_tile(work, BLOCK_Q, BLOCK_K, TILE_Q, DENSE_FIRST, ALL_HEADS)
    batch, head = at
    kv_head = head // group
    q_batch, q_head, q_row = q_strides
    k_batch, k_head, k_row = k_strides
    v_batch, v_head, v_row = v_strides
    q += (batch * q_batch + head * q_head) * VECTOR
    loads.fetch_queries(q, order, position_q, tokens, q_row * VECTOR, smem[0], smem[1], bars[0], D, D0, D1, OFFSET_BITS)
    start, keys = extent(indices, last, first_run, tokens, BLOCK_K)
    blocks = gl.cdiv(tokens, BLOCK_K)
    front = 0
    if SELECTS:
        front = before_listed(sampled, row)
    tiles = gl.cdiv(keys + front * BLOCK_K, TILE_K)
    if start >= 0:
        k0, k1, v0, v1 = runs
        # In the descriptors, axes that repeat one thing have a length of 1.
        k_at = ((batch * (k_batch != 0)).to(gl.int32), (kv_head * (k_head != 0)).to(gl.int32))
        v_at = ((batch * (v_batch != 0)).to(gl.int32), (kv_head * (v_head != 0)).to(gl.int32))
        loads.copy_key_run(k0, k1, v0, v1, start, tiles, k_at, v_at, smem, bars, D0, D1, K0, K1, TILE_K, STAGES)
    else:
        k += (batch * k_batch + kv_head * k_head) * VECTOR
        v += (batch * v_batch + kv_head * v_head) * VECTOR
        samples = sampled_blocks(q, order, tokens, q_row, sampled, row)
        row_of = (
            indices, lists + own * blocks, last, front, draws_of(sampled, row), samples[1], first_run - blocks, blocks
        )  # fmt: skip
        loads.gather_keys(
            k, v, key_order, row_of, tiles, tokens, k_row * VECTOR, v_row * VECTOR, smem, bars,
            D, D0, D1, K0, K1, OFFSET_BITS, BLOCK_K, TILE_K, STAGES, SELECTS,
        )  # fmt: skip
