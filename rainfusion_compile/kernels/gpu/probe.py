# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The ARM probe in Triton: what share of a few sampled queries' attention each pattern would keep, and the choice.

Two launches. The first splits the keys over many programs; each reads its share once and leaves, for every sampled
query, the running maximum, the sum of weights and the part of that sum inside each pattern. The second merges the
splits of one head and chooses its pattern, so nothing waits for the host. Single keys that a pattern keeps come as
float32 weights, not bits: four bytes a key is the least that comes asynchronously, as the keys themselves do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rainfusion_compile.kernels.gpu import configs
from rainfusion_compile.kernels.gpu.configs import LOG2_E, LaunchConfig, cdiv, next_power_of_2
from rainfusion_compile.kernels.gpu.key_mask import first_masked, mask_kind
from rainfusion_compile.kernels.gpu.portable_kernel import hide, load_rows, scores, weighed
from rainfusion_compile.kernels.gpu.rows import MASK_STRIDES, VECTOR, aligned_rows, bounded, row_strides, strides_of
from rainfusion_compile.sparsity.block_tables import ProbeTables

MAX_SPLITS = 64

SIZES = "heads group tokens count key_blocks key_pattern scale_log2 target min_recall splits"
RUNTIME_ARGS = [*SIZES.split(), *(f"stride_{tensor}{axis}" for tensor in "qk" for axis in "bhs"), *MASK_STRIDES]


