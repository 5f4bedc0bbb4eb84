# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The producer of the Hopper kernel: one warp group that brings queries, keys and values into shared memory.

Keys that lie one after the other in memory come as boxes, by the tensor memory accelerator (TMA); others are gathered
row by row with asynchronous copies. A row of the block tables is of one kind.
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

bounded, selected_keys = gluon.jit(shared.bounded.fn), gluon.jit(shared.selected_keys.fn)
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


@gluon.constexpr_function
def box_rows(block_k, tile_k):
    """Keys in a box: as many as lie in one tile and one key block, wherever they start."""
    return min(block_k & -block_k, tile_k)


@gluon.constexpr_function
def box_columns(width):
    """Columns in a box: shared memory holds wider rows as panels of 128 bytes, one after the other."""
    return min(width, 64)


def run_box(block_k: int, tile_k: int, width: int, dtype: torch.dtype) -> tuple[list[int], gl.NVMMASharedLayout]:
    """Shape of the boxes of a descriptor, and their layout in shared memory."""
    shape = [1, 1, box_rows(block_k, tile_k), box_columns(width)]
    return shape, shared_layout(gl.float16 if dtype == torch.float16 else gl.bfloat16, *shape)


class RunBoxes(NamedTuple):
    """What the TMA needs to know, beside the tensor, to read columns of boxes of its rows."""

    shape: list[int]
    strides: list[int]
    box: list[int]
    layout: gl.NVMMASharedLayout

    def of(self, x: torch.Tensor) -> TensorDescriptor:
        return TensorDescriptor(x, *self)


def run_boxes(x: Rows, width: int, block_k: int, tile_k: int) -> RunBoxes | None:
    """To read `width` columns of boxes of the aligned rows of ``[B, H, S, D]``, 16-bit."""
    if width == 0:
        return None
    head_dim = x.shape[3]
    # Axes whose steps mean nothing (expanded, or of length 1) get a length of 1, and any step that is allowed.
    steps = strides_of(x, 3)
    shape = [length if step else 1 for length, step in zip(x.shape[:3], steps, strict=True)]
    strides = [step or head_dim for step in steps]
    return RunBoxes([*shape, head_dim], [*strides, 1], *run_box(block_k, tile_k, width, x.dtype))


