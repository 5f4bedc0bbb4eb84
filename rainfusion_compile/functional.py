# SPDX-License-Identifier: Apache-2.0
"""Sparse video attention as a function, for those who own their model code."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from rainfusion_compile.kernels import operators
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import Grids, VideoLayout

_DEFAULTS = Options()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grids,
    text: tuple[int, ...] = (),
    sparsity: float = _DEFAULTS.sparsity,
    patterns: Sequence[str] = _DEFAULTS.patterns,
    recall_target: float = _DEFAULTS.recall_target,
    min_recall: float = _DEFAULTS.min_recall,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """RainFusion attention over video tokens: each head takes the sparse pattern that it follows, on every call.

    Args:
        q: ``[B, H, S, D]``, bfloat16, float16 or float32; ``S = before + T * H * W + after``, video tokens in raster
            order (frame, row, column).
        k, v: ``[B, Hk, S, D]`` with ``H`` a multiple of ``Hk``.
        grid: ``(T, H, W)`` in tokens; a tuple of such for several videos in one sequence.
        text: text tokens ``(before, after)`` the video in the sequence, or one number more than there are videos; none
            by default.
        sparsity, patterns, recall_target, min_recall: see :class:`rainfusion_compile.Options`.
        key_mask: None, or ``[B or 1, H or 1, S]`` (or ``[B or 1, S]``): bool (True: attend) or an additive float bias.
        scale: softmax scale, ``1 / sqrt(D)`` by default.

    Returns:
        ``[B, H, S, D]`` of ``q``'s dtype, in ``[B, S, H, D]`` memory.

    Raises:
        ValueError: on shapes, a grid or options that do not fit.
        NotImplementedError: if a gradient is needed; this is for inference.
    """
    options = Options(
        sparsity=sparsity,
        patterns=tuple(patterns),  # type: ignore[arg-type]
        recall_target=recall_target,
        min_recall=min_recall,
    )
    layout = VideoLayout(grid, text)
    if key_mask is not None and key_mask.dim() == 2:
        key_mask = key_mask[:, None]
    _check(q, k, v, key_mask, layout)
    tables = block_tables(layout, sparsity=options.sparsity, patterns=options.patterns, device=q.device)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    choice, _ = operators.arm_probe(q, k, key_mask, *tables.probe_arguments, scale, recall_target, min_recall)
    return operators.block_sparse_attention(q, k, v, choice, key_mask, *tables.attention_arguments, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, layout: VideoLayout) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q must be [B, H, S, D] and k, v [B, Hk, S, D]; got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if layout.tokens != q.shape[2]:
        raise ValueError(f"grid {layout.grid} with text {layout.text} makes {layout.tokens} tokens; q has {q.shape[2]}")
    if key_mask is not None:
        shape = tuple(key_mask.shape)
        if len(shape) != 3 or shape[0] not in (1, len(q)) or shape[1] not in (1, q.shape[1]) or shape[2] != q.shape[2]:
            raise ValueError(f"key_mask must be [B or 1, H or 1, S] or [B or 1, S]; got {list(shape)}")
    if any(x.requires_grad for x in (q, k, v)):
        import torch

        if torch.is_grad_enabled():
            raise NotImplementedError("sparse video attention has no gradient; call it under torch.no_grad()")
