# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The ARM probe in Triton: what each candidate would do to the output of a few sampled queries, and the choice.

Four launches, beside those that find what the samples would select. The first splits keys and values over many
programs; each reads its share once and leaves, for every sampled query and piece of a key block, the sums of weights
and of squared weights, times the piece's values, their squares and 1. Values are seen in a few random directions: the
squared length of a difference survives that on average, at any head_dim. (The dense output, which all errors are
compared with, is kept whole.) The others, in `measure`, put the pieces that each candidate reads together, add up the
samples of a head, and choose for all heads of a sample; nothing of this waits for the host.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rainfusion_compile.kernels.gpu import configs, selection
from rainfusion_compile.kernels.gpu.configs import LOG2_E, LaunchConfig, cdiv, next_power_of_2
from rainfusion_compile.kernels.gpu.int8_keys import score_noise
from rainfusion_compile.kernels.gpu.key_mask import mask_kind, touched_keys, touched_strides
from rainfusion_compile.kernels.gpu.launch import Launch
from rainfusion_compile.kernels.gpu.measure import LANES, add_up_kernel, choose_kernel, measure_kernel, share_of
from rainfusion_compile.kernels.gpu.portable_kernel import hide, load_rows, scores, weighed
from rainfusion_compile.kernels.gpu.rows import (
    MASK_STRIDES,
    VECTOR,
    Rows,
    aligned_rows,
    bounded,
    mask_rows,
    row_strides,
    rows_of,
    strides_of,
)
from rainfusion_compile.sparsity.block_tables import ProbeTables

MAX_SPLITS = 64
SIZES = "heads group tokens length count scale_log2"
RUNTIME_ARGS = [*SIZES.split(), *(f"stride_{tensor}{axis}" for tensor in "qkv" for axis in "bhs"), *MASK_STRIDES]


@triton.jit
def _tile(s, unit, top, acc0, acc1, v, rows, offs_d0, offs_d1, r0, r1, PIECES: tl.constexpr, D: tl.constexpr,
          PRECISION: tl.constexpr, GUARD: tl.constexpr):  # fmt: skip
    """Scores (times `unit` in base-2 units) of a tile: the new maximum, the output so far, and the sums of the tile's
    pieces by weights and by squared weights, side by side."""
    p, fade, top = weighed(s, unit, top, GUARD)
    v0 = load_rows(v, rows, offs_d0, D)
    acc0 = tl.dot(p.to(v0.dtype), v0, acc0 * fade[:, None], input_precision=PRECISION)
    lanes = tl.dot(v0, r0, input_precision=PRECISION)
    if offs_d1 is not None:
        v1 = load_rows(v + offs_d0.shape[0], rows, offs_d1, D - offs_d0.shape[0])
        acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * fade[:, None], input_precision=PRECISION)
        lanes = tl.dot(v1, r1, lanes, input_precision=PRECISION)
    lane = tl.arange(0, LANES)[None, :]
    lanes = tl.where(lane == LANES - 2, tl.sum(lanes * lanes, 1)[:, None], lanes)
    lanes = tl.where(lane == LANES - 1, 1.0, lanes)
    if PIECES > 1:  # each piece's numbers in columns of its own
        keys: tl.constexpr = lanes.shape[0]
        own = tl.arange(0, keys)[:, None] * PIECES // keys == tl.arange(0, PIECES)[None, :]
        lanes = tl.reshape(tl.where(own[:, :, None], lanes[:, None, :], 0.0), [keys, PIECES * LANES])
    narrow: tl.constexpr = tl.float32 if v.dtype.element_ty == tl.float32 else tl.bfloat16  # float16 holds no squares
    lanes = lanes.to(narrow)
    first = tl.dot(p.to(narrow), lanes, input_precision=PRECISION)
    return top, acc0, acc1, first, tl.dot((p * p).to(narrow), lanes, input_precision=PRECISION)


