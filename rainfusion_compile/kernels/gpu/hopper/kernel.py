# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Block-sparse attention for Hopper GPUs (sm_90) in Gluon: the loop of `portable_kernel`, warp-specialised by hand.

One producer warp group brings keys and values into shared memory (`loads`); two consumer warp groups
take 64 query rows each and keep the tensor cores busy: the scores of the next tile are multiplied while the softmax of
this one is computed (FlashAttention-3, arXiv 2407.08608, algorithm 2). Tables, arguments and results are those of
:func:`rainfusion_compile.kernels.gpu.attention.block_sparse_attention`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared as fence
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from rainfusion_compile.kernels.gpu import key_mask as masks
from rainfusion_compile.kernels.gpu import rows as shared
from rainfusion_compile.kernels.gpu.hopper import loads
from rainfusion_compile.kernels.gpu.hopper.loads import ROWS, THREADS, bounded, copy_layout, row_offsets, shared_layout
from rainfusion_compile.kernels.gpu.hopper.softmax import rescaled, softmax
from rainfusion_compile.kernels.gpu.rows import RUNTIME_ARGS, VECTOR

extent, dense_heads_first = gluon.jit(shared.extent.fn), gluon.jit(shared.dense_heads_first.fn)
sampled_blocks, before_listed = gluon.jit(shared.sampled_blocks.fn), gluon.jit(shared.before_listed.fn)
selected_keys = gluon.jit(shared.selected_keys.fn)
listed_samples, untouched_tiles = gluon.jit(masks.listed_samples.fn), gluon.jit(masks.untouched_tiles.fn)