@triton.jit
def _absorb(s, unit, top, total, kept, block_bits, key_weight, key_pattern, offs_p, GUARD: tl.constexpr):
    """One tile of scores (times `unit` in base-2 units) into the running maximum, sum and kept sums of each row.

    Of a row, a pattern keeps the whole tile where its bit is set; else pattern `key_pattern` keeps the weighted keys.
    """
    p, fade, top = weighed(s, unit, top, GUARD)
    mass = tl.sum(p, 1)
    by_key = tl.sum(p * key_weight[None, :], 1)
    single = tl.where(offs_p == key_pattern, by_key[:, None], 0.0)
    inside = tl.where(((block_bits[:, None] >> offs_p) & 1) != 0, mass[:, None], single)
    return top, total * fade + mass, kept * fade[:, None] + inside


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def probe_kernel(
    q, k, mask, first_masked, order, samples, sample_keep, key_weight, partial,
    heads, group, tokens, count, key_blocks, key_pattern, scale_log2,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_mb, stride_mh, stride_ms, stride_fb,
    stride_fh, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, OFFSET: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, PATTERNS: tl.constexpr, PADDED: tl.constexpr,
    MASK_KIND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial[b, h, split] = rows of (maximum, sum, kept sum of each pattern), each over the `count` samples.

    Strides of q and k count VECTOR elements.
    """
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    batch = (tl.program_id(2) // heads).to(tl.int64)
    head = (tl.program_id(2) % heads).to(tl.int64)
    q += (batch * stride_qb + head * stride_qh) * VECTOR
    k += (batch * stride_kb + head // group * stride_kh) * VECTOR
    if MASK_KIND != 0:
        mask += batch * stride_mb + head * stride_mh

    offs_k = tl.arange(0, TILE_K)
    offs_p = tl.arange(0, PADDED)[None, :]
    offs_d0 = tl.arange(0, D0)
    offs_d1 = None
    sample = tl.program_id(1) * TILE_Q + tl.arange(0, TILE_Q)
    real = sample < count
    sample = tl.minimum(sample, count - 1)
    rows_q = bounded(tl.load(samples + sample), tokens).to(OFFSET)
    sample_keep += sample * key_blocks
    q0 = load_rows(q, rows_q * stride_qs * VECTOR, offs_d0, D)
    q1 = None
    if D1 > 0:
        offs_d1 = tl.arange(0, D1)
        q1 = load_rows(q + D0, rows_q * stride_qs * VECTOR, offs_d1, D - D0)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    kept = tl.zeros([TILE_Q, PADDED], tl.float32)

    tiles = tl.cdiv(tokens, TILE_K)
    share = tl.cdiv(tiles, splits)
    begin = split * share
    end = tl.minimum(begin + share, tiles)
    clear = tokens // TILE_K  # tiles for the hot loop, which knows no masks
    if MASK_KIND != 0:
        clear = tl.minimum(clear, tl.load(first_masked + batch * stride_fb + head * stride_fh) // TILE_K)
    clear = tl.maximum(tl.minimum(end, clear), begin)
    # Tokens are fetched one tile ahead, so that no load waits for another in its own step.
    token = tl.load(order + tl.minimum(begin * TILE_K + offs_k, tokens - 1))
    for tile in tl.range(begin, clear, num_stages=STAGES):
        rows_k = bounded(token, tokens).to(OFFSET)
        s = scores(q0, q1, k, rows_k * stride_ks * VECTOR, offs_d0, offs_d1, D, PRECISION)
        weight = tl.load(key_weight + tile * TILE_K + offs_k)
        block_bits = tl.load(sample_keep + tile * TILE_K // BLOCK_K).to(tl.int32)
        top, total, kept = _absorb(s, scale_log2, top, total, kept, block_bits, weight, key_pattern, offs_p, False)
        token = tl.load(order + tl.minimum((tile + 1) * TILE_K + offs_k, tokens - 1))
    # The rest: the last tile if it is not full, and all tiles from the first that the key mask touches.
    for tile in tl.range(clear, end, num_stages=STAGES):
        position = tile * TILE_K + offs_k
        visible = position < tokens
        position = tl.minimum(position, tokens - 1)
        rows_k = bounded(tl.load(order + position), tokens).to(OFFSET)
        s = scores(q0, q1, k, rows_k * stride_ks * VECTOR, offs_d0, offs_d1, D, PRECISION) * scale_log2
        s = hide(s, visible, mask, rows_k, stride_ms, MASK_KIND)
        weight = tl.load(key_weight + position)
        block_bits = tl.load(sample_keep + tile * TILE_K // BLOCK_K).to(tl.int32)
        top, total, kept = _absorb(s, 1.0, top, total, kept, block_bits, weight, key_pattern, offs_p, True)

    fields = 2 + PATTERNS
    at = partial + (tl.program_id(2).to(tl.int64) * splits + split) * fields * count + sample
    tl.store(at, top, mask=real)
    tl.store(at + count, total, mask=real)
    at_kept = at[:, None] + (2 + offs_p) * count
    tl.store(at_kept, kept, mask=real[:, None] & (offs_p < PATTERNS))


@triton.jit(do_not_specialize=RUNTIME_ARGS)
def choose_kernel(
    partial, mask, samples, choice, recall, heads, tokens, count, splits, target, min_recall,
    stride_mb, stride_mh, stride_ms, PATTERNS: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr, MASK_KIND: tl.constexpr,
):  # fmt: skip
    """One program merges the splits of one head, averages the recall over its samples, and chooses a pattern."""
    batch_head = tl.program_id(0)
    fields = 2 + PATTERNS
    partial += batch_head.to(tl.int64) * splits * fields * count
    split = tl.arange(0, SPLITS)
    offs_p = tl.arange(0, PADDED)
    sums = tl.zeros([PADDED], tl.float32)
    counted = 0.0
    for start in range(0, count, TILE):
        sample = start + tl.arange(0, TILE)
        used = sample < count
        at = partial + (split * fields * count)[:, None] + sample[None, :]
        inside = (split < splits)[:, None] & used[None, :]
        if MASK_KIND == 1:  # a padding token's query tells nothing
            token = bounded(tl.load(samples + sample, mask=used, other=0), tokens).to(tl.int64)
            own = mask + (batch_head // heads).to(tl.int64) * stride_mb + (batch_head % heads).to(tl.int64) * stride_mh
            used = used & (tl.load(own + token * stride_ms) != 0)
        tops = tl.load(at, mask=inside, other=float("-inf"))
        top = tl.max(tops, 0)
        weight = tl.exp2(tops - tl.where(top == float("-inf"), 0.0, top)[None, :])
        total = tl.sum(weight * tl.load(at + count, mask=inside, other=0.0), 0)
        total = tl.where(total == 0.0, 1.0, total)  # a query that sees no key: its recall is 0
        for pattern in tl.static_range(PATTERNS):
            kept = tl.sum(weight * tl.load(at + (2 + pattern) * count, mask=inside, other=0.0), 0)
            sums += tl.where(offs_p == pattern, tl.sum(tl.where(used, kept / total, 0.0), 0), 0.0)
        counted += tl.sum(used.to(tl.float32), 0)
    mean = sums / tl.maximum(counted, 1.0)
    real = offs_p < PATTERNS
    tl.store(recall + batch_head * PATTERNS + offs_p, mean, mask=real)
    best = tl.max(tl.where(real, mean, -1.0), 0)
    best_pattern = tl.min(tl.where(real & (mean == best), offs_p, PATTERNS), 0)
    reaching = tl.min(tl.where(real & (mean >= target) & (mean >= min_recall), offs_p, PATTERNS), 0)
    chosen = tl.where(reaching < PATTERNS, reaching, best_pattern)
    tl.store(choice + batch_head, tl.where((counted > 0) & (best >= min_recall), chosen, PATTERNS))


def arm_probe(
    q: Tensor, k: Tensor, key_mask: Tensor | None, tables: ProbeTables, scale: float, recall_target: float,
    min_recall: float, *, config: LaunchConfig | None = None, splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :func:`rainfusion_compile.kernels.operators.arm_probe`, which has checked the arguments.

    ``config`` and ``splits``: a launch configuration, and over how many programs to split the keys, instead of the
    defaults. Raises ValueError for block sizes that are not multiples of 16.
    """
    order, samples, sample_keep, key_weight, key_pattern, patterns, block_k = tables
    batch, heads, tokens, head_dim = q.shape
    count = samples.shape[0]
    capability, processors = configs.device_limits(q.device.index) if q.is_cuda else (None, 0)
    config = config or configs.probe_config(head_dim, q.dtype, count, capability)
    tile_k = configs.fit_tile(config.tile_k, block_k, most=block_k)
    row_tiles = cdiv(count, config.tile_q)
    if splits is None:
        # Programs of few warps leave room for a third one on a multiprocessor.
        resident = processors * (3 if config.num_warps <= 4 else 2)
        splits = _split_count(batch * heads * row_tiles, cdiv(tokens, tile_k), resident)
    D0, D1 = configs.split_head_dim(head_dim, config.chunk)
    q, scale = (-q, -scale) if scale < 0 else (q, scale)  # the softmax takes the maximum of unscaled scores
    q, k = aligned_rows(q), aligned_rows(k)
    strides, offset = row_strides(q, k)
    partial = torch.empty((batch, heads, splits, 2 + patterns, count), dtype=torch.float32, device=q.device)
    choice = torch.empty((batch, heads), dtype=torch.int32, device=q.device)
    recall = torch.empty((batch, heads, patterns), dtype=torch.float32, device=q.device)
    mask_strides, kind, padded = strides_of(key_mask, 3), mask_kind(key_mask), next_power_of_2(patterns)
    with torch.cuda.device_of(q):
        masked = first_masked(key_mask, order, tokens)
        probe_kernel[(splits, row_tiles, batch * heads)](
            q, k, key_mask, masked, order, samples, sample_keep, key_weight, partial, heads, heads // k.shape[1],
            tokens, count, sample_keep.shape[1], key_pattern, scale * LOG2_E, *strides, *mask_strides,
            *strides_of(masked, 2), D=head_dim, D0=D0, D1=D1, OFFSET=offset, BLOCK_K=block_k, TILE_Q=config.tile_q,
            TILE_K=tile_k, PATTERNS=patterns, PADDED=padded, MASK_KIND=kind, STAGES=config.num_stages,
            PRECISION=config.precision if q.dtype == torch.float32 else "tf32", **config.options(),
        )  # fmt: skip
        choose_kernel[(batch * heads,)](
            partial, key_mask, samples, choice, recall, heads, tokens, count, splits, recall_target, min_recall,
            *mask_strides, PATTERNS=patterns, PADDED=padded, SPLITS=next_power_of_2(splits), TILE=32, MASK_KIND=kind,
            num_warps=4,
        )  # fmt: skip
    return choice, recall


def _split_count(programs: int, tiles: int, resident: int) -> int:
    """Over how many programs to split the keys: all that run at a time, each of about four tiles or more."""
    wanted = resident // programs if resident else 3
    return max(1, min(wanted, cdiv(tiles, 4), MAX_SPLITS))
