# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The warp groups of the Hopper kernel that compute: 64 query rows each, a tile of keys at a time."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared as fence

from rainfusion_compile.kernels.gpu import key_mask as masks
from rainfusion_compile.kernels.gpu import rows as shared
from rainfusion_compile.kernels.gpu.hopper.int8 import ZERO_BITS, as_floats, as_int8, broken_rows, round_queries
from rainfusion_compile.kernels.gpu.hopper.loads import ROWS, THREADS, bounded, copy_layout, row_offsets
from rainfusion_compile.kernels.gpu.hopper.score_bound import SPLITS, scores_are_bounded
from rainfusion_compile.kernels.gpu.hopper.softmax import no_keys, rescaled, sums_of, weigh
from rainfusion_compile.kernels.gpu.hopper.tile_mask import hide_keys, hides_keys
from rainfusion_compile.kernels.gpu.hopper.tiles import every_warp, find_tile, product_layout
from rainfusion_compile.kernels.gpu.key_mask import CHUNK
from rainfusion_compile.kernels.gpu.rows import VECTOR

extent, sampled_blocks = gluon.jit(shared.extent.fn), gluon.jit(shared.sampled_blocks.fn)
before_listed, touched_blocks = gluon.jit(shared.before_listed.fn), gluon.jit(masks.touched_blocks.fn)
listed_samples, touched_tiles = gluon.jit(masks.listed_samples.fn), gluon.jit(masks.touched_tiles.fn)


@gluon.jit
def _scores(
    q0, q1, k0, k1, ready, phase, is_run, TILE_K: gl.constexpr, D1: gl.constexpr, LAYOUT: gl.constexpr,
    INT8: gl.constexpr,
):  # fmt: skip
    """Start multiplying the unscaled scores [64, TILE_K] of a tile."""
    mbarrier.wait(ready, phase)
    if not is_run:  # what was gathered so far, keys and values, becomes visible to the tensor cores
        fence()
    if INT8:
        s = gl.full([ROWS, TILE_K], ZERO_BITS, gl.int32, layout=LAYOUT)
        s = warpgroup_mma(q1, as_int8(k0).permute((1, 0)), s, is_async=True)
    else:
        s = gl.zeros([ROWS, TILE_K], gl.float32, layout=LAYOUT)
        s = warpgroup_mma(q0, k0.permute((1, 0)), s, use_acc=False, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(q1, k1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _weigh(p, v0, v1, acc0, acc1, D1: gl.constexpr):
    """Start adding the weighted values of a tile."""
    acc0 = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, acc0.type.layout, 2)), v0, acc0, is_async=True)
    if D1 > 0:
        acc1 = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, acc1.type.layout, 2)), v1, acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def _done(acc0, acc1, D1: gl.constexpr):
    """The accumulators, once all products are done."""
    acc0 = warpgroup_mma_wait(0, deps=[acc0])
    if D1 > 0:
        acc1 = warpgroup_mma_wait(0, deps=[acc1])
    return acc0, acc1


@gluon.constexpr_function
def releases_of(head_dim):
    """How many threads of a consumer let go of a stage of rows this wide."""
    return THREADS.value if head_dim > 64 else 1


@gluon.jit
def _release(free, D: gl.constexpr):
    """Let a stage of shared memory go, once the products that read it are done.

    Wide rows: each thread by itself, as if its copies had come. For one thread to do it for all, Triton has all wait
    for each other before; only for narrow rows, whose steps are short, do so many signals cost more.
    """
    if releases_of(D) > 1:
        async_copy.mbarrier_arrive(free, increment_count=False)
    else:
        mbarrier.arrive(free)


@gluon.constexpr_function
def _weights_type(head_dim, dtype, bounded):
    """Where registers suffice, weights are rounded once the product of those before is done, into its operands."""
    return gl.float32 if head_dim <= 64 and not bounded else dtype


