# SPDX-License-Identifier: Apache-2.0
"""Launches block-sparse attention: which of the two kernels, in what configuration, with which arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rainfusion_compile.kernels.gpu import configs, selection
from rainfusion_compile.kernels.gpu.configs import LOG2_E, LaunchConfig, cdiv, fit_tile
from rainfusion_compile.kernels.gpu.key_mask import mask_kind, touched_keys
from rainfusion_compile.kernels.gpu.launch import launch
from rainfusion_compile.kernels.gpu.portable_kernel import attention_kernel
from rainfusion_compile.kernels.gpu.rows import aligned_rows, row_strides, strides_of
from rainfusion_compile.kernels.gpu.tuning import tuned_config
from rainfusion_compile.sparsity.block_tables import AttentionTables


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, choice: Tensor, key_mask: Tensor | None, tables: AttentionTables, scale: float,
    *, config: LaunchConfig | None = None,
) -> Tensor:  # fmt: skip
    """As :func:`rainfusion_compile.kernels.operators.block_sparse_attention`, which has checked the arguments.

    What tables hold is bounded in the kernels, as looking at it here would wait for the device. ``config`` is a launch
    configuration to use instead of the table's. Raises ValueError for block sizes that are not multiples of 16.
    """
    (batch, heads, tokens, head_dim), block_q, block_k = q.shape, tables.block_q, tables.block_k
    # Not empty: rows that `order` does not name, if it is no permutation, must not show what memory held before.
    out = torch.zeros((batch, tokens, heads, head_dim), dtype=q.dtype, device=q.device).permute(0, 2, 1, 3)
    # The softmax takes the maximum of unscaled scores, and weights of samples are put into these.
    q, scale = (-q, -scale) if scale < 0 else (q, scale or 1e-30)
    q, k, v = aligned_rows(q), aligned_rows(k), aligned_rows(v)
    strides, offset = row_strides(q, k, v, out)
    if config is None and q.is_cuda and block_q == 128:
        config = tuned_config(head_dim, q.dtype, q.device.index)
    if config is None:
        capability = configs.device_limits(q.device.index)[0] if q.is_cuda else None
        config = configs.attention_config(head_dim, q.dtype, capability, block_q)
    tile_q = fit_tile(config.tile_q, block_q, most=block_q)
    query_tiles = cdiv(tokens, tile_q)
    first_run = tables.key_order.shape[0] // block_k - cdiv(tokens, block_k)
    extra = first_run - cdiv(tokens, block_k)
    if out.numel() == 0:
        return out
    D0, D1 = configs.split_head_dim(head_dim, config.chunk)
    kernel: Any
    runs: tuple[Any, ...] = ()
    constants: dict[str, Any]
    if config.warp_specialized:  # imported here, for Gluon is of no use elsewhere
        from rainfusion_compile.kernels.gpu.hopper.kernel import hopper_attention_kernel as kernel
        from rainfusion_compile.kernels.gpu.hopper.loads import run_descriptor

        runs = tuple(run_descriptor(x, width, block_k, config.tile_k) for x in (k, v) for width in (D0, D1))
        constants = {"TILE_K": config.tile_k, "OFFSET_BITS": offset.primitive_bitwidth}
    else:
        kernel = attention_kernel
        constants = {"TILE_K": fit_tile(config.tile_k, block_k, most=block_k), "OFFSET": offset}
        constants |= {"PRECISION": config.precision if q.dtype == torch.float32 else "tf32"}
    with torch.cuda.device_of(q):
        lists = None
        if len(tables.selected):
            lists = selection.select_blocks(q, k, choice, key_mask, tables, scale)
        masked = touched_keys(key_mask, tables.key_order, block_k, first_run * block_k, extra * block_k)
        launch(
            kernel, (batch * heads * query_tiles, 1, 1),
            q, k, v, out, *runs, choice, *tables[:7], lists, key_mask, masked, tables.rows.shape[0] - 1, batch * heads,
            heads, heads // k.shape[1], tokens, first_run, tables.rows.shape[1], query_tiles,
            tables.row_ptr.shape[0] - 1, tables.indices.shape[0], scale * LOG2_E, *strides,
            *strides_of(key_mask, 3), *strides_of(masked, 2),
            D=head_dim, D0=D0, D1=D1, BLOCK_Q=block_q, BLOCK_K=block_k, TILE_Q=tile_q, MASK_KIND=mask_kind(key_mask),
            DENSE_FIRST=config.dense_first, ALL_HEADS=max(128, configs.next_power_of_2(batch * heads)),
            STAGES=config.num_stages, **constants, **config.options(),
        )  # fmt: skip
    return out
