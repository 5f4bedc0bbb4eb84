# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Block-sparse attention in Triton: flash-style online softmax over the key blocks that a head's pattern keeps.

One program computes one tile of query rows. The key blocks its row keeps, laid end to end, are its *kept keys*; the
program walks them in tiles that are parts of a block. Every token is read and written through
`order` and `key_order`, so no tensor is ever copied into computing order. The hot loop knows no masks: it ends before
the first tile that is not full or, given a key mask, that holds a position which the mask touches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rainfusion_compile.kernels.gpu.key_mask import CHUNK, listed_samples, masked_scores, touched_blocks, touched_tiles
from rainfusion_compile.kernels.gpu.rows import (
    RUNTIME_ARGS,
    VECTOR,
    before_listed,
    bounded,
    dense_heads_first,
    extent,
    sampled_blocks,
    selected_keys,
)


@triton.jit
def load_rows(base, offsets, offs_d, WIDTH: tl.constexpr):
    """Rows base[offsets[i] + offs_d[j]]; columns from WIDTH on read 0."""
    at = base + offsets[:, None] + offs_d[None, :]
    if offs_d.shape[0] <= WIDTH:
        return tl.load(at)
    else:
        return tl.load(at, mask=offs_d[None, :] < WIDTH, other=0.0)


@triton.jit
def scores(q0, q1, k, k_rows, offs_d0, offs_d1, D: tl.constexpr, PRECISION: tl.constexpr):
    """Unscaled float32 scores [queries, keys]; head_dim comes in one or two chunks."""
    k0 = load_rows(k, k_rows, offs_d0, D)
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if q1 is not None:
        k1 = load_rows(k + offs_d0.shape[0], k_rows, offs_d1, D - offs_d0.shape[0])
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    return s