@gluon.constexpr_function
def _every_warp(length):
    """A vector of which each warp has all: it needs no shared memory to sum over it."""
    return gl.BlockedLayout([length // 32], [32], [4], [0])


@gluon.constexpr_function
def _product_layout(width):
    """Accumulator of a warp group's [64, width] product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.jit
def _untouched(indices, begin, end, touched, moved, blocks):
    """Which of a row's key blocks from `begin` to `end` is the first that the mask touches; `end` if it is none."""
    CHUNK: gl.constexpr = 1024
    offsets = gl.arange(0, CHUNK, layout=_every_warp(CHUNK))
    found = end
    for start in range(begin, end, CHUNK):
        at = start + offsets
        block = bounded(gl.load(indices + at, mask=at < end, other=0) + moved, blocks)
        clear = gl.load(touched + 1 + block, mask=at < end, other=1)
        found = gl.minimum(found, gl.min(gl.where(clear == 0, at, end), 0))
    return found


@gluon.jit
def _find_tile(
    work, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, DENSE_FIRST: gl.constexpr,
    ALL_HEADS: gl.constexpr,
):  # fmt: skip
    """This program's tile: (batch, head), the position of its first query, its row and the row's key blocks.

    Every warp group finds out by itself: whatever one told the others would go through shared memory.
    """
    choice, rows, row_ptr, indices, patterns, batch_heads, heads, query_blocks, query_tiles, table_rows, listed = work
    batch_head = gl.program_id(0) // query_tiles
    if DENSE_FIRST:
        each = gl.arange(0, ALL_HEADS, layout=_every_warp(ALL_HEADS))
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


@gluon.jit
def _producer(
    work, q, k, v, runs, order, key_order, sampled, lists, first_run, tokens, group, q_strides, k_strides, v_strides,
    smem, bars,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, OFFSET_BITS: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, DENSE_FIRST: gl.constexpr,
    ALL_HEADS: gl.constexpr, STAGES: gl.constexpr, SELECTS: gl.constexpr,
):  # fmt: skip
    """The warp group that fetches: this tile's queries, then keys and values."""
    at, position_q, row, indices, last, own = _find_tile(work, BLOCK_Q, BLOCK_K, TILE_Q, DENSE_FIRST, ALL_HEADS)
    batch, head = at
    kv_head = head // group
    q_batch, q_head, q_row = q_strides
    k_batch, k_head, k_row = k_strides
    v_batch, v_head, v_row = v_strides
    q += (batch * q_batch + head * q_head) * VECTOR
    loads.fetch_queries(q, order, position_q, tokens, q_row * VECTOR, smem[0], smem[1], bars[0], D, D0, D1, OFFSET_BITS)
    is_run, keys = extent(indices, last, first_run, tokens, BLOCK_K)
    blocks = gl.cdiv(tokens, BLOCK_K)
    front = 0
    if SELECTS:
        front = before_listed(sampled, row)
    tiles = gl.cdiv(keys + front * BLOCK_K, TILE_K)
    if is_run:
        k0, k1, v0, v1 = runs
        # In the descriptors, axes that repeat one thing have a length of 1.
        k_at = ((batch * (k_batch != 0)).to(gl.int32), (kv_head * (k_head != 0)).to(gl.int32))
        v_at = ((batch * (v_batch != 0)).to(gl.int32), (kv_head * (v_head != 0)).to(gl.int32))
        loads.copy_key_runs(
            k0, k1, v0, v1, indices, last, tiles, first_run, k_at, v_at, smem, bars,
            D0, D1, BLOCK_K, TILE_K, STAGES,
        )  # fmt: skip
    else:
        k += (batch * k_batch + kv_head * k_head) * VECTOR
        v += (batch * v_batch + kv_head * v_head) * VECTOR
        samples = sampled_blocks(q, order, tokens, q_row, sampled, row)
        if SELECTS and front > 0:
            loads.gather_selected_keys(
                k, v, key_order, indices, lists + own * blocks, last, front, samples[1], sampled, row, tiles,
                first_run - blocks, blocks, tokens, k_row * VECTOR, v_row * VECTOR, smem, bars,
                D, D0, D1, OFFSET_BITS, BLOCK_K, TILE_K, STAGES,
            )  # fmt: skip
        else:
            loads.gather_keys(
                k, v, key_order, indices, last, samples, tiles, first_run + blocks, tokens,
                k_row * VECTOR, v_row * VECTOR, smem, bars, D, D0, D1, OFFSET_BITS, BLOCK_K, TILE_K, STAGES,
            )  # fmt: skip


@gluon.jit
def _hide(
    s, tile, keys, indices, own, front, sampled, row, key_order, last, samples, lift, first_run, tokens, mask,
    stride_ms, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, MASK_KIND: gl.constexpr, SELECTS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of a tile that is not full, that the key mask touches, or of which a part alone is sampled."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    place = tile * TILE_K + gl.arange(0, TILE_K, layout=COLUMNS)
    visible = place < keys
    end = samples[0] * BLOCK_K
    s += gl.where((place < end) & (tile == end // TILE_K), lift, 0.0)[None, :]
    if MASK_KIND != 0:
        blocks = gl.cdiv(tokens, BLOCK_K)
        beyond = gl.maximum(place - front * BLOCK_K, 0)
        block = gl.load(indices + gl.minimum(beyond // BLOCK_K, last))
        block += gl.where((place < end) & (front == 0), samples[1], 0)
        key = bounded(block, first_run + blocks) * BLOCK_K + beyond % BLOCK_K
        if SELECTS:
            some = place < front * BLOCK_K
            chosen = selected_keys(own, place, some, samples[1], sampled, row, first_run - blocks, blocks, BLOCK_K)
            key = gl.where(some, bounded(chosen, (first_run + blocks) * BLOCK_K), key)
        token = bounded(gl.load(key_order + key), tokens)
        value = gl.load(mask + token.to(gl.int64) * stride_ms)
        if MASK_KIND == 1:
            visible = visible & (value != 0)
        else:
            bias = value.to(gl.float32)
            visible = visible & (bias != float("-inf"))
            # A finite bias stays finite in base-2 units: only -inf hides a key for good.
            s += (gl.maximum(bias, -2.3e38) * 1.4426950408889634)[None, :]
    return gl.where(visible[None, :], s, float("-inf"))


@gluon.jit
def _scores(q0, q1, k0, k1, ready, phase, is_run, TILE_K: gl.constexpr, D1: gl.constexpr, LAYOUT: gl.constexpr):
    """Start multiplying the unscaled scores [64, TILE_K] of a tile."""
    mbarrier.wait(ready, phase)
    if not is_run:  # what was gathered so far, keys and values, becomes visible to the tensor cores
        fence()
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
def _consumer(
    half: gl.constexpr, work, q, out, order, key_order, sampled, lists, weights, mask, touched, first_run, tokens,
    q_strides, out_strides, mask_strides, first_strides, scale_log2, smem, bars,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, OFFSET_BITS: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, MASK_KIND: gl.constexpr,
    DENSE_FIRST: gl.constexpr, ALL_HEADS: gl.constexpr, STAGES: gl.constexpr, SELECTS: gl.constexpr,
):  # fmt: skip
    """A warp group that computes: 64 query rows of this tile."""
    at, position_q, row, indices, last, own = _find_tile(work, BLOCK_Q, BLOCK_K, TILE_Q, DENSE_FIRST, ALL_HEADS)
    batch, head = at
    is_run, keys = extent(indices, last, first_run, tokens, BLOCK_K)
    front = 0
    if SELECTS:
        front = before_listed(sampled, row)
        keys += front * BLOCK_K
    tiles = gl.cdiv(keys, TILE_K)
    clear = keys // TILE_K  # tiles from here on need a mask, and those from `first` to `until`
    first, until = 0, 0
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
        clear_samples = _untouched(indices, 0, listed, touched, samples[1], first_run + blocks)
        clear = _untouched(indices, listed, last + 1, touched, 0, first_run + blocks)
        first, until, clear = untouched_tiles(
            touched, clear_samples, clear, listed, front, sampled, row, keys, first_run - blocks, BLOCK_K, TILE_K
        )
    q0s, q1s, k0s, k1s, v0s, v1s = smem
    q_ready, k_ready, k_free, v_ready, v_free = bars
    S: gl.constexpr = _product_layout(TILE_K)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    O0: gl.constexpr = _product_layout(D0)
    W1: gl.constexpr = D1 if D1 > 0 else 16
    O1: gl.constexpr = _product_layout(W1)
    q0 = q0s.index(half)
    q1 = q1s.index(half)
    dtype: gl.constexpr = q0s.dtype
    # An additive mask works on scores already in base-2 units; else the softmax scales them, in one step with another.
    unit = scale_log2
    if MASK_KIND == 2:
        unit = 1.0
    lift = weight / unit
    samples_end = samples[0] * BLOCK_K // TILE_K  # the first tile that holds other keys than samples
    mixed = gl.where(samples[0] * BLOCK_K % TILE_K == 0, tiles, samples_end)

    acc0 = gl.zeros([ROWS, D0], gl.float32, layout=O0)
    acc1 = gl.zeros([ROWS, W1], gl.float32, layout=O1)
    top = gl.full([ROWS], float("-inf"), gl.float32, layout=S_ROW)  # running maximum, in base-2 units
    total = gl.zeros([ROWS], gl.float32, layout=S_ROW)
    mbarrier.wait(q_ready, 0)
    # The first tile needs the fence in any case: queries are always gathered.
    s = _scores(q0, q1, k0s.index(0), k1s.index(0), k_ready.index(0), 0, False, TILE_K, D1, S)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0))
    if MASK_KIND == 2:
        s *= scale_log2
    hides = (clear == 0) | (mixed == 0)
    if MASK_KIND != 0:
        hides = hides | ((first == 0) & (until > 0))
    if hides:
        s = _hide(
            s, 0, keys, indices, own, front, sampled, row, key_order, last, samples, lift, first_run, tokens, mask,
            stride_ms, BLOCK_K, TILE_K, MASK_KIND, SELECTS, S,
        )  # fmt: skip
    p, fade, top, total = softmax(s, top, total, unit, MASK_KIND)
    p = p.to(dtype)
    mbarrier.wait(v_ready.index(0), 0)

    for tile in range(1, tiles):
        stage = tile % STAGES
        before = (tile - 1) % STAGES
        ready, phase = k_ready.index(stage), tile // STAGES & 1
        s = _scores(q0, q1, k0s.index(stage), k1s.index(stage), ready, phase, is_run, TILE_K, D1, S)
        acc0, acc1 = _weigh(p, v0s.index(before), v1s.index(before), acc0, acc1, D1)
        s = warpgroup_mma_wait(2 if D1 > 0 else 1, deps=[s])
        mbarrier.arrive(k_free.index(stage))
        if MASK_KIND == 2:
            s *= scale_log2
        hides = (tile >= clear) | (tile == mixed)
        if MASK_KIND != 0:
            hides = hides | ((tile >= first) & (tile < until))
        if hides:
            s = _hide(
                s, tile, keys, indices, own, front, sampled, row, key_order, last, samples, lift, first_run,
                tokens, mask, stride_ms, BLOCK_K, TILE_K, MASK_KIND, SELECTS, S,
            )  # fmt: skip
        top += gl.where(tile == samples_end, weight, 0.0)  # all that was read so far stands for more
        p, fade, top, total = softmax(s, top, total, unit, MASK_KIND)
        # This wait is for the next step, but stands here so that ptxas cannot lift the one below it over the softmax.
        mbarrier.wait(v_ready.index(tile % STAGES), tile // STAGES & 1)
        acc0, acc1 = rescaled(acc0, acc1, fade, D0, D1)
        mbarrier.arrive(v_free.index(before))
        p = p.to(dtype)

    before = (tiles - 1) % STAGES
    if not is_run:
        fence()
    acc0, acc1 = _weigh(p, v0s.index(before), v1s.index(before), acc0, acc1, D1)
    acc0 = warpgroup_mma_wait(0, deps=[acc0])
    if D1 > 0:
        acc1 = warpgroup_mma_wait(0, deps=[acc1])

    if MASK_KIND != 0:
        total = gl.where(total == 0.0, 1.0, total)  # a row that sees no key gives 0
    norm = 1.0 / total
    position_q += half * ROWS
    out += (batch * out_strides[0] + head * out_strides[1]) * VECTOR
    stride_os = out_strides[2] * VECTOR
    y = (acc0 * gl.convert_layout(norm, gl.SliceLayout(1, O0))[:, None]).to(dtype)
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


@gluon.jit(do_not_specialize=RUNTIME_ARGS)
def hopper_attention_kernel(
    q, k, v, out, k_run0, k_run1, v_run0, v_run1, choice, order, key_order, rows, row_ptr, indices, sampled, weights,
    lists, mask, touched, patterns, batch_heads, heads, group, tokens, first_run, query_blocks, query_tiles,
    table_rows, listed, scale_log2, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb,
    stride_vh, stride_vs, stride_ob, stride_oh, stride_os, stride_mb, stride_mh, stride_ms, stride_fb, stride_fh,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, OFFSET_BITS: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, MASK_KIND: gl.constexpr,
    DENSE_FIRST: gl.constexpr, ALL_HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: one tile of 128 query rows of one head. Strides of q, k, v and out count VECTOR elements.

    k_run0, v_run0 are TMA descriptors of keys and values for their first D0 columns, k_run1, v_run1 for D1 more.
    """
    gl.static_assert(TILE_Q == 2 * ROWS)
    dtype: gl.constexpr = q.dtype.element_ty
    W1: gl.constexpr = D1 if D1 > 0 else 16
    N1: gl.constexpr = STAGES if D1 > 0 else 1
    smem = (
        gl.allocate_shared_memory(dtype, [2, ROWS, D0], shared_layout(dtype, ROWS, D0)),
        gl.allocate_shared_memory(dtype, [2, ROWS, W1], shared_layout(dtype, ROWS, W1)),
        gl.allocate_shared_memory(dtype, [STAGES, TILE_K, D0], shared_layout(dtype, TILE_K, D0)),
        gl.allocate_shared_memory(dtype, [N1, TILE_K, W1], shared_layout(dtype, TILE_K, W1)),
        gl.allocate_shared_memory(dtype, [STAGES, TILE_K, D0], shared_layout(dtype, TILE_K, D0)),
        gl.allocate_shared_memory(dtype, [N1, TILE_K, W1], shared_layout(dtype, TILE_K, W1)),
    )
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], BAR)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(q_ready, count=2 * THREADS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=THREADS)
        mbarrier.init(v_ready.index(stage), count=THREADS)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence()  # the TMA signals these barriers
    bars = (q_ready, k_ready, k_free, v_ready, v_free)

    # Only the kernel's own arguments are handed to the warp groups: anything computed here would go through shared
    # memory. Each group finds its tile by itself.
    work = (choice, rows, row_ptr, indices, patterns, batch_heads, heads, query_blocks, query_tiles, table_rows, listed)
    runs = (k_run0, k_run0, v_run0, v_run0)
    if D1 > 0:
        runs = (k_run0, k_run1, v_run0, v_run1)
    key_mask, touched_keys, listed_blocks = indices, indices, indices  # never read; partitions take no None
    SELECTS: gl.constexpr = lists is not None
    if SELECTS:
        listed_blocks = lists
    if MASK_KIND != 0:
        key_mask, touched_keys = mask, touched
    q_strides, out_strides = (stride_qb, stride_qh, stride_qs), (stride_ob, stride_oh, stride_os)
    mask_strides, first_strides = (stride_mb, stride_mh, stride_ms), (stride_fb, stride_fh)
    gl.warp_specialize(
        [
            (_consumer, (0, work, q, out, order, key_order, sampled, listed_blocks, weights, key_mask, touched_keys,
                first_run, tokens,
                q_strides, out_strides, mask_strides, first_strides, scale_log2, smem, bars,
                D, D0, D1, OFFSET_BITS, BLOCK_Q, BLOCK_K, TILE_Q, TILE_K, MASK_KIND, DENSE_FIRST, ALL_HEADS, STAGES,
                SELECTS)),
            (_consumer, (1, work, q, out, order, key_order, sampled, listed_blocks, weights, key_mask, touched_keys,
                first_run, tokens,
                q_strides, out_strides, mask_strides, first_strides, scale_log2, smem, bars,
                D, D0, D1, OFFSET_BITS, BLOCK_Q, BLOCK_K, TILE_Q, TILE_K, MASK_KIND, DENSE_FIRST, ALL_HEADS, STAGES,
                SELECTS)),
            (_producer, (work, q, k, v, runs, order, key_order, sampled, listed_blocks, first_run, tokens, group,
                q_strides, (stride_kb, stride_kh, stride_ks),
                (stride_vb, stride_vh, stride_vs), smem, bars,
                D, D0, D1, OFFSET_BITS, BLOCK_Q, BLOCK_K, TILE_Q, TILE_K, DENSE_FIRST, ALL_HEADS, STAGES,
                SELECTS)),
        ],
        [4, 4],
        [216, 72],  # registers of a thread
    )  # fmt: skip
