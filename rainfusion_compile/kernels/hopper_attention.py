# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Block-sparse attention for Hopper GPUs (sm_90) in Gluon: the loop of `triton_attention`, warp-specialised by hand.

One producer warp group gathers keys and values into shared memory with asynchronous copies; two consumer warp groups
take 64 query rows each and keep the tensor cores busy: the scores of the next tile are multiplied while the softmax of
this one is computed (FlashAttention-3, arXiv 2407.08608, algorithm 2). Tables, arguments and results are those of
:func:`rainfusion_compile.kernels.attention.block_sparse_attention`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .launch import ATTENTION_RUNTIME_ARGS, VECTOR

ROWS = gl.constexpr(64)  # query rows of one consumer: the height of a warp group's tensor-core product
THREADS = gl.constexpr(128)  # of a warp group
CONSUMER_REGISTERS = gl.constexpr(224)
PRODUCER_REGISTERS = gl.constexpr(56)
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before Triton 3.7


@gluon.constexpr_function
def copy_layout(width):
    """Rows of `width` 16-bit elements, 16 bytes for each thread of a warp group."""
    per_row = max(1, min(width // 8, 32))
    return gl.BlockedLayout([1, 8], [32 // per_row, per_row], [4, 1], [1, 0])


@gluon.constexpr_function
def product_layout(width):
    """Accumulator of a warp group's [64, width] product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def shared_layout(rows, width, dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, width], dtype)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _dense_first(choice, dense, rank, batch_heads, ALL_HEADS: gl.constexpr):
    """The (batch, head) of this rank when the heads that stayed dense come first."""
    each = gl.arange(0, ALL_HEADS, layout=gl.BlockedLayout([1], [32], [4], [0]))
    real = each < batch_heads
    is_dense = (gl.load(choice + each, mask=real, other=-1) == dense).to(gl.int32)
    before = gl.associative_scan(is_dense, 0, _add) - is_dense  # dense heads before this one
    place = gl.where(is_dense != 0, before, gl.sum(is_dense, 0) + each - before)
    return gl.sum(gl.where(real & (place == rank), each, 0), 0)


@gluon.jit
def _blocks_below(indices, blocks, bound):
    """How many of a row's key blocks have a number below bound."""
    CHUNK: gl.constexpr = 1024
    offsets = gl.arange(0, CHUNK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    count = 0
    for start in range(0, blocks, CHUNK):
        block = gl.load(indices + start + offsets, mask=start + offsets < blocks, other=bound)
        count += gl.sum((block < bound).to(gl.int32), 0)
    return count


@gluon.jit
def _tokens(
    indices, key_order, tile, last, key_positions, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, LAYOUT: gl.constexpr
):
    """Tokens of a tile of a row's kept keys; past the row's end, tokens of its last block again."""
    place = tile * TILE_K + gl.arange(0, TILE_K, layout=LAYOUT)
    block = gl.load(indices + gl.minimum(place // BLOCK_K, last))
    return gl.load(key_order + gl.minimum(block * BLOCK_K + place % BLOCK_K, key_positions - 1))


@gluon.jit
def _offsets(token, stride, OFFSET_BITS: gl.constexpr):
    return token.to(gl.int64 if OFFSET_BITS == 64 else gl.int32) * stride


@gluon.jit
def _copy_rows(
    smem, base, row_offsets, LAYOUT: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr, D: gl.constexpr
):
    """Start copying columns FIRST .. FIRST + WIDTH of rows into shared memory; columns from D on come as 0."""
    column = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    at = base + row_offsets[:, None] + column[None, :]
    if FIRST + WIDTH <= D:
        async_copy.async_copy_global_to_shared(smem, at)
    else:
        async_copy.async_copy_global_to_shared(smem, at, mask=(column < D)[None, :])


@gluon.jit
def _copy_tile(
    smem0, smem1, ready, base, row_offsets, LAYOUT: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr
):
    """Start copying whole rows, and let `ready` know when they have come."""
    _copy_rows(smem0, base, row_offsets, LAYOUT, 0, D0, D)
    if D1 > 0:
        L1: gl.constexpr = copy_layout(D1)
        offsets = gl.convert_layout(row_offsets, gl.SliceLayout(1, L1))
        _copy_rows(smem1, base, offsets, L1, D0, D1, D)
    async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def _producer(
    q, k, v, order, key_order, indices, position_q, last, tiles, tokens, key_positions, qs, ks, vs, smem, bars,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, OFFSET_BITS: gl.constexpr, BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp group that fetches: this tile's queries, then keys and values, as stages of shared memory fall free."""
    q0s, q1s, k0s, k1s, v0s, v1s = smem
    q_ready, k_ready, k_free, v_ready, v_free = bars
    LAYOUT: gl.constexpr = copy_layout(D0)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    for half in gl.static_range(2):
        position = position_q + half * ROWS + gl.arange(0, ROWS, layout=BY_ROW)
        rows = _offsets(gl.load(order + gl.minimum(position, tokens - 1)), qs, OFFSET_BITS)
        _copy_tile(q0s.index(half), q1s.index(half), q_ready, q, rows, LAYOUT, D, D0, D1)
    # Keys run one tile ahead of values, as they are needed.
    token = _tokens(indices, key_order, 0, last, key_positions, BLOCK_K, TILE_K, BY_ROW)
    _copy_tile(k0s.index(0), k1s.index(0), k_ready.index(0), k, _offsets(token, ks, OFFSET_BITS), LAYOUT, D, D0, D1)
    for tile in range(0, tiles):
        value_token = token
        if tile + 1 < tiles:
            token = _tokens(indices, key_order, tile + 1, last, key_positions, BLOCK_K, TILE_K, BY_ROW)
            stage = (tile + 1) % STAGES
            mbarrier.wait(k_free.index(stage), ((tile + 1) // STAGES & 1) ^ 1)
            offsets = _offsets(token, ks, OFFSET_BITS)
            _copy_tile(k0s.index(stage), k1s.index(stage), k_ready.index(stage), k, offsets, LAYOUT, D, D0, D1)
        stage = tile % STAGES
        mbarrier.wait(v_free.index(stage), (tile // STAGES & 1) ^ 1)
        offsets = _offsets(value_token, vs, OFFSET_BITS)
        _copy_tile(v0s.index(stage), v1s.index(stage), v_ready.index(stage), v, offsets, LAYOUT, D, D0, D1)


@gluon.jit
def _hide(
    s, tile, keys, indices, key_order, last, key_positions, mask, stride_ms,
    BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, MASK_KIND: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of a tile that is not full or that the key mask touches."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    visible = tile * TILE_K + gl.arange(0, TILE_K, layout=COLUMNS) < keys
    if MASK_KIND != 0:
        token = _tokens(indices, key_order, tile, last, key_positions, BLOCK_K, TILE_K, COLUMNS)
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
def _scores(q0, q1, k0, k1, ready, phase, TILE_K: gl.constexpr, D1: gl.constexpr, LAYOUT: gl.constexpr):
    """Start multiplying the unscaled scores [64, TILE_K] of a tile."""
    mbarrier.wait(ready, phase)
    fence_async_shared()
    s = gl.zeros([ROWS, TILE_K], gl.float32, layout=LAYOUT)
    s = warpgroup_mma(q0, k0.permute((1, 0)), s, use_acc=False, is_async=True)
    if D1 > 0:
        s = warpgroup_mma(q1, k1.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _softmax(s, top, total, unit, MASK_KIND: gl.constexpr):
    """A step of online softmax on scores times `unit`: weights, factor for earlier sums, new maximum, new sum."""
    new_top = gl.maximum(top, gl.max(s, 1) * unit)
    shift = new_top
    if MASK_KIND != 0:
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)  # no visible key yet
    fade = gl.exp2(top - shift)
    p = gl.exp2(s * unit - shift[:, None])
    return p, fade, new_top, total * fade + gl.sum(p, 1)


@gluon.jit
def _rescaled(acc0, acc1, fade, pending: gl.constexpr, D1: gl.constexpr):
    """The accumulators, once all but `pending` products are done, times each row's factor."""
    acc0 = warpgroup_mma_wait(pending, deps=[acc0])
    acc0 = acc0 * gl.convert_layout(fade, gl.SliceLayout(1, acc0.type.layout))[:, None]
    if D1 > 0:
        acc1 = warpgroup_mma_wait(pending, deps=[acc1])
        acc1 = acc1 * gl.convert_layout(fade, gl.SliceLayout(1, acc1.type.layout))[:, None]
    return acc0, acc1


@gluon.jit
def _weigh(p, v0, v1, acc0, acc1, D1: gl.constexpr):
    """Start adding the weighted values of a tile."""
    fence_async_shared()
    acc0 = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, acc0.type.layout, 2)), v0, acc0, is_async=True)
    if D1 > 0:
        acc1 = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, acc1.type.layout, 2)), v1, acc1, is_async=True)
    return acc0, acc1


@gluon.jit
def _consumer(
    half: gl.constexpr, out, order, key_order, indices, mask, position_q, last, keys, tiles, clear, tokens,
    key_positions, stride_os, stride_ms, scale_log2, smem, bars,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, OFFSET_BITS: gl.constexpr, BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr, MASK_KIND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warp group that computes: 64 query rows of this tile."""
    q0s, q1s, k0s, k1s, v0s, v1s = smem
    q_ready, k_ready, k_free, v_ready, v_free = bars
    S: gl.constexpr = product_layout(TILE_K)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    O0: gl.constexpr = product_layout(D0)
    W1: gl.constexpr = D1 if D1 > 0 else 16
    O1: gl.constexpr = product_layout(W1)
    q0 = q0s.index(half)
    q1 = q1s.index(half)
    dtype: gl.constexpr = q0s.dtype
    # An additive mask works on scores already in base-2 units; else the softmax scales them, in one step with another.
    unit = scale_log2
    if MASK_KIND == 2:
        unit = 1.0

    acc0 = gl.zeros([ROWS, D0], gl.float32, layout=O0)
    acc1 = gl.zeros([ROWS, W1], gl.float32, layout=O1)
    top = gl.full([ROWS], float("-inf"), gl.float32, layout=S_ROW)  # running maximum, in base-2 units
    total = gl.zeros([ROWS], gl.float32, layout=S_ROW)
    mbarrier.wait(q_ready, 0)
    s = _scores(q0, q1, k0s.index(0), k1s.index(0), k_ready.index(0), 0, TILE_K, D1, S)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0))
    if MASK_KIND == 2:
        s *= scale_log2
    if clear == 0:
        s = _hide(s, 0, keys, indices, key_order, last, key_positions, mask, stride_ms, BLOCK_K, TILE_K, MASK_KIND, S)
    p, fade, top, total = _softmax(s, top, total, unit, MASK_KIND)
    p = p.to(dtype)
    mbarrier.wait(v_ready.index(0), 0)

    for tile in range(1, tiles):
        stage = tile % STAGES
        before = (tile - 1) % STAGES
        s = _scores(q0, q1, k0s.index(stage), k1s.index(stage), k_ready.index(stage), tile // STAGES & 1, TILE_K, D1, S)
        acc0, acc1 = _weigh(p, v0s.index(before), v1s.index(before), acc0, acc1, D1)
        s = warpgroup_mma_wait(2 if D1 > 0 else 1, deps=[s])
        mbarrier.arrive(k_free.index(stage))
        if MASK_KIND == 2:
            s *= scale_log2
        if tile >= clear:
            s = _hide(
                s, tile, keys, indices, key_order, last, key_positions, mask, stride_ms, BLOCK_K, TILE_K, MASK_KIND, S
            )
        p, fade, top, total = _softmax(s, top, total, unit, MASK_KIND)
        # This wait is for the next step, but stands here so that ptxas cannot lift the one below it over the softmax.
        mbarrier.wait(v_ready.index(tile % STAGES), tile // STAGES & 1)
        acc0, acc1 = _rescaled(acc0, acc1, fade, 0, D1)
        mbarrier.arrive(v_free.index(before))
        p = p.to(dtype)

    before = (tiles - 1) % STAGES
    acc0, acc1 = _weigh(p, v0s.index(before), v1s.index(before), acc0, acc1, D1)
    acc0 = warpgroup_mma_wait(0, deps=[acc0])
    if D1 > 0:
        acc1 = warpgroup_mma_wait(0, deps=[acc1])

    if MASK_KIND != 0:
        total = gl.where(total == 0.0, 1.0, total)  # a row that sees no key gives 0
    norm = 1.0 / total
    position_q += half * ROWS
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
    rows = _offsets(gl.load(order + gl.minimum(position, tokens - 1)), stride_os, OFFSET_BITS)
    column = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    real = (position < tokens)[:, None] & (column < D)[None, :]
    gl.store(out + rows[:, None] + column[None, :], gl.convert_layout(y, LAYOUT), mask=real)


@gluon.jit(do_not_specialize=ATTENTION_RUNTIME_ARGS)
def hopper_attention_kernel(
    q,
    k,
    v,
    out,
    choice,
    order,
    key_order,
    rows,
    row_ptr,
    indices,
    mask,
    first_masked,
    patterns,
    batch_heads,
    heads,
    group,
    tokens,
    key_positions,
    query_blocks,
    query_tiles,
    scale_log2,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_os,
    stride_mb,
    stride_mh,
    stride_ms,
    stride_fb,
    stride_fh,
    D: gl.constexpr,
    D0: gl.constexpr,
    D1: gl.constexpr,
    OFFSET_BITS: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TILE_Q: gl.constexpr,
    TILE_K: gl.constexpr,
    MASK_KIND: gl.constexpr,
    DENSE_FIRST: gl.constexpr,
    ALL_HEADS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program: one tile of 128 query rows of one head. Strides of q, k, v and out count VECTOR elements."""
    gl.static_assert(TILE_Q == 2 * ROWS)
    batch_head = gl.program_id(0) // query_tiles
    if DENSE_FIRST:
        batch_head = _dense_first(choice, patterns, batch_head, batch_heads, ALL_HEADS)
    # The last rows and the first ones (text, first frame) are the long ones: start with them.
    tile_q = (gl.program_id(0) % query_tiles + query_tiles - query_tiles // 8) % query_tiles
    batch = (batch_head // heads).to(gl.int64)
    head = (batch_head % heads).to(gl.int64)
    kv_head = head // group
    q += (batch * stride_qb + head * stride_qh) * VECTOR
    k += (batch * stride_kb + kv_head * stride_kh) * VECTOR
    v += (batch * stride_vb + kv_head * stride_vh) * VECTOR
    out += (batch * stride_ob + head * stride_oh) * VECTOR

    row = gl.load(rows + gl.load(choice + batch_head) * query_blocks + tile_q * TILE_Q // BLOCK_Q)
    begin = gl.load(row_ptr + row)
    last = gl.load(row_ptr + row + 1) - begin - 1
    indices += begin
    keys = last * BLOCK_K + gl.minimum(BLOCK_K, key_positions - gl.load(indices + last) * BLOCK_K)
    tiles = gl.cdiv(keys, TILE_K)
    clear = keys // TILE_K  # tiles that need no mask
    if MASK_KIND != 0:
        bound = gl.load(first_masked + batch * stride_fb + head * stride_fh)
        untouched = _blocks_below(indices, last + 1, bound // BLOCK_K) * BLOCK_K
        clear = gl.minimum(untouched, keys) // TILE_K
        key_mask = mask + batch * stride_mb + head * stride_mh
    else:
        key_mask = indices  # never read; partitions take no None

    dtype: gl.constexpr = q.dtype.element_ty
    W1: gl.constexpr = D1 if D1 > 0 else 16
    N1: gl.constexpr = STAGES if D1 > 0 else 1
    smem = (
        gl.allocate_shared_memory(dtype, [2, ROWS, D0], shared_layout(ROWS, D0, dtype)),
        gl.allocate_shared_memory(dtype, [2, ROWS, W1], shared_layout(ROWS, W1, dtype)),
        gl.allocate_shared_memory(dtype, [STAGES, TILE_K, D0], shared_layout(TILE_K, D0, dtype)),
        gl.allocate_shared_memory(dtype, [N1, TILE_K, W1], shared_layout(TILE_K, W1, dtype)),
        gl.allocate_shared_memory(dtype, [STAGES, TILE_K, D0], shared_layout(TILE_K, D0, dtype)),
        gl.allocate_shared_memory(dtype, [N1, TILE_K, W1], shared_layout(TILE_K, W1, dtype)),
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
    bars = (q_ready, k_ready, k_free, v_ready, v_free)

    position_q = tile_q * TILE_Q
    # The arguments are handed over in shared memory, and Triton 3.6 may write them where the sums above are still read.
    barrier()
    gl.warp_specialize(
        [
            (_consumer, (0, out, order, key_order, indices, key_mask, position_q, last, keys, tiles, clear, tokens,
                key_positions, stride_os * VECTOR, stride_ms, scale_log2, smem, bars,
                D, D0, D1, OFFSET_BITS, BLOCK_K, TILE_K, MASK_KIND, STAGES)),
            (_consumer, (1, out, order, key_order, indices, key_mask, position_q, last, keys, tiles, clear, tokens,
                key_positions, stride_os * VECTOR, stride_ms, scale_log2, smem, bars,
                D, D0, D1, OFFSET_BITS, BLOCK_K, TILE_K, MASK_KIND, STAGES)),
            (_producer, (q, k, v, order, key_order, indices, position_q, last, tiles, tokens, key_positions,
                stride_qs * VECTOR, stride_ks * VECTOR, stride_vs * VECTOR, smem, bars,
                D, D0, D1, OFFSET_BITS, BLOCK_K, TILE_K, STAGES)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