@triton.jit
def _kept_keys(
    indices, own, tile, last, count, shift, front, sampled, row, first_run, blocks, offs_k,
    BLOCK_K: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Where in `key_order` the keys of a tile of a row's kept keys stand; past the row's end, in its last block."""
    at = tile * TILE_K - front * BLOCK_K
    place = tl.maximum(at, 0) // BLOCK_K
    block = tl.load(indices + tl.minimum(place, last))
    block = bounded(block + tl.where((front == 0) & (place < count), shift, 0), first_run + blocks)
    keys = block * BLOCK_K + tl.maximum(at, 0) % BLOCK_K + offs_k
    if own is not None:  # some candidates select blocks
        some = offs_k + at < 0
        of_order = first_run - blocks
        chosen = selected_keys(own, tile * TILE_K + offs_k, some, shift, sampled, row, of_order, blocks, BLOCK_K)
        keys = tl.where(some, bounded(chosen, (first_run + blocks) * BLOCK_K), keys)
    return keys


@triton.jit
def weighed(s, unit, top, GUARD: tl.constexpr):
    """Weights of a tile of scores times `unit` (in base-2 units), the factor for earlier sums, the running maximum."""
    new_top = tl.maximum(top, tl.max(s, 1) * unit)
    shift = new_top
    if GUARD:
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no visible key yet
    return tl.exp2(s * unit - shift[:, None]), tl.exp2(top - shift), new_top


@triton.jit
def hide(s, visible, mask, rows_k, stride_ms, MASK_KIND: tl.constexpr):
    """Scores in base-2 units of a tile that is not full or that the key mask touches."""
    if MASK_KIND != 0:
        value = tl.load(mask + rows_k.to(tl.int64) * stride_ms)
        s, visible = masked_scores(s, visible, value, MASK_KIND)
    return tl.where(visible[None, :], s, float("-inf"))


@triton.jit
def _absorb(
    s, unit, v, rows_k, stride_vs, top, total, acc0, acc1, offs_d0, offs_d1,
    D: tl.constexpr, PRECISION: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """One tile of scores and its values into the running maximum, sum and weighted sums of each row."""
    p, fade, top = weighed(s, unit, top, GUARD)
    total = total * fade + tl.sum(p, 1)
    p = p.to(v.dtype.element_ty)
    rows_v = rows_k * stride_vs * VECTOR
    v0 = load_rows(v, rows_v, offs_d0, D)
    acc0 = tl.dot(p, v0, acc0 * fade[:, None], input_precision=PRECISION)
    if offs_d1 is not None:
        v1 = load_rows(v + offs_d0.shape[0], rows_v, offs_d1, D - offs_d0.shape[0])
        acc1 = tl.dot(p, v1, acc1 * fade[:, None], input_precision=PRECISION)
    return top, total, acc0, acc1


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def attention_kernel(
    q, k, v, out, choice, order, key_order, rows, row_ptr, indices, sampled, weight, lists, mask, touched,
    patterns, batch_heads, heads, group, tokens, first_run, query_blocks, query_tiles, table_rows, listed, scale_log2,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_mb, stride_mh, stride_ms, stride_fb, stride_fh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, OFFSET: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, MASK_KIND: tl.constexpr,
    DENSE_FIRST: tl.constexpr, ALL_HEADS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: one tile of query rows of one head. Strides of q, k, v and out count VECTOR elements."""
    # Heads one after the other, so that programs that run together share a head's keys and values in L2.
    batch_head = tl.program_id(0) // query_tiles
    if DENSE_FIRST:
        batch_head = dense_heads_first(choice, patterns, batch_head, batch_heads, tl.arange(0, ALL_HEADS))
    # The last rows and the first ones (text, first frame) are the long ones: start with them.
    tile_q = (tl.program_id(0) % query_tiles + query_tiles - query_tiles // 8) % query_tiles
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    kv_head = head // group
    q += (batch * stride_qb + head * stride_qh) * VECTOR
    k += (batch * stride_kb + kv_head * stride_kh) * VECTOR
    v += (batch * stride_vb + kv_head * stride_vh) * VECTOR
    out += (batch * stride_ob + head * stride_oh) * VECTOR

    pattern = bounded(tl.load(choice + batch_head), patterns + 1)
    row = bounded(tl.load(rows + pattern * query_blocks + tile_q * TILE_Q // BLOCK_Q), table_rows)
    begin = bounded(tl.load(row_ptr + row), listed)
    last = tl.maximum(bounded(tl.load(row_ptr + row + 1) - 1, listed) - begin, 0)
    indices += begin
    blocks = tl.cdiv(tokens, BLOCK_K)
    front = before_listed(sampled, row)
    own = lists
    if lists is not None:
        query_block = tile_q * TILE_Q // BLOCK_Q
        own += (batch_head.to(tl.int64) * query_blocks + query_block) * blocks
    _, keys = extent(indices, last, first_run, tokens, BLOCK_K)
    keys += front * BLOCK_K
    count, shift = sampled_blocks(q, order, tokens, stride_qs, sampled, row)
    weight = tl.load(weight + row)
    samples_end = count * BLOCK_K // TILE_K  # the tile after the samples
    tiles = tl.cdiv(keys, TILE_K)
    full = keys // TILE_K  # tiles for the hot loop
    if MASK_KIND != 0:
        touched += batch * stride_fb + head * stride_fh
        samples = listed_samples(indices, last, front, sampled, row, first_run - blocks)
        each = tl.arange(0, CHUNK)
        clear_samples, _ = touched_blocks(indices, 0, samples, touched, shift, first_run + blocks, each)
        rest = touched_blocks(indices, samples, last + 1, touched, 0, first_run + blocks, each)
        first, until, rest_begin, rest_end = touched_tiles(
            touched, clear_samples, rest, samples, front, sampled, row, keys, first_run - blocks, BLOCK_K, TILE_K
        )
        mask += batch * stride_mb + head * stride_mh

    offs_k = tl.arange(0, TILE_K)
    offs_d0 = tl.arange(0, D0)
    offs_d1 = None
    position_q = tile_q * TILE_Q + tl.arange(0, TILE_Q)
    rows_q = bounded(tl.load(order + tl.minimum(position_q, tokens - 1)), tokens).to(OFFSET)
    q0 = load_rows(q, rows_q * stride_qs * VECTOR, offs_d0, D)
    q1 = None
    acc0 = tl.zeros([TILE_Q, D0], tl.float32)
    acc1 = acc0  # not used without a second chunk
    if D1 > 0:
        offs_d1 = tl.arange(0, D1)
        q1 = load_rows(q + D0, rows_q * stride_qs * VECTOR, offs_d1, D - D0)
        acc1 = tl.zeros([TILE_Q, D1], tl.float32)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)  # running maximum, in base-2 units
    total = tl.zeros([TILE_Q], tl.float32)

    # Places of keys are found two tiles ahead and tokens one, so that no load waits for another in its own step and
    # those of K and V can be pipelined.
    token = tl.load(
        key_order + _kept_keys(indices, own, 0, last, count, shift, front, sampled, row, first_run, blocks, offs_k,
                               BLOCK_K, TILE_K)
    )  # fmt: skip
    at = _kept_keys(
        indices, own, 1, last, count, shift, front, sampled, row, first_run, blocks, offs_k, BLOCK_K, TILE_K
    )
    # What the key mask cannot touch, then what it may: of a row's first tiles, then of the others. Then what is left.
    begin = tl.full([], 0, tl.int32)
    for part in tl.static_range(3 if MASK_KIND != 0 else 1):
        hot = full
        end = tiles
        if MASK_KIND != 0 and part == 0:
            hot = first
            end = until
        if MASK_KIND != 0 and part == 1:
            hot = tl.minimum(rest_begin, full)
            end = rest_end
        hot = tl.maximum(hot, begin)
        end = tl.maximum(end, hot)
        for tile in tl.range(begin, hot, num_stages=STAGES):
            rows_k = bounded(token, tokens).to(OFFSET)
            s = scores(q0, q1, k, rows_k * stride_ks * VECTOR, offs_d0, offs_d1, D, PRECISION)
            top += tl.where(tile == samples_end, weight, 0.0)  # all that was read so far stands for more
            top, total, acc0, acc1 = _absorb(
                s, scale_log2, v, rows_k, stride_vs, top, total, acc0, acc1, offs_d0, offs_d1, D, PRECISION, False
            )
            token = tl.load(key_order + at)
            at = _kept_keys(
                indices, own, tile + 2, last, count, shift, front, sampled, row, first_run, blocks, offs_k, BLOCK_K,
                TILE_K,
            )  # fmt: skip
        for tile in tl.range(hot, end, num_stages=STAGES):
            rows_k = bounded(token, tokens).to(OFFSET)
            s = scores(q0, q1, k, rows_k * stride_ks * VECTOR, offs_d0, offs_d1, D, PRECISION) * scale_log2
            s = hide(s, tile * TILE_K + offs_k < keys, mask, rows_k, stride_ms, MASK_KIND)
            top += tl.where(tile == samples_end, weight, 0.0)
            top, total, acc0, acc1 = _absorb(
                s, 1.0, v, rows_k, stride_vs, top, total, acc0, acc1, offs_d0, offs_d1, D, PRECISION, MASK_KIND != 0
            )
            token = tl.load(key_order + at)
            at = _kept_keys(
                indices, own, tile + 2, last, count, shift, front, sampled, row, first_run, blocks, offs_k, BLOCK_K,
                TILE_K,
            )  # fmt: skip
        begin = end

    if MASK_KIND != 0:
        total = tl.where(total == 0.0, 1.0, total)  # a row that sees no key gives 0
    norm = (1.0 / total)[:, None]
    to = out + (rows_q * stride_os * VECTOR)[:, None]
    real = (position_q < tokens)[:, None]
    tl.store(to + offs_d0[None, :], (acc0 * norm).to(out.dtype.element_ty), mask=real & (offs_d0 < D)[None, :])
    if offs_d1 is not None:
        y1 = (acc1 * norm).to(out.dtype.element_ty)
        tl.store(to + D0 + offs_d1[None, :], y1, mask=real & (offs_d1 < D - D0)[None, :])
