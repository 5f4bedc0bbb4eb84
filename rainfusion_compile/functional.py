# SPDX-License-Identifier: Apache-2.0
"""Sparse video attention as a function, for those who own their model code."""

from __future__ import annotations

import functools
import logging
import math
import numbers
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rainfusion_compile.kernels import operators
from rainfusion_compile.kernels.checks import INFERENCE_ONLY, check_operands
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.layout import Grids, VideoLayout

_warn_once = functools.cache(logging.getLogger(__name__).warning)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grids,
    text: tuple[int, ...] = (),
    sparsity: float | Sequence[float] = Options.sparsity,
    patterns: Sequence[str] | None = None,
    arm: Literal["error", "recall"] = Options.arm,
    error: float | None = None,
    recall_target: float | None = None,
    min_recall: float | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """RainFusion attention over video tokens: each head takes the sparse pattern that it follows, on every call.

    Args:
        q: ``[B, H, S, D]``, bfloat16, float16 or float32; ``S = before + T * H * W + after``, video tokens in raster
            order (frame, row, column).
        k, v: ``[B, Hk, S, D]`` with ``H`` a multiple of ``Hk``.
        grid, text: ``(T, H, W)`` and ``(before, after)`` in tokens; for several videos a tuple of grids, and the text
            around and between them, one number more than there are videos.
        sparsity, patterns, arm, error, recall_target, min_recall: see :class:`rainfusion_compile.Options`.
        key_mask: None, or ``[B or 1, H or 1, S]`` (or ``[B or 1, S]``): bool (True: attend) or an additive float bias.
        scale: softmax scale, ``1 / sqrt(D)`` by default; any number.

    Returns:
        ``[B, H, S, D]`` of ``q``'s dtype, in ``[B, S, H, D]`` memory.

    Raises:
        TypeError: if an operand is no tensor, or the scale no number.
        ValueError: on shapes, dtypes, devices, a grid or options that do not fit.
        NotImplementedError: if a gradient or a tangent is needed; this is for inference.
    """
    options = Options(sparsity, patterns, arm, error, recall_target, min_recall)  # type: ignore[arg-type]
    layout = VideoLayout(grid, text)
    if isinstance(key_mask, Tensor) and key_mask.dim() == 2:
        key_mask = key_mask[:, None]
    check_operands(q, k, v, key_mask)
    if layout.tokens != q.shape[2]:
        raise ValueError(f"grid {layout.grid} with text {layout.text} makes {layout.tokens} tokens; q has {q.shape[2]}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, key_mask)):
        raise NotImplementedError(f"{INFERENCE_ONLY}: call it under torch.no_grad()")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, numbers.Real)):
        raise TypeError(f"scale must be a number; got {scale!r}")
    tables = options.tables(layout, q.device)
    if (told := tables.out_of_reach(options.ladder)) is not None:
        _warn_once(told)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    choice, *_ = operators.arm_probe(q, k, v, key_mask, *tables.probe_arguments, scale, *options.rule(q.device))
    return operators.block_sparse_attention(q, k, v, choice, key_mask, *tables.attention_arguments, scale)