@gluon.jit
def _other_tiles(
    begun, masked, hidden, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, MASK_KIND: gl.constexpr,
    SELECTS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, S: gl.constexpr,
    INT8: gl.constexpr, BOUNDED: gl.constexpr,
):  # fmt: skip
    """All tiles but the first, of which the last is not yet multiplied with values: accumulators, weights, state."""
    p, state, acc0, acc1, q0, q1, smem, bars, is_run, tiles, unit, scale_log2, weight, samples_end = begun
    _, _, k0s, k1s, v0s, v1s = smem
    _, k_ready, k_free, v_ready, v_free = bars
    dtype: gl.constexpr = k0s.dtype
    WEIGHTS: gl.constexpr = _weights_type(D, dtype, BOUNDED)
    for tile in range(1, tiles):
        stage = tile % STAGES
        before = (tile - 1) % STAGES
        ready, phase = k_ready.index(stage), tile // STAGES & 1
        s = _scores(q0, q1, k0s.index(stage), k1s.index(stage), ready, phase, is_run, TILE_K, D1, S, INT8)
        acc0, acc1 = _weigh(p, v0s.index(before), v1s.index(before), acc0, acc1, D1)
        s = warpgroup_mma_wait(2 if D1 > 0 else 1, deps=[s])
        if INT8:
            s = as_floats(s, MASK_KIND)
        _release(k_free.index(stage), D)
        if MASK_KIND == 2:
            s *= scale_log2
        if hides_keys(tile, masked, MASK_KIND):
            s = hide_keys(s, tile, hidden, BLOCK_K, TILE_K, MASK_KIND, SELECTS, S)
        more = gl.where(tile == samples_end, weight, 0.0)  # all that was read so far stands for more
        p, state, change = weigh(s, state, unit, more, WEIGHTS, TILE_K, S, D, False, BOUNDED)
        # This wait is for the next step, but stands here so that ptxas cannot lift the one below it over the softmax.
        mbarrier.wait(v_ready.index(tile % STAGES), tile // STAGES & 1)
        acc0, acc1 = _done(acc0, acc1, D1)
        if not BOUNDED:
            acc0, acc1 = rescaled(acc0, acc1, change, D0, D1)
        _release(v_free.index(before), D)
        p = p.to(dtype)
    return acc0, acc1, p, state


@gluon.jit
def consumer(
    half: gl.constexpr, work, q, out, order, key_order, sampled, lists, weights, mask, touched, key_norms, key_scales,
    group, first_run, tokens, q_strides, out_strides, mask_strides, first_strides, scale_log2, smem, bars,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, OFFSET_BITS: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, MASK_KIND: gl.constexpr,
    DENSE_FIRST: gl.constexpr, ALL_HEADS: gl.constexpr, STAGES: gl.constexpr, SELECTS: gl.constexpr,
    KEY_NORMS: gl.constexpr, INT8: gl.constexpr,
):  # fmt: skip
    """A warp group that computes: 64 query rows of this tile."""
    at, position_q, row, indices, last, own = find_tile(work, BLOCK_Q, BLOCK_K, TILE_Q, DENSE_FIRST, ALL_HEADS)
    batch, head = at
    start, keys = extent(indices, last, first_run, tokens, BLOCK_K)
    is_run = start >= 0
    front = 0
    if SELECTS:
        front = before_listed(sampled, row)
        keys += front * BLOCK_K
    tiles = gl.cdiv(keys, TILE_K)
    full = keys // TILE_K  # tiles from here on need a mask, and those that the key mask touches
    first, until, rest_begin, rest_end = 0, 0, 0, 0
    stride_ms = mask_strides[2]
    samples = (gl.load(sampled + 5 * row), 0)
    own = lists + own * gl.cdiv(tokens, BLOCK_K)
    weight = gl.load(weights + row)
    if MASK_KIND != 0:
        q += (batch * q_strides[0] + head * q_strides[1]) * VECTOR
        samples = sampled_blocks(q, order, tokens, q_strides[2], sampled, row)
        mask += batch * mask_strides[0] + head * mask_strides[1]
        touched += batch * first_strides[0] + head * first_strides[1]
        blocks = gl.cdiv(tokens, BLOCK_K)
        listed = listed_samples(indices, last, front, sampled, row, first_run - blocks)
        each = gl.arange(0, CHUNK, layout=every_warp(CHUNK))
        clear_samples, _ = touched_blocks(indices, 0, listed, touched, samples[1], first_run + blocks, each)
        rest = touched_blocks(indices, listed, last + 1, touched, 0, first_run + blocks, each)
        first, until, rest_begin, rest_end = touched_tiles(
            touched, clear_samples, rest, listed, front, sampled, row, keys, first_run - blocks, BLOCK_K, TILE_K
        )
    q0s, q1s, k0s, k1s, v0s, v1s = smem
    q_ready, k_ready, k_free, v_ready, _ = bars
    S: gl.constexpr = product_layout(TILE_K, INT8)
    O0: gl.constexpr = product_layout(D0)
    W1: gl.constexpr = D1 if D1 > 0 else 16
    O1: gl.constexpr = product_layout(W1)
    q0 = q0s.index(half)
    q1 = q1s.index(half)
    dtype: gl.constexpr = q0s.dtype
    if INT8:
        mbarrier.wait(q_ready, 0)
        scale_log2 *= round_queries(q0, q1, D0) * gl.load(key_scales + batch * (work[6] // group) + head // group)
    # An additive mask works on scores already in base-2 units; else the softmax scales them, in one step with another.
    unit = scale_log2
    if MASK_KIND == 2:
        unit = 1.0
    samples_end = samples[0] * BLOCK_K // TILE_K  # the first tile that holds other keys than samples
    mixed = gl.where(samples[0] * BLOCK_K % TILE_K == 0, tiles, samples_end)
    masked = (full, mixed, first, until, rest_begin, rest_end)
    hidden = (
        keys, indices, own, front, sampled, row, key_order, last, samples, weight / unit, first_run, tokens, mask,
        stride_ms,
    )  # fmt: skip

    acc0 = gl.zeros([ROWS, D0], gl.float32, layout=O0)
    acc1 = gl.zeros([ROWS, W1], gl.float32, layout=O1)
    mbarrier.wait(q_ready, 0)
    # The first tile needs the fence in any case: queries are always gathered.
    s = _scores(q0, q1, k0s.index(0), k1s.index(0), k_ready.index(0), 0, False, TILE_K, D1, S, INT8)
    s = warpgroup_mma_wait(0, deps=[s])
    if INT8:
        s = as_floats(s, MASK_KIND)
    _release(k_free.index(0), D)
    if MASK_KIND == 2:
        s *= scale_log2
    if hides_keys(0, masked, MASK_KIND):
        s = hide_keys(s, 0, hidden, BLOCK_K, TILE_K, MASK_KIND, SELECTS, S)
    p, state, _ = weigh(s, no_keys(), unit, 0.0, dtype, TILE_K, S, D, True, False)
    mbarrier.wait(v_ready.index(0), 0)

    begun = (p, state, acc0, acc1, q0, q1, smem, bars, is_run, tiles, unit, scale_log2, weight, samples_end)
    # An `if` of what is known beforehand by itself: Triton trips over code that cannot be reached.
    if KEY_NORMS:
        key_norms += (batch * (work[6] // group) + head // group) * SPLITS
        if scores_are_bounded(q0, q1, state, unit, key_norms, D0, D1):
            acc0, acc1, p, state = _other_tiles(
                begun, masked, hidden, BLOCK_K, TILE_K, MASK_KIND, SELECTS, STAGES, D, D0, D1, S, INT8, True
            )
        else:
            acc0, acc1, p, state = _other_tiles(
                begun, masked, hidden, BLOCK_K, TILE_K, MASK_KIND, SELECTS, STAGES, D, D0, D1, S, INT8, False
            )
    else:
        acc0, acc1, p, state = _other_tiles(
            begun, masked, hidden, BLOCK_K, TILE_K, MASK_KIND, SELECTS, STAGES, D, D0, D1, S, INT8, False
        )

    before = (tiles - 1) % STAGES
    if not is_run:
        fence()
    acc0, acc1 = _weigh(p, v0s.index(before), v1s.index(before), acc0, acc1, D1)
    acc0, acc1 = _done(acc0, acc1, D1)

    total = sums_of(state, gl.SliceLayout(1, O0))
    if MASK_KIND != 0:
        total = gl.where(total == 0.0, 1.0, total)  # a row that sees no key gives 0
    norm = 1.0 / total
    if INT8:
        norm += broken_rows(q0, gl.SliceLayout(1, O0), D0)
    position_q += half * ROWS
    out += (batch * out_strides[0] + head * out_strides[1]) * VECTOR
    stride_os = out_strides[2] * VECTOR
    y = (acc0 * norm[:, None]).to(dtype)
    _store_rows(out, y, order, position_q, tokens, stride_os, OFFSET_BITS, 0, D0, D)
    if D1 > 0:
        y = (acc1 * gl.convert_layout(norm, gl.SliceLayout(1, O1))[:, None]).to(dtype)
        _store_rows(out, y, order, position_q, tokens, stride_os, OFFSET_BITS, D0, D1, D)


@gluon.jit
def _store_rows(
    out, y, order, position_q, tokens, stride_os, OFFSET_BITS: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = copy_layout(WIDTH)
    position = position_q + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    token = bounded(gl.load(order + gl.minimum(position, tokens - 1)), tokens)
    rows = row_offsets(token, stride_os, OFFSET_BITS)
    column = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    real = (position < tokens)[:, None] & (column < D)[None, :]
    gl.store(out + rows[:, None] + column[None, :], gl.convert_layout(y, LAYOUT), mask=real)
