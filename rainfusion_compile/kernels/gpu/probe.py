# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The ARM probe in Triton: what each candidate would do to the output of a few sampled queries, and the choice.

Four launches. The first splits keys and values over many programs; each reads its share once and leaves, for every
sampled query and tile of keys, the sums of weights and of squared weights, times the tile's values, their squares and
1. Values are seen in a few random directions: the squared length of a difference survives that on average, at any
head_dim. (The dense output, which all errors are compared with, is kept whole.) The second puts the tiles that each
candidate reads together, the third adds up the samples of a head, the fourth chooses for all heads of a sample; nothing
of this waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rainfusion_compile.kernels.gpu import configs, selection
from rainfusion_compile.kernels.gpu.configs import LOG2_E, LaunchConfig, cdiv, next_power_of_2
from rainfusion_compile.kernels.gpu.key_mask import first_masked, mask_kind
from rainfusion_compile.kernels.gpu.portable_kernel import hide, load_rows, scores, weighed
from rainfusion_compile.kernels.gpu.rows import MASK_STRIDES, VECTOR, aligned_rows, bounded, row_strides, strides_of
from rainfusion_compile.kernels.gpu.selection import SHIFTS, rising
from rainfusion_compile.sparsity.block_tables import ProbeTables

MAX_SPLITS = 64
LANES = tl.constexpr(16)
"""Numbers kept of a value: its components in 14 directions, the sum of their squares, and 1."""
HALVINGS, FILLS = tl.constexpr(32), tl.constexpr(8)  # as on the CPU

SIZES = "heads group tokens count key_blocks scale_log2 limits_stride splits"
RUNTIME_ARGS = [*SIZES.split(), *(f"stride_{tensor}{axis}" for tensor in "qkv" for axis in "bhs"), *MASK_STRIDES]