@gluon.jit
def _listed_blocks(
    indices, tile, last, samples, blocks, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, EACH: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """The block of every thread's keys in a tile of a row; past the row's end, its last block again."""
    first = tile * TILE_K + EACH * gl.arange(0, TILE_K // EACH, layout=LAYOUT)
    place = first // BLOCK_K
    block = gl.load(indices + gl.minimum(place, last))
    return bounded(block + gl.where(place < samples[0], samples[1], 0), blocks)


@gluon.jit
def _listed_tokens(
    key_order, block, tile, tokens, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, EACH: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Tokens of a tile [TILE_K]. A thread's lie in one block, one after the other, so it loads them four at a time."""
    first = EACH * gl.arange(0, TILE_K // EACH, layout=gl.SliceLayout(1, LAYOUT))
    at = block * BLOCK_K + (tile * TILE_K + first) % BLOCK_K
    rest = gl.arange(0, EACH, layout=gl.SliceLayout(0, LAYOUT))
    return bounded(gl.load(key_order + (at[:, None] + rest[None, :])), tokens).reshape([TILE_K])


@gluon.constexpr_function
def by_four_layout(width, each):
    """The same, [threads along rows, fours of each, four, columns]."""
    per_row = width // 8
    return gl.BlockedLayout([1, each // 4, 4, 8], [32 // per_row, 1, 1, per_row], [4, 1, 1, 1], [3, 2, 1, 0])


@gluon.jit
def _selected_places(
    indices, own, tile, last, front, phase, sampled, row, of_order, blocks, BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr, EACH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where in `key_order` each four keys of a tile begin, in a row whose head selects blocks; past the row's end, in
    its last block."""
    BY_FOUR: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    thread = gl.arange(0, TILE_K // EACH, layout=gl.SliceLayout(1, BY_FOUR))
    four = gl.arange(0, EACH // 4, layout=gl.SliceLayout(0, BY_FOUR))
    place = tile * TILE_K + thread[:, None] * EACH + four[None, :] * 4
    some = place < front * BLOCK_K
    chosen = selected_keys(own, place, some, phase, sampled, row, of_order, blocks, BLOCK_K)
    beyond = gl.maximum(place - front * BLOCK_K, 0)
    block = bounded(gl.load(indices + gl.minimum(beyond // BLOCK_K, last)), of_order + 2 * blocks)
    return bounded(gl.where(some, chosen, block * BLOCK_K + beyond % BLOCK_K), (of_order + 2 * blocks) * BLOCK_K - 3)


@gluon.jit
def _selected_tokens(key_order, at, tokens, TILE_K: gl.constexpr, LAYOUT: gl.constexpr):
    rest = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return bounded(gl.load(key_order + (at[:, :, None] + rest[None, None, :])), tokens).reshape([TILE_K])


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
def _copy_when_free(
    into, tile, base, token, stride, LAYOUT: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    OFFSET_BITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start copying the rows of these tokens as a tile's keys or values, once its stage of shared memory falls free."""
    smem0, smem1, ready, free = into
    stage = tile % STAGES
    mbarrier.wait(free.index(stage), (tile // STAGES & 1) ^ 1)
    offsets = row_offsets(token, stride, OFFSET_BITS)
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
def gather_keys(
    k, v, key_order, indices, last, samples, tiles, blocks, tokens, k_stride, v_stride, smem, bars,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, OFFSET_BITS: gl.constexpr, BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Keys and values of a row, token by token through `key_order`, as stages of shared memory fall free.

    ``samples``: how many of the row's blocks are samples, and by how many each moves.
    """
    _, _, k0s, k1s, v0s, v1s = smem
    _, k_ready, k_free, v_ready, v_free = bars
    k_into, v_into = (k0s, k1s, k_ready, k_free), (v0s, v1s, v_ready, v_free)
    EACH: gl.constexpr = TILE_K * D0 // 8 // THREADS  # rows of a tile for each thread
    LAYOUT: gl.constexpr = copy_layout(D0, EACH)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    PAIR: gl.constexpr = gl.SliceLayout(2, by_thread_layout(D0, EACH))
    THREAD: gl.constexpr = gl.SliceLayout(1, PAIR)
    # Keys run one tile ahead of values, as they are needed, and block numbers one more.
    block = _listed_blocks(indices, 0, last, samples, blocks, BLOCK_K, TILE_K, EACH, THREAD)
    token = gl.convert_layout(_listed_tokens(key_order, block, 0, tokens, BLOCK_K, TILE_K, EACH, PAIR), BY_ROW)
    block = _listed_blocks(indices, 1, last, samples, blocks, BLOCK_K, TILE_K, EACH, THREAD)
    offsets = row_offsets(token, k_stride, OFFSET_BITS)
    _copy_tile(k0s.index(0), k1s.index(0), k_ready.index(0), k, offsets, LAYOUT, D, D0, D1)
    for tile in range(0, tiles):
        value_token = token
        if tile + 1 < tiles:
            token = _listed_tokens(key_order, block, tile + 1, tokens, BLOCK_K, TILE_K, EACH, PAIR)
            token = gl.convert_layout(token, BY_ROW)
            block = _listed_blocks(indices, tile + 2, last, samples, blocks, BLOCK_K, TILE_K, EACH, THREAD)
            _copy_when_free(k_into, tile + 1, k, token, k_stride, LAYOUT, D, D0, D1, OFFSET_BITS, STAGES)
        _copy_when_free(v_into, tile, v, value_token, v_stride, LAYOUT, D, D0, D1, OFFSET_BITS, STAGES)


@gluon.jit
def gather_selected_keys(
    k, v, key_order, indices, own, last, front, phase, sampled, row, tiles, of_order, blocks, tokens, k_stride,
    v_stride, smem, bars,
    D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr, OFFSET_BITS: gl.constexpr, BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As :func:`gather_keys`, of a row whose head selects blocks: those, `own`, come before the ones that it lists."""
    _, _, k0s, k1s, v0s, v1s = smem
    _, k_ready, k_free, v_ready, v_free = bars
    k_into, v_into = (k0s, k1s, k_ready, k_free), (v0s, v1s, v_ready, v_free)
    EACH: gl.constexpr = TILE_K * D0 // 8 // THREADS
    LAYOUT: gl.constexpr = copy_layout(D0, EACH)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    FOURS: gl.constexpr = gl.SliceLayout(3, by_four_layout(D0, EACH))
    at = _selected_places(
        indices, own, 0, last, front, phase, sampled, row, of_order, blocks, BLOCK_K, TILE_K, EACH, FOURS
    )
    token = gl.convert_layout(_selected_tokens(key_order, at, tokens, TILE_K, FOURS), BY_ROW)
    at = _selected_places(
        indices, own, 1, last, front, phase, sampled, row, of_order, blocks, BLOCK_K, TILE_K, EACH, FOURS
    )
    offsets = row_offsets(token, k_stride, OFFSET_BITS)
    _copy_tile(k0s.index(0), k1s.index(0), k_ready.index(0), k, offsets, LAYOUT, D, D0, D1)
    for tile in range(0, tiles):
        value_token = token
        if tile + 1 < tiles:
            token = gl.convert_layout(_selected_tokens(key_order, at, tokens, TILE_K, FOURS), BY_ROW)
            at = _selected_places(
                indices, own, tile + 2, last, front, phase, sampled, row, of_order, blocks, BLOCK_K, TILE_K, EACH, FOURS
            )
            _copy_when_free(k_into, tile + 1, k, token, k_stride, LAYOUT, D, D0, D1, OFFSET_BITS, STAGES)
        _copy_when_free(v_into, tile, v, value_token, v_stride, LAYOUT, D, D0, D1, OFFSET_BITS, STAGES)


@gluon.jit
def _starts(indices, tile, last, first_run, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr):
    """Where the boxes of a tile start: a token for each; past the row's end, in its last block again."""
    R: gl.constexpr = box_rows(BLOCK_K, TILE_K)
    starts = ()
    for piece in gl.static_range(TILE_K // R):
        place = tile * TILE_K + piece * R
        block = gl.load(indices + gl.minimum(place // BLOCK_K, last)) - first_run
        starts = starts + (block * BLOCK_K + place % BLOCK_K,)  # type: ignore[assignment]  # noqa: RUF005
    return starts


@gluon.jit
def _copy_boxes(
    rows, panels, ready, stage, at, starts, FIRST: gl.constexpr, WIDTH: gl.constexpr, BLOCK_K: gl.constexpr,
    TILE_K: gl.constexpr,
):  # fmt: skip
    """Start copying columns FIRST .. FIRST + WIDTH of a tile; what lies beyond the tensor comes as 0."""
    R: gl.constexpr = box_rows(BLOCK_K, TILE_K)
    C: gl.constexpr = box_columns(WIDTH)
    for piece in gl.static_range(TILE_K // R):
        for panel in gl.static_range(WIDTH // C):
            to = panels.index((stage * (WIDTH // C) + panel) * (TILE_K // R) + piece)
            coordinates = [at[0], at[1], starts[piece], FIRST + panel * C]
            tma.async_copy_global_to_shared(rows, coordinates, ready, to)


@gluon.jit
def _copy_run(
    rows0, rows1, panels0, panels1, ready, stage, at, starts,
    D0: gl.constexpr, D1: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr,
):  # fmt: skip
    """Start copying a tile of whole rows, and let `ready` know when they have come."""
    bar = ready.index(stage)
    mbarrier.expect(bar, TILE_K * (D0 + D1) * 2)
    _copy_boxes(rows0, panels0, bar, stage, at, starts, 0, D0, BLOCK_K, TILE_K)
    if D1 > 0:
        _copy_boxes(rows1, panels1, bar, stage, at, starts, D0, D1, BLOCK_K, TILE_K)
    mbarrier.arrive(bar, count=THREADS - 1)  # the barrier counts a warp group: gathering, each thread arrives


@gluon.jit
def _panels(smem, WIDTH: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr):
    """Stages of shared memory, as the boxes that fill them."""
    R: gl.constexpr = box_rows(BLOCK_K, TILE_K)
    C: gl.constexpr = box_columns(WIDTH)
    BOXES: gl.constexpr = STAGES * (WIDTH // C) * (TILE_K // R)
    return smem._reinterpret(smem.dtype, [BOXES, 1, 1, R, C], shared_layout(smem.dtype, 1, 1, R, C))


@gluon.jit
def copy_key_runs(
    k0, k1, v0, v1, indices, last, tiles, first_run, k_at, v_at, smem, bars,
    D0: gl.constexpr, D1: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Keys and values of a row whose blocks are runs of tokens, as stages of shared memory fall free."""
    _, _, k0s, k1s, v0s, v1s = smem
    _, k_ready, k_free, v_ready, v_free = bars
    kp0, vp0 = _panels(k0s, D0, BLOCK_K, TILE_K, STAGES), _panels(v0s, D0, BLOCK_K, TILE_K, STAGES)
    kp1, vp1 = kp0, vp0  # not used without a second chunk
    if D1 > 0:
        kp1, vp1 = _panels(k1s, D1, BLOCK_K, TILE_K, STAGES), _panels(v1s, D1, BLOCK_K, TILE_K, STAGES)
    # Keys run one tile ahead of values, as they are needed, and block numbers one more.
    starts = _starts(indices, 0, last, first_run, BLOCK_K, TILE_K)
    ahead = _starts(indices, 1, last, first_run, BLOCK_K, TILE_K)
    _copy_run(k0, k1, kp0, kp1, k_ready, 0, k_at, starts, D0, D1, BLOCK_K, TILE_K)
    for tile in range(0, tiles):
        value_starts = starts
        starts = ahead
        ahead = _starts(indices, tile + 2, last, first_run, BLOCK_K, TILE_K)
        if tile + 1 < tiles:
            stage = (tile + 1) % STAGES
            mbarrier.wait(k_free.index(stage), ((tile + 1) // STAGES & 1) ^ 1)
            _copy_run(k0, k1, kp0, kp1, k_ready, stage, k_at, starts, D0, D1, BLOCK_K, TILE_K)
        stage = tile % STAGES
        mbarrier.wait(v_free.index(stage), (tile // STAGES & 1) ^ 1)
        _copy_run(v0, v1, vp0, vp1, v_ready, stage, v_at, value_starts, D0, D1, BLOCK_K, TILE_K)
