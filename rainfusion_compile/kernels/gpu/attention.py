# SPDX-License-Identifier: Apache-2.0
"""Launches block-sparse attention: which of the two kernels, in what configuration, with which arguments."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rainfusion_compile.kernels.checks import INT8_NEEDS
from rainfusion_compile.kernels.gpu import configs, selection
from rainfusion_compile.kernels.gpu.configs import LOG2_E, LaunchConfig, cdiv, fit_tile
from rainfusion_compile.kernels.gpu.int8_keys import int8_keys
from rainfusion_compile.kernels.gpu.key_mask import mask_kind, touched_keys, touched_strides
from rainfusion_compile.kernels.gpu.key_norms import key_norms
from rainfusion_compile.kernels.gpu.launch import Launch
from rainfusion_compile.kernels.gpu.portable_kernel import attention_kernel
from rainfusion_compile.kernels.gpu.rows import Rows, aligned_rows, mask_rows, row_strides, rows_of, strides_of
from rainfusion_compile.kernels.gpu.tuning import tuned_config
from rainfusion_compile.kernels.gpu.unnamed_rows import clear_unnamed_rows
from rainfusion_compile.sparsity.block_tables import AttentionTables


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, choice: Tensor, key_mask: Tensor | None, tables: AttentionTables, scale: float,
    *, config: LaunchConfig | None = None,
) -> Tensor:  # fmt: skip
    """As :func:`rainfusion_compile.kernels.operators.block_sparse_attention`, which has checked the arguments.

    What tables hold is bounded in the kernels, as looking at it here would wait for the device. ``config`` is a launch
    configuration to use instead of the table's. Raises ValueError for block sizes that are not multiples of 16, and
    where keys are to be rounded, but no kernel multiplies integers.
    """
    (batch, heads, tokens, head_dim), device = q.shape, q.device
    rows = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device=device)
    out = rows.permute(0, 2, 1, 3)
    # The softmax takes the maximum of unscaled scores, and weights of samples are put into these.
    q, scale = (-q, -scale) if scale < 0 else (q, scale or 1e-30)
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    if config is None and q.is_cuda and tables.block_q == 128:
        config = tuned_config(head_dim, q.dtype, device.index)
    capability = configs.device_limits(device.index)[0] if q.is_cuda else None
    if tables.int8 and not configs.multiplies_int8(head_dim, q.dtype, capability, tables.block_q, config):
        raise ValueError(f"{INT8_NEEDS}; got capability {capability}, head_dim {head_dim}, {q.dtype}")
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(q):
        keys, key_scales = int8_keys(k) if tables.int8 else (k, None)
        kind = (rows_of(q), rows_of(keys), rows_of(v), rows_of(out), mask_rows(key_mask))
        plan = _plan(*kind, _sizes(tables), scale, config, capability, device.index)
        lists = None
        if tables.selected.shape[0]:
            lists = selection.select_blocks(q, k, choice, key_mask, tables, scale)
        masked = touched_keys(key_mask, tables.key_order, tables.block_k, plan.listed, plan.extra)
        runs = [
            None if boxes is None else boxes.of(x)
            for x, some in zip((keys, v), plan.runs, strict=False)
            for boxes in some
        ]
        bounds = [key_norms(k) if plan.bounds_scores else None, key_scales] if plan.runs else []
        clear_unnamed_rows(rows, tables.order)
        plan.launch(q, keys, v, out, *runs, choice, *tables[:7], lists, key_mask, masked, *bounds)
    return out


class _Sizes(NamedTuple):
    """Lengths of block tables, and of blocks."""

    keys: int
    candidates: int
    query_blocks: int
    rows: int
    listed: int
    block_q: int
    block_k: int
    int8: bool


def _sizes(tables: AttentionTables) -> _Sizes:
    return _Sizes(
        tables.key_order.shape[0], tables.rows.shape[0] - 1, tables.rows.shape[1], tables.row_ptr.shape[0] - 1,
        tables.indices.shape[0], tables.block_q, tables.block_k, tables.int8,
    )  # fmt: skip


class _Plan(NamedTuple):
    """What launching takes that shapes alone tell.

    runs: of keys and of values, two pieces of columns each, if the kernel reads runs by TMA. extra, listed: from where
    to where in ``key_order`` the tokens of ``order`` are. bounds_scores: whether it asks how long keys are.
    """

    launch: Launch
    runs: tuple[tuple[Any, ...], ...]
    extra: int
    listed: int
    bounds_scores: bool


@functools.lru_cache
def _plan(
    q: Rows, k: Rows, v: Rows, out: Rows, key_mask: Rows | None, tables: _Sizes, scale: float,
    config: LaunchConfig | None, capability: tuple[int, int] | None, device: int | None,
) -> _Plan:  # fmt: skip
    (batch, heads, tokens, head_dim), block_q, block_k = q.shape, tables.block_q, tables.block_k
    config = config or configs.attention_config(head_dim, q.dtype, capability, block_q)
    tile_q = fit_tile(config.tile_q, block_q, most=block_q)
    query_tiles, key_blocks = cdiv(tokens, tile_q), cdiv(tokens, block_k)
    first_run = tables.keys // block_k - key_blocks
    D0, D1 = configs.split_head_dim(head_dim, config.chunk)
    strides, offset = row_strides(q, k, v, out)
    kernel: Any
    runs: tuple[tuple[Any, ...], ...] = ()
    constants: dict[str, Any]
    if config.warp_specialized:  # imported here, for Gluon is of no use elsewhere
        from rainfusion_compile.kernels.gpu.hopper.kernel import hopper_attention_kernel as kernel
        from rainfusion_compile.kernels.gpu.hopper.loads import run_boxes

        of_keys = (D0 // 2, 0) if tables.int8 else (D0, D1)
        widths = (k, of_keys), (v, (D0, D1))
        runs = tuple(tuple(run_boxes(x, width, config.tile_k) for width in each) for x, each in widths)
        constants = {"TILE_K": config.tile_k, "OFFSET_BITS": offset.primitive_bitwidth}
        constants |= {"K0": of_keys[0], "K1": of_keys[1]}
    else:
        kernel = attention_kernel
        constants = {"TILE_K": fit_tile(config.tile_k, block_k, most=block_k), "OFFSET": offset}
        constants |= {"PRECISION": config.precision if q.dtype == torch.float32 else "tf32"}
    launch = Launch(
        kernel, (batch * heads * query_tiles, 1, 1),
        tables.candidates, batch * heads, heads, heads // k.shape[1], tokens, first_run, tables.query_blocks,
        query_tiles, tables.rows, tables.listed, scale * LOG2_E, *strides, *strides_of(key_mask, 3),
        *touched_strides(key_mask, tables.keys, block_k),
        D=head_dim, D0=D0, D1=D1, BLOCK_Q=block_q, BLOCK_K=block_k, TILE_Q=tile_q, MASK_KIND=mask_kind(key_mask),
        DENSE_FIRST=config.dense_first, ALL_HEADS=max(128, configs.next_power_of_2(batch * heads)),
        STAGES=config.num_stages, **constants, **config.options(),
    )  # fmt: skip
    bounds = config.bounds_scores and not tables.int8 and mask_kind(key_mask) != 2  # a bias is none of a key's length
    return _Plan(launch, runs, (first_run - key_blocks) * block_k, first_run * block_k, bounds)