@triton.jit
def _tile(s, unit, top, acc0, acc1, v, rows, offs_d0, offs_d1, r0, r1, D: tl.constexpr, PRECISION: tl.constexpr,
          GUARD: tl.constexpr):  # fmt: skip
    """Scores (times `unit` in base-2 units) of a tile: the new maximum, the output so far, and the tile's own sums by
    weights and by squared weights."""
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
    narrow: tl.constexpr = tl.float32 if v.dtype.element_ty == tl.float32 else tl.bfloat16  # float16 holds no squares
    lanes = lanes.to(narrow)
    first = tl.dot(p.to(narrow), lanes, input_precision=PRECISION)
    return top, acc0, acc1, first, tl.dot((p * p).to(narrow), lanes, input_precision=PRECISION)


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def probe_kernel(
    q, k, v, mask, first_masked, order, samples, directions, tops, parts, outputs,
    heads, group, tokens, count, scale_log2, stride_qb, stride_qh, stride_qs, stride_kb, stride_kh,
    stride_ks, stride_vb, stride_vh, stride_vs, stride_mb, stride_mh, stride_ms, stride_fb, stride_fh,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, OFFSET: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, MASK_KIND: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What a split of the keys gives each sample, in weights relative to the running maximum in base-2 units.

    tops[b, h, tile, sample]: the maximum up to this tile. parts[b, h, tile, sample, 2, lane]: the tile's sums by
    weights and by squared weights. outputs[b, h, split, sample, D]: the split's weighted sum of values. Strides of q, k
    and v count VECTOR elements.
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
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    acc0 = tl.zeros([TILE_Q, D0], tl.float32)
    acc1 = acc0  # not used without a second chunk
    if D1 > 0:
        acc1 = tl.zeros([TILE_Q, D1], tl.float32)

    tiles = tl.cdiv(tokens, TILE_K)
    share = tl.cdiv(tiles, splits)
    begin = split * share
    end = tl.minimum(begin + share, tiles)
    clear = tokens // TILE_K  # tiles for the hot loop, which knows no masks
    if MASK_KIND != 0:
        clear = tl.minimum(clear, tl.load(first_masked + batch * stride_fb + head * stride_fh) // TILE_K)
    clear = tl.maximum(tl.minimum(end, clear), begin)
    tops += tl.program_id(2).to(tl.int64) * tiles * count + sample
    parts += tl.program_id(2).to(tl.int64) * tiles * count * 2 * LANES + sample[:, None] * 2 * LANES + lane[None, :]
    # Tokens are fetched one tile ahead, so that no load waits for another in its own step.
    token = tl.load(order + tl.minimum(begin * TILE_K + offs_k, tokens - 1))
    for tile in tl.range(begin, clear, num_stages=STAGES):
        rows_k = bounded(token, tokens).to(OFFSET)
        s = scores(q0, q1, k, rows_k * stride_ks * VECTOR, offs_d0, offs_d1, D, PRECISION)
        top, acc0, acc1, first, second = _tile(s, scale_log2, top, acc0, acc1, v, rows_k * stride_vs * VECTOR, offs_d0,
                                               offs_d1, r0, r1, D, PRECISION, False)  # fmt: skip
        tl.store(tops + tile * count, top, mask=real)
        tl.store(parts + tile * count * 2 * LANES, first.to(parts.dtype.element_ty), mask=real[:, None])
        tl.store(parts + tile * count * 2 * LANES + LANES, second.to(parts.dtype.element_ty), mask=real[:, None])
        token = tl.load(order + tl.minimum((tile + 1) * TILE_K + offs_k, tokens - 1))
    # The rest: the last tile if it is not full, and all tiles from the first that the key mask touches.
    for tile in tl.range(clear, end, num_stages=STAGES):
        position = tile * TILE_K + offs_k
        visible = position < tokens
        rows_k = bounded(tl.load(order + tl.minimum(position, tokens - 1)), tokens).to(OFFSET)
        s = scores(q0, q1, k, rows_k * stride_ks * VECTOR, offs_d0, offs_d1, D, PRECISION) * scale_log2
        s = hide(s, visible, mask, rows_k, stride_ms, MASK_KIND)
        top, acc0, acc1, first, second = _tile(s, 1.0, top, acc0, acc1, v, rows_k * stride_vs * VECTOR, offs_d0,
                                               offs_d1, r0, r1, D, PRECISION, True)  # fmt: skip
        tl.store(tops + tile * count, top, mask=real)
        tl.store(parts + tile * count * 2 * LANES, first.to(parts.dtype.element_ty), mask=real[:, None])
        tl.store(parts + tile * count * 2 * LANES + LANES, second.to(parts.dtype.element_ty), mask=real[:, None])

    outputs += ((tl.program_id(2).to(tl.int64) * splits + split) * count + sample)[:, None] * D
    tl.store(outputs + offs_d0[None, :], acc0, mask=real[:, None] & (offs_d0 < D)[None, :])
    if offs_d1 is not None:
        tl.store(outputs + D0 + offs_d1[None, :], acc1, mask=real[:, None] & (offs_d1 < D - D0)[None, :])


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def measure_kernel(
    tops, parts, outputs, mask, samples, sample_keep, scores, thresholds, free, excess, measured, heads, tokens, count,
    key_blocks, splits, stride_mb, stride_mh, stride_ms, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr, PATTERNS: tl.constexpr, CANDIDATES: tl.constexpr, TILES: tl.constexpr,
    MASK_KIND: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One program puts a sample's tiles together for each candidate: measured[b, h, sample] = (errors, shares).

    CANDIDATES of each, a power of two: the squared output errors to be expected of the PATTERNS candidates, then the
    dense output's square; and the share of attention that each reads. As `_measured` of the CPU engine.
    """
    sample = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(tokens, TILE_K)
    candidate = tl.arange(0, CANDIDATES)
    lane = tl.arange(0, LANES)
    tops += batch_head * tiles * count + sample
    parts += (batch_head * tiles * count + sample) * 2 * LANES + lane[None, :]
    seen = True
    if MASK_KIND == 1:  # a padding token's query tells nothing
        token = bounded(tl.load(samples + sample), tokens).to(tl.int64)
        mask += (batch_head // heads) * stride_mb + (batch_head % heads) * stride_mh
        seen = tl.load(mask + token * stride_ms) != 0
    highest = tl.full([TILES], float("-inf"), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        highest = tl.maximum(highest, tl.load(tops + tile * count, mask=tile < tiles, other=float("-inf")))
    top = tl.max(highest, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    threshold = tl.full([CANDIDATES], -1, tl.int32)
    if scores is not None:
        scores += (batch_head * count + sample) * key_blocks
        threshold = tl.load(thresholds + (batch_head * count + sample) * CANDIDATES + candidate)
    first = tl.zeros([CANDIDATES, LANES], tl.float32)
    second = tl.zeros([CANDIDATES, LANES], tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = tile < tiles
        weight = tl.exp2(tl.load(tops + tile * count, mask=inside, other=float("-inf")) - top)[:, None]
        block = tile * TILE_K // BLOCK_K
        bits = tl.load(sample_keep + sample * key_blocks + block, mask=inside, other=0)
        keeps = ((bits[None, :] >> candidate[:, None]) & 1) != 0
        if scores is not None:
            value = rising(tl.load(scores + block, mask=inside, other=0.0), SHIFT)
            value = tl.where(tl.load(free + block, mask=inside, other=0) != 0, value, -1)
            keeps = keeps | ((threshold >= 0)[:, None] & (value[None, :] >= threshold[:, None]))
        keeps = keeps.to(tl.float32)
        at = parts + (tile * count * 2 * LANES)[:, None]
        part = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
        first = tl.dot(keeps, part * weight, first, input_precision="tf32x3")
        part = tl.load(at + LANES, mask=inside[:, None], other=0.0).to(tl.float32)
        second = tl.dot(keeps, part * weight * weight, second, input_precision="tf32x3")
    column = tl.arange(0, WIDTH)
    out = tl.zeros([WIDTH], tl.float32)
    for split in range(0, tl.cdiv(tiles, tl.cdiv(tiles, splits))):  # those that have a tile
        last = tl.minimum((split + 1) * tl.cdiv(tiles, splits), tiles) - 1
        own = outputs + ((batch_head * splits + split) * count + sample) * D
        weight = tl.exp2(tl.load(tops + last * count) - top)
        out += tl.load(own + column, mask=column < D, other=0.0) * weight
    first = tl.where(seen, first, 0.0)

    is_value = (lane < LANES - 2)[None, :]
    is_all = candidate == PATTERNS
    mass = tl.sum(tl.where((lane == LANES - 1)[None, :], first, 0.0), 1)
    whole = tl.sum(tl.where(is_all, mass, 0.0), 0)
    whole = tl.where(whole == 0.0, 1.0, whole)
    output = tl.where(is_value, first, 0.0) / tl.where(mass == 0.0, 1.0, mass)[:, None]
    dense = tl.sum(tl.where(is_all[:, None], output, 0.0), 0)[None, :]
    difference = output - tl.where(is_all[:, None], 0.0, dense)
    dropped = tl.sum(difference * difference, 1)
    rest = tl.sum(tl.where(is_all[:, None], second, 0.0), 0)[None, :] - second
    # Of the rest's keys: sum p^2 |v|^2 - 2 o sum p^2 v + |o|^2 sum p^2.
    factor = tl.where(is_value, -2.0 * dense, tl.where((lane == LANES - 2)[None, :], 1.0, tl.sum(dense * dense)))
    variance = tl.maximum(tl.sum(rest * factor, 1), 0.0) / (whole * whole)
    more = tl.load(excess + candidate * count + sample, mask=candidate < PATTERNS, other=-1.0)
    error = tl.where(more < 0.0, dropped, tl.where(seen, more * variance, 0.0))
    error = tl.where(is_all, tl.where(seen, tl.sum(out * out, 0), 0.0) / (whole * whole), error)
    kept = tl.where(more < 0.0, mass, mass + (tl.sum(tl.where(is_all, mass, 0.0), 0) - mass) / (more + 1.0))
    measured += ((batch_head * count + sample) * 2) * CANDIDATES + candidate
    tl.store(measured, error)
    tl.store(measured + CANDIDATES, kept / whole)


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def add_up_kernel(
    measured, errors, recall, count, PATTERNS: tl.constexpr, CANDIDATES: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """One program adds up the samples of one head: errors[b, h, candidate] and the mean recall[b, h, candidate]."""
    batch_head = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, CANDIDATES)
    sample = tl.arange(0, SAMPLES)
    at = measured + ((batch_head * count + sample) * 2 * CANDIDATES)[:, None] + candidate[None, :]
    inside = (sample < count)[:, None]
    error = tl.load(at, mask=inside, other=0.0)
    share = tl.load(at + CANDIDATES, mask=inside, other=0.0)
    used = tl.sum(tl.where((candidate == PATTERNS)[None, :] & (share > 0.0), 1.0, 0.0))
    tl.store(errors + batch_head * (PATTERNS + 1) + candidate, tl.sum(error, 0), mask=candidate <= PATTERNS)
    mean = tl.sum(share, 0) / tl.maximum(used, 1.0)
    tl.store(recall + batch_head * PATTERNS + candidate, mean, mask=candidate < PATTERNS)


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def choose_kernel(
    errors, recall, density, limits, choice, heads, limits_stride, PATTERNS: tl.constexpr,
    CANDIDATES: tl.constexpr, HEADS: tl.constexpr, BY_ERROR: tl.constexpr,
):  # fmt: skip
    """One program chooses for all heads of a sample, which HEADS fills up to a power of two.

    By error, the first of its two limits, or by recall: see `choose_by_error` and `choose_by_recall` of
    :mod:`rainfusion_compile.kernels.cpu`.
    """
    limits += tl.program_id(0) * limits_stride
    limit = tl.load(limits)
    head = tl.arange(0, HEADS)
    candidate = tl.arange(0, CANDIDATES)[None, :]
    real = head < heads
    is_pattern = candidate < PATTERNS
    row = tl.program_id(0) * heads + tl.minimum(head, heads - 1)
    cost = tl.load(density + candidate, mask=is_pattern, other=1.0)
    at = errors + (row * (PATTERNS + 1))[:, None] + candidate
    energy = tl.load(errors + row * (PATTERNS + 1) + PATTERNS, mask=real, other=0.0)
    error = tl.load(at, mask=is_pattern, other=0.0)
    # What is no number, or no output at all, is left alone.
    sound = (energy > 0.0) & (energy < float("inf"))
    usable = is_pattern & sound[:, None] & (error < float("inf"))
    if BY_ERROR:
        energies = tl.sum(tl.where(sound, energy, 0.0), 0)
        share = tl.where(usable, error, 0.0) / tl.where(energies > 0.0, energies, 1.0)
        usable = usable | (candidate == PATTERNS)
        low = -16.0
        high = 64.0
        budget = limit * tl.abs(limit)
        free = (usable & (share <= tl.minimum(budget, 0.0))) | (candidate == PATTERNS)
        chosen = tl.argmin(tl.where(free, cost, float("inf")) + 0.0 * share, 1)
        for _ in range(HALVINGS):
            price = (low + high) * 0.5
            total = tl.where(usable, cost + tl.exp2(price) * share, float("inf"))
            taken = tl.argmin(total, 1)
            spent = tl.sum(tl.sum(tl.where(candidate == taken[:, None], share, 0.0), 1), 0)
            fits = spent <= budget
            chosen = tl.where(fits, taken, chosen)
            high = tl.where(fits, price, high)
            low = tl.where(fits, low, price)
        for _ in range(FILLS):
            is_chosen = candidate == chosen[:, None]
            spent = tl.sum(tl.where(is_chosen, share, 0.0), 1)
            kept = tl.sum(tl.where(is_chosen, cost, 0.0), 1)
            fits = usable & (share - spent[:, None] <= budget - tl.sum(spent, 0)) & real[:, None]
            gain = tl.where(fits, kept[:, None] - cost, 0.0)
            largest = tl.max(gain, 1)
            takes = (head == tl.argmax(largest, 0)) & (largest > 0.0)
            chosen = tl.where(takes, tl.argmax(gain, 1), chosen)
    else:
        kept = tl.load(recall + (row * PATTERNS)[:, None] + candidate, mask=usable, other=-1.0)
        min_recall = tl.load(limits + 1)
        enough = (kept >= limit) & (kept >= min_recall)
        sparsest = tl.argmin(tl.where(enough, cost, float("inf")), 1)
        best = tl.max(kept, 1)
        chosen = tl.where(tl.max(enough.to(tl.int32), 1) != 0, sparsest, tl.argmax(kept, 1))
        chosen = tl.where(best >= min_recall, chosen, PATTERNS)
    tl.store(choice + row, chosen.to(tl.int32), mask=real)


def arm_probe(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, tables: ProbeTables, scale: float, by_error: bool,
    limits: Tensor, *, config: LaunchConfig | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`rainfusion_compile.kernels.operators.arm_probe`, which has checked the arguments.

    ``config`` and ``splits``: a launch configuration, and over how many programs to split the keys, instead of the
    defaults. Raises ValueError for block sizes that are not multiples of 16.
    """
    order, samples, sample_keep, block_k = tables.order, tables.samples, tables.sample_keep, tables.block_k
    batch, heads, tokens, head_dim = q.shape
    count, patterns = samples.shape[0], tables.density.shape[0]
    capability, processors = configs.device_limits(q.device.index) if q.is_cuda else (None, 0)
    config = config or configs.probe_config(head_dim, q.dtype, count, capability)
    tile_k = configs.fit_tile(config.tile_k, block_k, most=block_k)
    row_tiles, tiles = cdiv(count, config.tile_q), cdiv(tokens, tile_k)
    if splits is None:
        # Programs of few warps leave room for a third one on a multiprocessor.
        resident = processors * (3 if config.num_warps <= 4 else 2)
        splits = _split_count(batch * heads * row_tiles, tiles, resident)
    D0, D1 = configs.split_head_dim(head_dim, config.chunk)
    q, scale = (-q, -scale) if scale < 0 else (q, scale)  # the softmax takes the maximum of unscaled scores
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    strides, offset = row_strides(q, k, v)
    constants = {"PATTERNS": patterns, "CANDIDATES": next_power_of_2(patterns + 1, 16)}
    tops = q.new_empty(batch, heads, tiles, count, dtype=torch.float32)
    whole = torch.float32 if q.dtype == torch.float32 else torch.bfloat16  # what sums to more than float16 holds
    parts = q.new_empty(*tops.shape, 2, LANES.value, dtype=whole)
    outputs = q.new_empty(batch, heads, splits, count, head_dim, dtype=torch.float32)
    measured = q.new_empty(batch, heads, count, 2, constants["CANDIDATES"], dtype=torch.float32)
    choice = q.new_empty(batch, heads, dtype=torch.int32)
    errors = q.new_empty(batch, heads, patterns + 1, dtype=torch.float32)
    recall = q.new_empty(batch, heads, patterns, dtype=torch.float32)
    mask_strides, kind = strides_of(key_mask, 3), mask_kind(key_mask)
    with torch.cuda.device_of(q):
        masked = first_masked(key_mask, order, tokens)
        probe_kernel[(splits, row_tiles, batch * heads)](
            q, k, v, key_mask, masked, order, samples, tables.directions, tops, parts, outputs, heads,
            heads // k.shape[1], tokens, count, scale * LOG2_E, *strides, *mask_strides, *strides_of(masked, 2),
            D=head_dim, D0=D0, D1=D1, OFFSET=offset, TILE_Q=config.tile_q, TILE_K=tile_k, MASK_KIND=kind,
            STAGES=config.num_stages,
            PRECISION=config.precision if q.dtype == torch.float32 else "tf32", **config.options(),
        )  # fmt: skip
        scores = thresholds = None
        if len(tables.selected):
            scores = selection.block_scores(q, k, key_mask, tables, scale, which=tables.sample_blocks)
            thresholds = selection.thresholds(scores, tables, constants["CANDIDATES"])
        measure_kernel[(count, batch * heads)](
            tops, parts, outputs, key_mask, samples, sample_keep, scores, thresholds, tables.free, tables.excess,
            measured, heads, tokens, count, sample_keep.shape[1], splits, *mask_strides, D=head_dim,
            WIDTH=next_power_of_2(head_dim), BLOCK_K=block_k, TILE_K=tile_k, TILES=64, MASK_KIND=kind,
            SHIFT=SHIFTS[q.dtype], **constants, num_warps=1,
        )  # fmt: skip
        add_up_kernel[(batch * heads,)](
            measured, errors, recall, count, SAMPLES=next_power_of_2(count), **constants, num_warps=1
        )
        choose_kernel[(batch,)](
            errors, recall, tables.density, limits, choice, heads, 2 if len(limits) > 1 else 0,
            HEADS=next_power_of_2(heads), BY_ERROR=by_error, **constants, num_warps=4,
        )  # fmt: skip
    return choice, errors, recall


def _split_count(programs: int, tiles: int, resident: int) -> int:
    """Over how many programs to split the keys: all that run at a time, each of about four tiles or more."""
    wanted = resident // programs if resident else 3
    return max(1, min(wanted, cdiv(tiles, 4), MAX_SPLITS))
