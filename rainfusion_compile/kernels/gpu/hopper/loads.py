# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The producer of the Hopper kernel: one warp group that brings queries, keys and values into shared memory.

Keys that are one run of memory come as they lie there, a tile in a box, by the tensor memory accelerator (TMA); those
of other rows of the block tables are gathered token by token, with asynchronous copies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rainfusion_compile.kernels.gpu import rows as shared
from rainfusion_compile.kernels.gpu.rows import Rows, strides_of

# Triton 3.8 and 3.9 renamed these three; 3.9 refuses the old names.
copy_rows_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
copy_box_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
bounded = gluon.jit(shared.bounded.fn)
ROWS = gl.constexpr(64)  # query rows of one consumer: the height of a warp group's tensor-core product
THREADS = gl.constexpr(128)  # of a warp group


@gluon.constexpr_function
def copy_layout(width, each=1):
    """Rows of `width` 16-bit elements, 16 bytes for each thread of a warp group, of `each` rows one after the other."""
    per_row = width // 8
    return gl.BlockedLayout([each, 8], [32 // per_row, per_row], [4, 1], [1, 0])


@gluon.constexpr_function
def by_thread_layout(width, each):
    """The same, [threads along rows, rows of each, columns]."""
    per_row = width // 8
    return gl.BlockedLayout([1, each, 8], [32 // per_row, 1, per_row], [4, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def shared_layout(dtype, *shape):
    return gl.NVMMASharedLayout.get_default_for(list(shape), dtype)


def run_box(tile_k: int, width: int, dtype: torch.dtype) -> tuple[list[int], gl.NVMMASharedLayout]:
    """Shape of the boxes of a descriptor, a tile of keys each, and their layout in shared memory."""
    shape = [1, 1, tile_k, width]
    return shape, shared_layout(gl.float16 if dtype == torch.float16 else gl.bfloat16, *shape)


class RunBoxes(NamedTuple):
    """What the TMA needs to know, beside the tensor, to read columns of boxes of its rows."""

    shape: list[int]
    strides: list[int]
    box: list[int]
    layout: gl.NVMMASharedLayout

    def of(self, x: torch.Tensor) -> TensorDescriptor:
        return TensorDescriptor(x, *self)


def run_boxes(x: Rows, width: int, tile_k: int) -> RunBoxes | None:
    """To read `width` columns of boxes of the aligned rows of ``[B, H, S, D]``, 16-bit."""
    if width == 0:
        return None
    head_dim = x.shape[3]
    # Axes whose steps mean nothing (expanded, or of length 1) get a length of 1, and any step that is allowed.
    steps = strides_of(x, 3)
    shape = [length if step else 1 for length, step in zip(x.shape[:3], steps, strict=True)]
    strides = [step or head_dim for step in steps]
    return RunBoxes([*shape, head_dim], [*strides, 1], *run_box(tile_k, width, x.dtype))


@gluon.jit
def _listed_blocks(
    indices, tile, last, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, EACH: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """The block of every thread's keys in a tile of a row, as read; past the row's end, its last block again."""
    first = tile * TILE_K + EACH * gl.arange(0, TILE_K // EACH, layout=LAYOUT)
    return gl.load(indices + gl.minimum(first // BLOCK_K, last))


@gluon.jit
def _listed_tokens(
    key_order, block, samples, blocks, tile, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, EACH: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Tokens of a tile [TILE_K], as read, of the blocks that `_listed_blocks` read.

    A thread's lie in one block, one after the other, so it loads them four at a time.
    """
    first = tile * TILE_K + EACH * gl.arange(0, TILE_K // EACH, layout=gl.SliceLayout(1, LAYOUT))
    block = bounded(block + gl.where(first // BLOCK_K < samples[0], samples[1], 0), blocks)
    rest = gl.arange(0, EACH, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(key_order + ((block * BLOCK_K + first % BLOCK_K)[:, None] + rest[None, :])).reshape([TILE_K])


@gluon.constexpr_function
def by_four_layout(width, each):
    """The same, [threads along rows, fours of each, four, columns]."""
    per_row = width // 8
    return gl.BlockedLayout([1, each // 4, 4, 8], [32 // per_row, 1, 1, per_row], [4, 1, 1, 1], [3, 2, 1, 0])


@gluon.jit
def _fours(tile, TILE_K: gl.constexpr, EACH: gl.constexpr, LAYOUT: gl.constexpr):
    """The place in a row, counted in fours of keys, of each four of a tile; unsigned: whole numbers divide faster."""
    thread = gl.arange(0, TILE_K // EACH, layout=gl.SliceLayout(1, LAYOUT))
    four = gl.arange(0, EACH // 4, layout=gl.SliceLayout(0, LAYOUT))
    return (tile * (TILE_K // 4) + thread[:, None] * (EACH // 4) + four[None, :]).to(gl.uint32)


@gluon.jit
def _granule(place, draws, BLOCK_K: gl.constexpr):
    """Which of a row's granules, `phases` to a block of samples, these fours of keys are in."""
    return place * draws[1].to(gl.uint32) // (BLOCK_K // 4)


@gluon.jit
def _selected_blocks(
    indices, own, last, front, tile, draws, blocks, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, EACH: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """The blocks of each four keys of a tile, as read, in a row whose head selects blocks: by its own list, for those
    that this has, and by the row's; past the row's end, its last block again."""
    place = _fours(tile, TILE_K, EACH, LAYOUT)
    block = place // (BLOCK_K // 4)
    # As in `selected_keys`, for phases of whole fours of keys; others are never selected from.
    count, phases, _ = draws
    number = gl.where(block < count, _granule(place, draws, BLOCK_K), block + (count * phases - count))
    beyond = gl.maximum(block.to(gl.int32) - front, 0)
    return gl.load(own + bounded(number, blocks)), gl.load(indices + gl.minimum(beyond, last))


@gluon.jit
def _selected_tokens(
    key_order, chosen, listed, front, tile, draws, phase, of_order, blocks, BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr, EACH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Tokens of a tile [TILE_K], as read, of the blocks that `_selected_blocks` read: where `selected_keys` says that
    a row's first ones are, by fours of keys, which are as many loads."""
    FOURS: gl.constexpr = BLOCK_K // 4
    place = _fours(tile, TILE_K, EACH, gl.SliceLayout(2, LAYOUT))
    count, phases, granules = draws
    block, chosen = place // FOURS, chosen.to(gl.int32)
    from_granules = gl.where(front > 0, count, 0)
    block_of = gl.where(block < front, chosen + of_order, listed + gl.where(block < count - from_granules, phase, 0))
    granule = phase * blocks + chosen - _granule(place, draws, BLOCK_K).to(gl.int32)
    sample = granules * FOURS + granule * (FOURS // phases) + place.to(gl.int32)
    at = gl.where(block < from_granules, sample, block_of * FOURS + (place % FOURS).to(gl.int32))
    at = bounded(at, (of_order + 2 * blocks) * FOURS) * 4
    rest = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return gl.load(key_order + (at[:, :, None] + rest[None, None, :])).reshape([TILE_K])


@gluon.jit
def row_offsets(token, stride, OFFSET_BITS: gl.constexpr):
    return token.to(gl.int64 if OFFSET_BITS == 64 else gl.int32) * stride


@gluon.jit
def _copy_rows(
    smem, base, row_offsets, LAYOUT: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr, D: gl.constexpr
):
    """Start copying columns FIRST .. FIRST + WIDTH of rows into shared memory; columns from D on come as 0."""
    column = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    at = base + row_offsets[:, None] + column[None, :]
    if FIRST + WIDTH <= D:
        copy_rows_async(smem, at)
    else:
        copy_rows_async(smem, at, mask=(column < D)[None, :])


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
def _copy_when_free(
    into, tile, base, token, tokens, stride, LAYOUT: gl.constexpr, D: gl.constexpr, D0: gl.constexpr,
    D1: gl.constexpr, OFFSET_BITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start copying the rows of these tokens as a tile's keys or values, once its stage of shared memory falls free."""
    smem0, smem1, ready, free = into
    stage = tile % STAGES
    mbarrier.wait(free.index(stage), (tile // STAGES & 1) ^ 1)
    offsets = row_offsets(gl.convert_layout(bounded(token, tokens), gl.SliceLayout(1, LAYOUT)), stride, OFFSET_BITS)
    _copy_tile(smem0.index(stage), smem1.index(stage), ready.index(stage), base, offsets, LAYOUT, D, D0, D1)


@gluon.jit
def fetch_queries(
    q, order, position_q, tokens, q_stride, q0s, q1s, q_ready,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, OFFSET_BITS: gl.constexpr,
):  # fmt: skip
    """Both consumers' query rows, gathered."""
    LAYOUT: gl.constexpr = copy_layout(D0)
    for half in gl.static_range(2):
        position = position_q + half * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        token = bounded(gl.load(order + gl.minimum(position, tokens - 1)), tokens)
        rows = row_offsets(token, q_stride, OFFSET_BITS)
        _copy_tile(q0s.index(half), q1s.index(half), q_ready, q, rows, LAYOUT, D, D0, D1)


@gluon.jit
def _blocks(
    row, tile, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, EACH: gl.constexpr, SELECTS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """The blocks of a tile's keys, as read."""
    indices, own, last, front, draws, _, _, blocks = row
    if SELECTS:
        BY_FOUR: gl.constexpr = gl.SliceLayout(2, LAYOUT)
        return _selected_blocks(indices, own, last, front, tile, draws, blocks, BLOCK_K, TILE_K, EACH, BY_FOUR)
    else:  # Triton compiles what follows a return
        return _listed_blocks(indices, tile, last, BLOCK_K, TILE_K, EACH, gl.SliceLayout(1, LAYOUT))


@gluon.jit
def _tokens(
    key_order, row, read, tile, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, EACH: gl.constexpr,
    SELECTS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The tokens of the blocks that were `read` for a tile, as read."""
    _, _, _, front, draws, phase, of_order, blocks = row
    if SELECTS:
        chosen, listed = read
        return _selected_tokens(
            key_order, chosen, listed, front, tile, draws, phase, of_order, blocks, BLOCK_K, TILE_K, EACH, LAYOUT
        )
    else:
        samples = (draws[0], phase)
        return _listed_tokens(key_order, read, samples, of_order + 2 * blocks, tile, BLOCK_K, TILE_K, EACH, LAYOUT)


@gluon.jit
def gather_keys(
    k, v, key_order, row, tiles, tokens, k_stride, v_stride, smem, bars,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, K0: gl.constexpr, K1: gl.constexpr,
    OFFSET_BITS: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr,
    SELECTS: gl.constexpr,
):  # fmt: skip
    """Keys and values of a row, token by token through `key_order`, as stages of shared memory fall free.

    ``row``: its list and, where heads may select blocks (``SELECTS``), that of its head, of which ``front`` blocks come
    first; the number of the row's last block, ``front``, `draws_of` the row, by how much its samples move, the first
    block of `order`, and how many there are.
    """
    _, _, k0s, k1s, v0s, v1s = smem
    _, k_ready, k_free, v_ready, v_free = bars
    k_into, v_into = (k0s, k1s, k_ready, k_free), (v0s, v1s, v_ready, v_free)
    EACH: gl.constexpr = TILE_K * D0 // 8 // THREADS  # rows of a tile for each thread
    LAYOUT: gl.constexpr = copy_layout(D0, EACH)
    KEYS: gl.constexpr = copy_layout(K0, TILE_K * K0 // 8 // THREADS)
    KD: gl.constexpr = D * K0 // D0
    READ: gl.constexpr = gl.SliceLayout(3, by_four_layout(D0, EACH)) if SELECTS else gl.SliceLayout(
        2, by_thread_layout(D0, EACH)
    )  # fmt: skip
    # Keys run one tile ahead of values, as they are needed. Tokens are read one tile before that, and block numbers
    # two: nothing is computed from what was read before this tile's copies are on their way.
    token = _tokens(
        key_order, row, _blocks(row, 0, BLOCK_K, TILE_K, EACH, SELECTS, READ), 0, BLOCK_K, TILE_K, EACH, SELECTS, READ
    )
    ahead = _blocks(row, 1, BLOCK_K, TILE_K, EACH, SELECTS, READ)
    # Not `token`: Triton takes a name for constant in a loop that sets it to the value that it has before the loop.
    value_token = gl.zeros_like(token)
    for tile in range(0, tiles + 1):
        if tile < tiles:
            _copy_when_free(k_into, tile, k, token, tokens, k_stride, KEYS, KD, K0, K1, OFFSET_BITS, STAGES)
        if tile > 0:
            _copy_when_free(v_into, tile - 1, v, value_token, tokens, v_stride, LAYOUT, D, D0, D1, OFFSET_BITS, STAGES)
        value_token = token
        token = _tokens(key_order, row, ahead, tile + 1, BLOCK_K, TILE_K, EACH, SELECTS, READ)
        ahead = _blocks(row, tile + 2, BLOCK_K, TILE_K, EACH, SELECTS, READ)


@gluon.jit
def _copy_run(
    rows0, rows1, smem0, smem1, ready, stage, at, start, D0: gl.constexpr, D1: gl.constexpr, TILE_K: gl.constexpr
):  # fmt: skip
    """Start copying a tile of rows, and let `ready` know when they have come; beyond the tensor, they come as 0."""
    bar = ready.index(stage)
    mbarrier.expect(bar, TILE_K * (D0 + D1) * 2)
    copy_box_async(rows0, [at[0], at[1], start, 0], bar, smem0.index(stage))
    if D1 > 0:
        copy_box_async(rows1, [at[0], at[1], start, D0], bar, smem1.index(stage))
    mbarrier.arrive(bar, count=THREADS - 1)  # the barrier counts a warp group: gathering, each thread arrives


@gluon.jit
def _as_boxes(smem):
    """Stages of shared memory as the boxes that fill them."""
    STAGES: gl.constexpr = smem.shape[0]
    ROWS_OF: gl.constexpr = smem.shape[1]
    WIDTH: gl.constexpr = smem.shape[2]
    LAYOUT: gl.constexpr = shared_layout(smem.dtype, 1, 1, ROWS_OF, WIDTH)
    if REINTERPRETS:
        return smem.reinterpret(smem.dtype, [STAGES, 1, 1, ROWS_OF, WIDTH], LAYOUT)
    else:  # Triton compiles what follows a return
        return smem._reinterpret(smem.dtype, [STAGES, 1, 1, ROWS_OF, WIDTH], LAYOUT)


@gluon.jit
def copy_key_run(
    k0, k1, v0, v1, start, tiles, k_at, v_at, smem, bars,
    D0: gl.constexpr, D1: gl.constexpr, K0: gl.constexpr, K1: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Keys and values of a row that reads all tokens from `start` on, as stages of shared memory fall free."""
    _, _, k0s, k1s, v0s, v1s = smem
    _, k_ready, k_free, v_ready, v_free = bars
    k0s, v0s = _as_boxes(k0s), _as_boxes(v0s)
    if D1 > 0:
        v1s = _as_boxes(v1s)
    if K1 > 0:
        k1s = _as_boxes(k1s)
    # Keys run one tile ahead of values, as they are needed.
    _copy_run(k0, k1, k0s, k1s, k_ready, 0, k_at, start, K0, K1, TILE_K)
    for tile in range(0, tiles):
        if tile + 1 < tiles:
            stage = (tile + 1) % STAGES
            mbarrier.wait(k_free.index(stage), ((tile + 1) // STAGES & 1) ^ 1)
            _copy_run(k0, k1, k0s, k1s, k_ready, stage, k_at, start + (tile + 1) * TILE_K, K0, K1, TILE_K)
        stage = tile % STAGES
        mbarrier.wait(v_free.index(stage), (tile // STAGES & 1) ^ 1)
        _copy_run(v0, v1, v0s, v1s, v_ready, stage, v_at, start + tile * TILE_K, D0, D1, TILE_K)
