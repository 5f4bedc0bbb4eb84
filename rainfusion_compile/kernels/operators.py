# SPDX-License-Identifier: Apache-2.0
"""The operators, ``torch.ops.rainfusion.arm_probe`` and ``torch.ops.rainfusion.block_sparse_attention``.

Opaque custom operators: Triton on the devices it serves, PyTorch's own kernels on CPU, the same results. Everything
that changes what they compute is an argument, so compiled graphs and their caches can rely on the arguments alone; the
tables are those of :class:`BlockTables`. No host synchronisation on GPUs, and outputs whose
shapes depend on input shapes only: safe under CUDA graphs. Inference only: there is no autograd formula.
"""

from __future__ import annotations

import hashlib
import inspect

import torch
from torch import Tensor

from rainfusion_compile.kernels import cpu

_ARM_PROBE = (
    "(Tensor q, Tensor k, Tensor? key_mask, Tensor order, Tensor samples, Tensor sample_keep, Tensor key_weight, "
    "int key_pattern, int patterns, int block_k, float scale, float recall_target, float min_recall) "
    "-> (Tensor, Tensor)"
)
_BLOCK_SPARSE_ATTENTION = (
    "(Tensor q, Tensor k, Tensor v, Tensor choice, Tensor? key_mask, Tensor order, Tensor key_order, Tensor rows, "
    "Tensor row_ptr, Tensor indices, int block_q, int block_k, float scale) -> Tensor"
)


@torch.library.custom_op("rainfusion::arm_probe", mutates_args=(), schema=_ARM_PROBE)
def arm_probe(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    order: Tensor,
    samples: Tensor,
    sample_keep: Tensor,
    key_weight: Tensor,
    key_pattern: int,
    patterns: int,
    block_k: int,
    scale: float,
    recall_target: float,
    min_recall: float,
) -> tuple[Tensor, Tensor]:
    """Adaptive Recognition Module: which pattern each head follows (RainFusion, arXiv 2505.21036, section 3).

    Takes the exact softmax, in float32, of a few query rows over all keys, and measures each pattern's recall: the
    share of the attention mass that the pattern's key blocks hold. A head takes the sparsest pattern whose recall
    reaches ``recall_target``, else the one of highest recall, and stays dense if none reaches ``min_recall``.

    Args:
        q: ``[B, H, S, D]``, bfloat16, float16 or float32, any strides.
        k: ``[B, Hk, S, D]`` with ``H`` a multiple of ``Hk``.
        key_mask: None, or ``[B or 1, H or 1, S]`` in token order: bool (True: attend) or an additive float bias.
            Sampled queries whose own token a bool mask hides are not counted.
        order, samples, sample_keep, key_weight, key_pattern: see :class:`BlockTables`.
        patterns: number of patterns P, at most 8.
        block_k: tokens in a key block.
        scale: softmax scale.
        recall_target, min_recall: shares in [0, 1].

    Returns:
        ``choice``, int32 ``[B, H]``: the pattern's number, or P for dense; ``recall``, float32 ``[B, H, P]``.
    """
    from rainfusion_compile.kernels.gpu import probe

    return probe.arm_probe(
        q,
        k,
        key_mask,
        order,
        samples,
        sample_keep,
        key_weight,
        key_pattern,
        patterns,
        block_k,
        scale,
        recall_target,
        min_recall,
    )


@arm_probe.register_fake
def _(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    order: Tensor,
    samples: Tensor,
    sample_keep: Tensor,
    key_weight: Tensor,
    key_pattern: int,
    patterns: int,
    *_: object,
) -> tuple[Tensor, Tensor]:
    batch, heads = q.shape[:2]
    return (
        q.new_empty(batch, heads, dtype=torch.int32),
        q.new_empty(batch, heads, patterns, dtype=torch.float32),
    )


@torch.library.custom_op("rainfusion::block_sparse_attention", mutates_args=(), schema=_BLOCK_SPARSE_ATTENTION)
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    choice: Tensor,
    key_mask: Tensor | None,
    order: Tensor,
    key_order: Tensor,
    rows: Tensor,
    row_ptr: Tensor,
    indices: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    """Attention over the key blocks that each head's pattern lists for each query block.

    ``q``, ``k`` and ``v`` come as the model gives them; the Triton kernels follow ``order`` and ``key_order`` in their
    loads and stores (or read runs of tokens as they lie), nothing is reordered, padded or copied in memory (unless rows
    are scattered, repeated or do not start at 16 bytes).

    Args:
        q: ``[B, H, S, D]``, bfloat16, float16 or float32, any strides.
        k, v: ``[B, Hk, S, D]`` with ``H`` a multiple of ``Hk`` (grouped-query attention).
        choice: int32 ``[B, H]``, the pattern's number for each sample and head, or P for dense.
        key_mask: None, or ``[B or 1, H or 1, S]`` in token order: bool (True: attend) or an additive float bias.
        order, key_order, rows, row_ptr, indices: see :class:`BlockTables`.
        block_q, block_k: tokens in a query block and in a key block.
        scale: softmax scale.

    Returns:
        ``[B, H, S, D]`` of ``q``'s dtype, in ``[B, S, H, D]`` memory as flash kernels return it. A query that sees no
        key gives 0, as ``scaled_dot_product_attention`` does.
    """
    from rainfusion_compile.kernels.gpu import attention

    return attention.block_sparse_attention(
        q,
        k,
        v,
        choice,
        key_mask,
        order,
        key_order,
        rows,
        row_ptr,
        indices,
        block_q,
        block_k,
        scale,
    )


@block_sparse_attention.register_fake
def _(q: Tensor, *_args: object) -> Tensor:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).permute(0, 2, 1, 3)


arm_probe.register_kernel("cpu")(cpu.arm_probe)
block_sparse_attention.register_kernel("cpu")(cpu.block_sparse_attention)


def fingerprint() -> str:
    """Hash of what compiled graphs assume of the operators (schemas and fakes), for Inductor's cache keys."""
    from rainfusion_compile.kernels import video_attention
    from rainfusion_compile.sparsity import layout_codec

    modules = (inspect.getmodule(fingerprint), video_attention, layout_codec)
    source = "".join(map(inspect.getsource, modules))  # type: ignore[arg-type]
    return hashlib.sha256(source.encode()).hexdigest()[:16]
