# SPDX-License-Identifier: Apache-2.0
"""The operator ``torch.ops.rainfusion.video_attention``: probe and sparse attention over a layout given at run time.

For graphs that serve many resolutions. Where a graph has one resolution only, its tables are part of it, and the two
operators of :mod:`rainfusion_compile.kernels.operators` take them. This one takes the layout as numbers on the host,
looks up the tables and does what those two do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rainfusion_compile.kernels import operators
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout_codec import NO_VIDEO, decode, encode

_VIDEO_ATTENTION = (
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor layout, float sparsity, str patterns, float scale, "
    "float recall_target, float min_recall) -> (Tensor, Tensor, Tensor, Tensor)"
)


# The tables live in a bounded cache. One that was dropped from there would be freed under a CUDA graph that was
# recorded with its addresses, and a replay would not look at the layout at all. With this tag, Inductor leaves the
# operator out of the CUDA graphs that it records around it (graph partition), or records none.
@torch.library.custom_op(
    "rainfusion::video_attention", mutates_args=(), schema=_VIDEO_ATTENTION, tags=(torch.Tag.cudagraph_unsafe,)
)
def video_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    layout: Tensor,
    sparsity: float,
    patterns: str,
    scale: float,
    recall_target: float,
    min_recall: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RainFusion attention over the layout of this call.

    Args:
        q, k, v, key_mask, scale: as of :func:`~rainfusion_compile.kernels.operators.block_sparse_attention`.
        layout: int64 on the CPU, a row of :mod:`layout_codec`. Without video, attention is dense.
        sparsity: wanted share of dropped token pairs, in [0, 1).
        patterns: names of the patterns that heads may take, joined by commas; P of them.
        recall_target, min_recall: as of :func:`~rainfusion_compile.kernels.operators.arm_probe`.

    Returns:
        The attention, ``[B, H, S, D]`` in ``[B, S, H, D]`` memory; ``choice``, int32 ``[B, H]``, and ``recall``,
        float32 ``[B, H, P]``, by the order of this layout's tables, 0 for patterns that these do not have; and the
        layout with its rest filled in.

    Raises:
        ValueError: if the layout is of another number of tokens.
    """
    names: Any = tuple(patterns.split(","))
    batch, heads, tokens, dim = q.shape
    video = decode(layout.tolist(), tokens)
    if video is None:
        mask = None if key_mask is None else key_mask[:, :, None]
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=heads != k.shape[1])
        out = q.new_empty(batch, tokens, heads, dim).permute(0, 2, 1, 3).copy_(dense)
        choice = torch.full((batch, heads), len(names), dtype=torch.int32, device=q.device)
        recall = torch.zeros(batch, heads, len(names), dtype=torch.float32, device=q.device)
        return out, choice, recall, torch.tensor(NO_VIDEO, device="cpu")
    tables = block_tables(video, sparsity=sparsity, patterns=names, device=q.device)
    choice, recall = operators.arm_probe(q, k, key_mask, *tables.probe_arguments, scale, recall_target, min_recall)
    out = operators.block_sparse_attention(q, k, v, choice, key_mask, *tables.attention_arguments, scale)
    recall = F.pad(recall, (0, len(names) - len(tables.patterns)))  # an image has fewer patterns than a video
    return out, choice, recall, torch.tensor(encode(video), device="cpu")


@video_attention.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout, patterns = args[3], args[5]
    batch, heads, tokens, dim = q.shape
    return (
        q.new_empty(batch, tokens, heads, dim).permute(0, 2, 1, 3),
        q.new_empty(batch, heads, dtype=torch.int32),
        q.new_empty(batch, heads, len(patterns.split(",")), dtype=torch.float32),
        torch.empty_like(layout, memory_format=torch.contiguous_format),
    )
