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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from rainfusion_compile.kernels.gpu.hopper.consumer import consumer, releases_of
from rainfusion_compile.kernels.gpu.hopper.loads import ROWS, THREADS, shared_layout
from rainfusion_compile.kernels.gpu.hopper.producer import producer
from rainfusion_compile.kernels.gpu.rows import RUNTIME_ARGS


@gluon.jit(do_not_specialize=RUNTIME_ARGS)
def hopper_attention_kernel(
    q, k, v, out, k_run0, k_run1, v_run0, v_run1, choice, order, key_order, rows, row_ptr, indices, sampled, weights,
    lists, mask, touched, key_norms, key_scales, patterns, batch_heads, heads, group, tokens, first_run, query_blocks,
    query_tiles, table_rows, listed, scale_log2, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os, stride_mb, stride_mh, stride_ms, stride_fb,
    stride_fh,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, OFFSET_BITS: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, MASK_KIND: gl.constexpr,
    DENSE_FIRST: gl.constexpr, ALL_HEADS: gl.constexpr, STAGES: gl.constexpr, K0: gl.constexpr, K1: gl.constexpr,
):  # fmt: skip
    """One program: one tile of 128 query rows of one head. Strides of q, k, v and out count VECTOR elements.

    k_run0, v_run0 are TMA descriptors of keys and values for their first D0 columns, k_run1, v_run1 for D1 more.
    """
    gl.static_assert(TILE_Q == 2 * ROWS)
    dtype: gl.constexpr = q.dtype.element_ty
    W1: gl.constexpr = D1 if D1 > 0 else 16
    N1: gl.constexpr = STAGES if D1 > 0 else 1
    INT8: gl.constexpr = key_scales is not None
    Q1: gl.constexpr = D0 if INT8 else W1
    q1_type: gl.constexpr = gl.int8 if INT8 else dtype
    smem = (
        gl.allocate_shared_memory(dtype, [2, ROWS, D0], shared_layout(dtype, ROWS, D0)),
        gl.allocate_shared_memory(q1_type, [2, ROWS, Q1], shared_layout(q1_type, ROWS, Q1)),
        gl.allocate_shared_memory(dtype, [STAGES, TILE_K, K0], shared_layout(dtype, TILE_K, K0)),
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
        mbarrier.init(k_free.index(stage), count=2 * releases_of(D))
        mbarrier.init(v_free.index(stage), count=2 * releases_of(D))
    fence()  # the TMA signals these barriers
    bars = (q_ready, k_ready, k_free, v_ready, v_free)

    # Only the kernel's own arguments are handed to the warp groups: anything computed here would go through shared
    # memory. Each group finds its tile by itself.
    work = (choice, rows, row_ptr, indices, patterns, batch_heads, heads, query_blocks, query_tiles, table_rows, listed)
    runs = (k_run0, k_run0, v_run0, v_run0)
    if D1 > 0:
        runs = (k_run0, k_run1, v_run0, v_run1)
    # Never read; partitions take no None.
    key_mask, touched_keys, listed_blocks, norms, scales = indices, indices, indices, indices, indices
    SELECTS: gl.constexpr = lists is not None
    KEY_NORMS: gl.constexpr = key_norms is not None
    if SELECTS:
        listed_blocks = lists
    if KEY_NORMS:
        norms = key_norms
    if INT8:
        scales = key_scales
    if MASK_KIND != 0:
        key_mask, touched_keys = mask, touched
    q_strides, out_strides = (stride_qb, stride_qh, stride_qs), (stride_ob, stride_oh, stride_os)
    mask_strides, first_strides = (stride_mb, stride_mh, stride_ms), (stride_fb, stride_fh)
    # ptxas schedules the softmax of a warp group that is listed first differently from one version to the next, with
    # consumers up to 10 % slower: the producer is.
    gl.warp_specialize(
        [
            (producer, (work, q, k, v, runs, order, key_order, sampled, listed_blocks, first_run, tokens, group,
                q_strides, (stride_kb, stride_kh, stride_ks),
                (stride_vb, stride_vh, stride_vs), smem, bars,
                D, D0, D1, OFFSET_BITS, BLOCK_Q, BLOCK_K, TILE_Q, TILE_K, DENSE_FIRST, ALL_HEADS, STAGES,
                SELECTS, K0, K1)),
            (consumer, (0, work, q, out, order, key_order, sampled, listed_blocks, weights, key_mask, touched_keys,
                norms, scales, group, first_run, tokens,
                q_strides, out_strides, mask_strides, first_strides, scale_log2, smem, bars,
                D, D0, D1, OFFSET_BITS, BLOCK_Q, BLOCK_K, TILE_Q, TILE_K, MASK_KIND, DENSE_FIRST, ALL_HEADS, STAGES,
                SELECTS, KEY_NORMS, INT8)),
            (consumer, (1, work, q, out, order, key_order, sampled, listed_blocks, weights, key_mask, touched_keys,
                norms, scales, group, first_run, tokens,
                q_strides, out_strides, mask_strides, first_strides, scale_log2, smem, bars,
                D, D0, D1, OFFSET_BITS, BLOCK_Q, BLOCK_K, TILE_Q, TILE_K, MASK_KIND, DENSE_FIRST, ALL_HEADS, STAGES,
                SELECTS, KEY_NORMS, INT8)),
        ],
        [4, 4],
        [216, 216],  # registers of a consumer's thread; of 504 for the three groups, 72 are left to the producer's
    )  # fmt: skip
