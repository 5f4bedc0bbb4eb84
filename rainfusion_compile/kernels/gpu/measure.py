# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""From what `probe` found to the choice: each candidate's errors and recall, and which one every head takes."""

from __future__ import annotations

import triton
import triton.language as tl

from rainfusion_compile.kernels.gpu.rows import MASK_STRIDES, bounded

LANES = tl.constexpr(16)
"""Numbers kept of a value: its components in 14 directions, the sum of their squares, and 1."""
HALVINGS, FILLS = tl.constexpr(20), tl.constexpr(8)  # as on the CPU

RUNTIME_ARGS = [
    *["heads", "tokens", "length", "count", "key_blocks", "splits", "limits_stride", "candidate_stride"],
    *MASK_STRIDES,
]


@triton.jit
def share_of(tiles, splits, IN_BLOCK: tl.constexpr):
    """How many tiles of keys a split takes: whole blocks of IN_BLOCK tiles each."""
    return tl.cdiv(tl.cdiv(tiles, splits), IN_BLOCK) * IN_BLOCK


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def measure_kernel(
    tops, parts, outputs, mask, samples, sample_keep, selections, excess, noise, measured, heads, tokens,
    length, count, key_blocks, splits, stride_mb, stride_mh, stride_ms, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, PATTERNS: tl.constexpr, CANDIDATES: tl.constexpr,
    PIECES: tl.constexpr, SPLITS: tl.constexpr, MASK_KIND: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """One program puts a sample's pieces together for each candidate: measured[b, h, sample] = (errors, shares).

    CANDIDATES of each, a power of two: the squared output errors to be expected of the PATTERNS candidates, then the
    dense output's square and, if scores have noise[b, h, sample], what error that makes; and the share of attention
    that each reads. As `_measured` of the CPU engine.
    """
    sample = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(length, TILE_K)
    PIECE: tl.constexpr = min(TILE_K, BLOCK_K)
    pieces = tl.cdiv(length, PIECE)
    candidate = tl.arange(0, CANDIDATES)
    both = tl.arange(0, 2 * LANES)
    tops += batch_head * tiles * count + sample
    parts += (batch_head * tiles * (TILE_K // PIECE) * count + sample) * 2 * LANES + both[None, :]
    seen = True
    if MASK_KIND == 1:  # a padding token's query tells nothing
        token = bounded(tl.load(samples + sample), tokens).to(tl.int64)
        mask += (batch_head // heads) * stride_mb + (batch_head % heads) * stride_mh
        seen = tl.load(mask + token * stride_ms) != 0
    # The maximum of a split is that of its last tile.
    share = share_of(tiles, splits, BLOCK_K // PIECE)
    split = tl.arange(0, SPLITS)
    last = tl.minimum((split + 1) * share, tiles) - 1
    top = tl.max(tl.load(tops + last * count, mask=split * share < tiles, other=float("-inf")), 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    sample_keep += sample * key_blocks
    if selections is not None:
        selections += (batch_head * count + sample) * key_blocks
    narrow: tl.constexpr = parts.dtype.element_ty
    sums = tl.zeros([CANDIDATES, 2 * LANES], tl.float32)
    for start in range(0, pieces, PIECES):
        piece = start + tl.arange(0, PIECES)
        inside = piece < pieces
        highest = tl.load(tops + piece // (TILE_K // PIECE) * count, mask=inside, other=float("-inf"))
        weight = tl.exp2(highest - top)[:, None]
        part = tl.load(parts + (piece * count * 2 * LANES)[:, None], mask=inside[:, None], other=0.0).to(tl.float32)
        block = piece // (BLOCK_K // PIECE)
        bits = tl.load(sample_keep + block, mask=inside, other=0)
        if selections is not None:
            bits |= tl.load(selections + block, mask=inside, other=0)
        keeps = ((bits[None, :] >> candidate[:, None]) & 1) != 0
        # Rounded alike for all candidates, which are compared with one of them.
        part = part * tl.where(both[None, :] < LANES, weight, weight * weight)
        sums = tl.dot(keeps.to(tl.float32).to(narrow), part.to(narrow), sums, input_precision="tf32x3")
    lane = tl.arange(0, LANES)
    first, second = tl.split(tl.permute(tl.reshape(sums, [CANDIDATES, 2, LANES]), [0, 2, 1]))
    column = tl.arange(0, WIDTH)
    out = tl.zeros([WIDTH], tl.float32)
    for start in range(0, tl.cdiv(tiles, share)):  # the splits that have a tile
        own = outputs + ((batch_head * splits + start) * count + sample) * D
        weight = tl.exp2(tl.load(tops + (tl.minimum((start + 1) * share, tiles) - 1) * count) - top)
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
    error = tl.where(more < 0.0, dropped, tl.where(seen, more * variance / STRIDE, 0.0))
    energy = tl.where(seen, tl.sum(out * out, 0), 0.0) / (whole * whole)
    if noise is not None or STRIDE > 1:  # of all keys, whatever candidates read: sum of p^2 |v - o|^2
        squares = tl.sum(tl.where(is_all[:, None], second, 0.0), 0)[None, :]
        spread = tl.sum(tl.where(is_all, tl.sum(squares * factor, 1), 0.0), 0) / (whole * whole)
        spread = tl.where(seen, tl.maximum(spread, 0.0), 0.0)
        if noise is not None:
            rounding = spread / STRIDE * tl.load(noise + batch_head * count + sample)  # times the scores' variance
            error = tl.where(candidate > PATTERNS, rounding, error + rounding)
        energy = tl.maximum(energy - (1.0 - 1.0 / STRIDE) * spread, energy / STRIDE)
    error = tl.where(is_all, energy, error)
    kept = tl.where(more < 0.0, mass, mass + (tl.sum(tl.where(is_all, mass, 0.0), 0) - mass) / (more + 1.0))
    measured += ((batch_head * count + sample) * 2) * CANDIDATES + candidate
    tl.store(measured, error)
    tl.store(measured + CANDIDATES, kept / whole)


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def add_up_kernel(
    measured, errors, recall, rounding, count, PATTERNS: tl.constexpr, CANDIDATES: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """One program adds up the samples of one head: errors[b, h, candidate], the mean recall[b, h, candidate] and, if
    numbers are rounded, rounding[b, h], the error that this makes of dense attention."""
    batch_head = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, CANDIDATES)
    sample = tl.arange(0, SAMPLES)
    at = measured + ((batch_head * count + sample) * 2 * CANDIDATES)[:, None] + candidate[None, :]
    inside = (sample < count)[:, None]
    error = tl.load(at, mask=inside, other=0.0)
    share = tl.load(at + CANDIDATES, mask=inside, other=0.0)
    used = tl.sum(tl.where((candidate == PATTERNS)[None, :] & (share > 0.0), 1.0, 0.0))
    tl.store(errors + batch_head * (PATTERNS + 1) + candidate, tl.sum(error, 0), mask=candidate <= PATTERNS)
    if rounding is not None:
        of_all = tl.where(candidate == PATTERNS + 1, tl.sum(error, 0), 0.0)
        tl.store(rounding + batch_head, tl.sum(of_all, 0))
    mean = tl.sum(share, 0) / tl.maximum(used, 1.0)
    tl.store(recall + batch_head * PATTERNS + candidate, mean, mask=candidate < PATTERNS)


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def choose_kernel(
    errors, recall, rounding, density, limits, choice, heads, limits_stride, candidate_stride, PATTERNS: tl.constexpr,
    CANDIDATES: tl.constexpr, HEADS: tl.constexpr, BY_ERROR: tl.constexpr,
):  # fmt: skip
    """One program chooses for all heads of a sample, which HEADS fills up to a power of two.

    By error, the first of its two limits, or by recall: see `choose_by_error` and `choose_by_recall` of
    :mod:`rainfusion_compile.kernels.cpu`. candidate_stride is 1. Were that known, threads would share a head's
    candidates, as these lie side by side, and tell each other of every step; so each thread has heads of its own.
    """
    limits += tl.program_id(0) * limits_stride
    limit = tl.load(limits)
    head = tl.arange(0, HEADS)
    candidate = tl.arange(0, CANDIDATES)[None, :]
    real = head < heads
    is_pattern = candidate < PATTERNS
    row = tl.program_id(0) * heads + tl.minimum(head, heads - 1)
    column = tl.broadcast_to(candidate * candidate_stride, [HEADS, CANDIDATES])
    cost = tl.load(density + column, mask=is_pattern, other=1.0)
    energy = tl.load(errors + row * (PATTERNS + 1) + PATTERNS, mask=real, other=0.0)
    error = tl.load(errors + (row * (PATTERNS + 1))[:, None] + column, mask=is_pattern, other=0.0)
    # What is no number, or no output at all, is left alone.
    sound = (energy > 0.0) & (energy < float("inf"))
    usable = is_pattern & sound[:, None] & (error < float("inf"))
    if BY_ERROR:
        energies = tl.sum(tl.where(sound, energy, 0.0), 0)
        share = tl.where(usable, error, 0.0) / tl.where(energies > 0.0, energies, 1.0)
        usable = usable | (candidate == PATTERNS)
        if rounding is not None:
            dense = tl.load(rounding + row, mask=real & sound, other=0.0) / tl.where(energies > 0.0, energies, 1.0)
            share = tl.where(candidate == PATTERNS, dense[:, None], share)
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
        kept = tl.load(recall + (row * PATTERNS)[:, None] + column, mask=usable, other=-1.0)
        min_recall = tl.load(limits + 1)
        enough = (kept >= limit) & (kept >= min_recall)
        sparsest = tl.argmin(tl.where(enough, cost, float("inf")), 1)
        best = tl.max(kept, 1)
        chosen = tl.where(tl.max(enough.to(tl.int32), 1) != 0, sparsest, tl.argmax(kept, 1))
        chosen = tl.where(best >= min_recall, chosen, PATTERNS)
    tl.store(choice + row, chosen.to(tl.int32), mask=real)