@triton.jit
def _of_pieces(x, PIECES: tl.constexpr):
    """Sums of a tile's pieces, [rows, PIECES] of [rows, keys]."""
    return tl.sum(tl.reshape(x, [x.shape[0], PIECES, x.shape[1] // PIECES]), 2)


@triton.jit
def _both_scores(q0, q1, m0, m1, k, k_rows, visible, offs_d0, offs_d1, PIECES: tl.constexpr, D: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Unscaled scores of samples over a tile of keys, and their mean queries', summed over a piece's visible keys."""
    k0 = tl.trans(load_rows(k, k_rows, offs_d0, D))
    k1 = k0
    means = tl.dot(m0, k0, input_precision=PRECISION)
    if q1 is not None:
        k1 = tl.trans(load_rows(k + offs_d0.shape[0], k_rows, offs_d1, D - offs_d0.shape[0]))
        means = tl.dot(m1, k1, means, input_precision=PRECISION)
    if visible is not None:
        means = tl.where(visible[None, :], means, 0.0)
    means = _of_pieces(means, PIECES)
    s = tl.dot(q0, k0, input_precision=PRECISION)
    if q1 is not None:
        s = tl.dot(q1, k1, s, input_precision=PRECISION)
    return s, means


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def probe_kernel(
    q, k, v, q_means, mask, touched, keys, samples, directions, tops, parts, outputs, block_scores,
    heads, group, tokens, length, count, scale_log2, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh,
    stride_ks, stride_vb, stride_vh, stride_vs, stride_mb, stride_mh, stride_ms, stride_fb, stride_fh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, MASK_KIND: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What a split of the keys gives each sample, in weights relative to the running maximum in base-2 units.

    keys: the `length` tokens that are read, BLOCK_K of each key block. Pieces are tiles or, if these have several
    blocks, blocks. tops[b, h, tile, sample]: the maximum up to this tile. parts[b, h, piece, sample, 2, lane]: the
    piece's sums by weights and by squared weights. outputs[b, h, split, sample, D]: the split's weighted sum of values.
    block_scores[b, h, sample, block]: mean product of a block's visible keys with the sample's own mean query, which is
    q_means[b, h, sample]; none of this if q_means is None. Strides of q, k and v count VECTOR elements.
    """
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    batch = (tl.program_id(2) // heads).to(tl.int64)
    head = (tl.program_id(2) % heads).to(tl.int64)
    q += (batch * stride_qb + head * stride_qh) * VECTOR
    k += (batch * stride_kb + head // group * stride_kh) * VECTOR
    v += (batch * stride_vb + head // group * stride_vh) * VECTOR
    if MASK_KIND != 0:
        mask += batch * stride_mb + head * stride_mh

    offs_k = tl.arange(0, TILE_K)
    lane = tl.arange(0, LANES)
    offs_d0 = tl.arange(0, D0)
    offs_d1 = None
    sample = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q)
    real = sample < count
    sample = tl.minimum(sample, count - 1)
    rows_q = bounded(tl.load(samples + sample), tokens).to(OFFSET)
    q0 = load_rows(q, rows_q * stride_qs * VECTOR, offs_d0, D)
    r0 = tl.load(directions + offs_d0[:, None] * LANES + lane[None, :]).to(v.dtype.element_ty)
    q1 = None
    r1 = None
    if D1 > 0:
        offs_d1 = tl.arange(0, D1)
        q1 = load_rows(q + D0, rows_q * stride_qs * VECTOR, offs_d1, D - D0)
        r1 = tl.load(directions + (D0 + offs_d1)[:, None] * LANES + lane[None, :]).to(v.dtype.element_ty)
    m0 = None
    m1 = None
    if q_means is not None:
        own = tl.program_id(2).to(tl.int64) * count + sample
        m0 = load_rows(q_means, own * D, offs_d0, D)
        if D1 > 0:
            m1 = load_rows(q_means + D0, own * D, offs_d1, D - D0)
        block_scores += own * tl.cdiv(length, BLOCK_K)
    PIECES: tl.constexpr = max(TILE_K // BLOCK_K, 1)
    TILES: tl.constexpr = max(BLOCK_K // TILE_K, 1)  # of a block
    piece = tl.arange(0, PIECES)
    in_block = tl.zeros([TILE_Q, PIECES], tl.float32)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    acc0 = tl.zeros([TILE_Q, D0], tl.float32)
    acc1 = acc0  # not used without a second chunk
    if D1 > 0:
        acc1 = tl.zeros([TILE_Q, D1], tl.float32)

    tiles = tl.cdiv(length, TILE_K)
    share = share_of(tiles, splits, TILES)
    begin = split * share
    end = tl.minimum(begin + share, tiles)
    clear = length // TILE_K  # tiles for the hot loop, which knows no masks
    if MASK_KIND != 0:
        clear = tl.minimum(clear, tl.load(touched + batch * stride_fb + head * stride_fh) // TILE_K)
    clear = tl.maximum(tl.minimum(end, clear), begin)
    tops += tl.program_id(2).to(tl.int64) * tiles * count + sample
    column = tl.arange(0, PIECES * LANES)
    parts += tl.program_id(2).to(tl.int64) * tiles * PIECES * count * 2 * LANES
    parts += (column // LANES * count * 2 * LANES + column % LANES)[None, :] + sample[:, None] * 2 * LANES
    # Tokens are fetched one tile ahead, so that no load waits for another in its own step.
    token = tl.load(keys + tl.minimum(begin * TILE_K + offs_k, length - 1))
    for tile in tl.range(begin, clear, num_stages=STAGES):
        rows_k = bounded(token, tokens).to(OFFSET)
        if q_means is None:
            s = scores(q0, q1, k, rows_k * stride_ks * VECTOR, offs_d0, offs_d1, D, PRECISION)
        else:
            rows = rows_k * stride_ks * VECTOR
            s, of_means = _both_scores(q0, q1, m0, m1, k, rows, None, offs_d0, offs_d1, PIECES, D, PRECISION)
            in_block += of_means
            if (tile + 1) % TILES == 0:
                at = block_scores[:, None] + (tile * TILE_K // BLOCK_K + piece)[None, :]
                tl.store(at, (in_block * (1.0 / BLOCK_K)).to(block_scores.dtype.element_ty), mask=real[:, None])
                in_block = tl.zeros([TILE_Q, PIECES], tl.float32)
        top, acc0, acc1, first, second = _tile(s, scale_log2, top, acc0, acc1, v, rows_k * stride_vs * VECTOR, offs_d0,
                                               offs_d1, r0, r1, PIECES, D, PRECISION, False)  # fmt: skip
        tl.store(tops + tile * count, top, mask=real)
        tl.store(parts + tile * PIECES * count * 2 * LANES, first.to(parts.dtype.element_ty), mask=real[:, None])
        tl.store(
            parts + tile * PIECES * count * 2 * LANES + LANES, second.to(parts.dtype.element_ty), mask=real[:, None]
        )
        token = tl.load(keys + tl.minimum((tile + 1) * TILE_K + offs_k, length - 1))
    # The rest: the last tile if it is not full, and all tiles from the first that the key mask touches.
    seen = (clear % TILES * TILE_K + 0 * piece).to(tl.float32)  # keys of each block that are in `in_block`
    for tile in tl.range(clear, end, num_stages=STAGES):
        position = tile * TILE_K + offs_k
        visible = position < length
        rows_k = bounded(tl.load(keys + tl.minimum(position, length - 1)), tokens).to(OFFSET)
        if q_means is None:
            s = scores(q0, q1, k, rows_k * stride_ks * VECTOR, offs_d0, offs_d1, D, PRECISION)
        else:
            open_keys = visible
            if MASK_KIND != 0:
                value = tl.load(mask + rows_k.to(tl.int64) * stride_ms)
                open_keys = open_keys & (value != (0 if MASK_KIND == 1 else float("-inf")))
            rows = rows_k * stride_ks * VECTOR
            s, of_means = _both_scores(q0, q1, m0, m1, k, rows, open_keys, offs_d0, offs_d1, PIECES, D, PRECISION)
            in_block += of_means
            seen += tl.sum(tl.reshape(open_keys.to(tl.float32), [PIECES, TILE_K // PIECES]), 1)
            if ((tile + 1) % TILES == 0) | (tile + 1 == tiles):
                mean = in_block / tl.maximum(seen, 1.0)[None, :]
                block = tile * TILE_K // BLOCK_K + piece
                inside = real[:, None] & (block < tl.cdiv(length, BLOCK_K))[None, :]
                at = block_scores[:, None] + block[None, :]
                tl.store(at, mean.to(block_scores.dtype.element_ty), mask=inside)
                in_block = tl.zeros([TILE_Q, PIECES], tl.float32)
                seen = tl.zeros([PIECES], tl.float32)
        s = hide(s * scale_log2, visible, mask, rows_k, stride_ms, MASK_KIND)
        top, acc0, acc1, first, second = _tile(s, 1.0, top, acc0, acc1, v, rows_k * stride_vs * VECTOR, offs_d0,
                                               offs_d1, r0, r1, PIECES, D, PRECISION, True)  # fmt: skip
        tl.store(tops + tile * count, top, mask=real)
        tl.store(parts + tile * PIECES * count * 2 * LANES, first.to(parts.dtype.element_ty), mask=real[:, None])
        tl.store(
            parts + tile * PIECES * count * 2 * LANES + LANES, second.to(parts.dtype.element_ty), mask=real[:, None]
        )

    outputs += ((tl.program_id(2).to(tl.int64) * splits + split) * count + sample)[:, None] * D
    tl.store(outputs + offs_d0[None, :], acc0, mask=real[:, None] & (offs_d0 < D)[None, :])
    if offs_d1 is not None:
        tl.store(outputs + D0 + offs_d1[None, :], acc1, mask=real[:, None] & (offs_d1 < D - D0)[None, :])


def arm_probe(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, tables: ProbeTables, scale: float, by_error: bool,
    limits: Tensor, *, config: LaunchConfig | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`rainfusion_compile.kernels.operators.arm_probe`, which has checked the arguments.

    ``config`` and ``splits``: a launch configuration, and over how many programs to split the keys, instead of the
    defaults. Raises ValueError for block sizes that are not multiples of 16.
    """
    keys, samples, sample_keep = tables.keys, tables.samples, tables.sample_keep
    (batch, heads, _, _), device, each = q.shape, q.device, tables.block_k // tables.stride  # keys read of a block
    limited = configs.device_limits(device.index) if q.is_cuda else None
    q, scale = (-q, -scale) if scale < 0 else (q, scale)  # the softmax takes the maximum of unscaled scores
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    selects, several = tables.selected.shape[0] > 0, limits.shape[0] > 1
    operands = (rows_of(q), rows_of(k), rows_of(v), mask_rows(key_mask))
    kind = (*operands, samples.shape[0], tables.density.shape[0], tables.block_k, tables.stride)
    plan = _plan(*kind, scale, config, splits, limited, device.index, by_error, several, selects, tables.int8)
    tops, outputs, measured, errors, recall = (q.new_empty(shape, dtype=torch.float32) for shape in plan.sums)
    parts = q.new_empty(plan.parts, dtype=plan.narrow)
    choice = q.new_empty(batch, heads, dtype=torch.int32)
    with torch.cuda.device_of(q):
        masked = touched_keys(key_mask, keys, each, keys.shape[0])
        q_means = block_scores = selections = noise = rounding = None
        if tables.int8:
            noise, rounding = score_noise(q, k, samples, scale), torch.empty_like(errors[..., 0])
        if selects:
            kinds = (tables.selected, heads)
            found = selection.means(q, None, tables.order, tables.block_q, *kinds, scale, which=tables.sample_blocks)
            if plan.has_room:
                q_means, block_scores = found, q.new_empty(*found.shape[:3], sample_keep.shape[1])
            else:
                block_scores = found @ selection.means(k, key_mask, keys, each, *kinds, 1.0).transpose(2, 3)
        plan.probe(
            q, k, v, q_means, key_mask, masked, keys, samples, tables.directions, tops, parts, outputs,
            block_scores if plan.has_room else None,
        )  # fmt: skip
        if block_scores is not None:
            selections = selection.select_each(block_scores, tables)
        plan.measure(tops, parts, outputs, key_mask, samples, sample_keep, selections, tables.excess, noise, measured)
        plan.add_up(measured, errors, recall, rounding)
        plan.choose(errors, recall, rounding, tables.density, limits, choice)
    return choice, errors, recall


class _Plan(NamedTuple):
    """The launches, and the shapes of what they leave.

    sums: shapes of float32 tops, outputs, measured, errors and recall. parts, narrow: shape and dtype of what sums to
    more than float16 holds. has_room: whether the probe itself finds what samples would select.
    """

    probe: Launch
    measure: Launch
    add_up: Launch
    choose: Launch
    sums: tuple[tuple[int, ...], ...]
    parts: tuple[int, ...]
    narrow: torch.dtype
    has_room: bool


@functools.lru_cache
def _plan(
    q: Rows, k: Rows, v: Rows, key_mask: Rows | None, count: int, patterns: int, block_k: int, stride: int,
    scale: float, config: LaunchConfig | None, splits: int | None, limited: tuple[tuple[int, int], int] | None,
    device: int | None, by_error: bool, several: bool, selects: bool, int8: bool,
) -> _Plan:  # fmt: skip
    batch, heads, tokens, head_dim = q.shape
    capability, processors = limited or (None, 0)
    config = config or configs.probe_config(head_dim, q.dtype, count, capability)
    length, each = cdiv(tokens, stride), block_k // stride
    tile_k = configs.fit_tile(config.tile_k, block_k, most=block_k)  # several blocks, if few keys of each are read
    pieces = max(tile_k // each, 1)
    if max(tile_k, each) % min(tile_k, each) or pieces & (pieces - 1):
        raise ValueError(f"of blocks of {block_k} keys, {each} are read: they and tiles of {tile_k} do not fit")
    row_tiles, tiles, key_blocks = cdiv(count, config.tile_q), cdiv(length, tile_k), cdiv(tokens, block_k)
    if splits is None:
        resident = processors * (3 if head_dim <= 64 else 2)  # as many programs as fit on a multiprocessor
        splits = _split_count(batch * heads * row_tiles, tiles, resident)
    D0, D1 = configs.split_head_dim(head_dim, config.chunk)
    strides, offset = row_strides(q, k, v)
    mask_strides, kind = strides_of(key_mask, 3), mask_kind(key_mask)
    constants = {"PATTERNS": patterns, "CANDIDATES": next_power_of_2(patterns + 1 + int8, 16)}
    probe = Launch(
        probe_kernel, (splits, row_tiles, batch * heads),
        heads, heads // k.shape[1], tokens, length, count, scale * LOG2_E, *strides, *mask_strides,
        *touched_strides(key_mask, length, each),
        D=head_dim, D0=D0, D1=D1, OFFSET=offset, BLOCK_K=each, TILE_Q=config.tile_q, TILE_K=tile_k, MASK_KIND=kind,
        STAGES=config.num_stages, PRECISION=config.precision if q.dtype == torch.float32 else "tf32",
        **config.options(),
    )  # fmt: skip
    measure = Launch(
        measure_kernel, (count, batch * heads, 1),
        heads, tokens, length, count, key_blocks, splits, *mask_strides, D=head_dim,
        WIDTH=next_power_of_2(head_dim), BLOCK_K=each, TILE_K=tile_k, PIECES=32, MASK_KIND=kind, STRIDE=stride,
        SPLITS=next_power_of_2(splits), **constants, num_warps=1,
    )  # fmt: skip
    add_up = Launch(
        add_up_kernel, (batch * heads, 1, 1), count, SAMPLES=next_power_of_2(count), **constants, num_warps=1
    )
    choose = Launch(
        choose_kernel, (batch, 1, 1),
        heads, 2 if several else 0, 1, HEADS=next_power_of_2(heads), BY_ERROR=by_error, **constants,
        num_warps=max(1, next_power_of_2(heads) // 32),
    )  # fmt: skip
    shape = (batch, heads)
    tops, outputs = (*shape, tiles, count), (*shape, splits, count, head_dim)
    measured, errors, recall = (*shape, count, 2, constants["CANDIDATES"]), (*shape, patterns + 1), (*shape, patterns)
    whole = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    has_room = selects and configs.probe_has_room(head_dim, q.dtype, capability)
    sums = (tops, outputs, measured, errors, recall)
    parts = (*shape, tiles * pieces, count, 2, LANES.value)
    return _Plan(probe, measure, add_up, choose, sums, parts, whole, has_room)


def _split_count(programs: int, tiles: int, resident: int) -> int:
    """Over how many programs to split the keys: all that run at a time, each of about four tiles or more."""
    wanted = resident // programs if resident else 3
    return max(1, min(wanted, cdiv(tiles, 4), MAX_SPLITS))
