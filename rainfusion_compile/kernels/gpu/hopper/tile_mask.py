# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""What is hidden in a tile of the Hopper kernel's scores."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rainfusion_compile.kernels.gpu import key_mask as masks
from rainfusion_compile.kernels.gpu import rows as shared
from rainfusion_compile.kernels.gpu.hopper.loads import bounded

selected_keys = gluon.jit(shared.selected_keys.fn)
masked_scores = gluon.jit(masks.masked_scores.fn)


@gluon.jit
def hides_keys(tile, masked, MASK_KIND: gl.constexpr):
    """Whether a tile is not full, sampled in part, or touched by the key mask."""
    full, mixed, first, until, rest_begin, rest_end = masked
    some = (tile >= full) | (tile == mixed)
    if MASK_KIND != 0:
        some = some | ((tile >= first) & (tile < until)) | ((tile >= rest_begin) & (tile < rest_end))
    return some


@gluon.jit
def hide_keys(
    s, tile, hidden, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, MASK_KIND: gl.constexpr, SELECTS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of a tile that is not full, that the key mask touches, or of which a part alone is sampled."""
    keys, indices, own, front, sampled, row, key_order, last, samples, lift, first_run, tokens, mask, stride_ms = hidden
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
        s, visible = masked_scores(s, visible, value, MASK_KIND)
    return gl.where(visible[None, :], s, float("-inf"))
