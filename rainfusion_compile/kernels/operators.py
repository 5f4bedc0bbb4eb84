# SPDX-License-Identifier: Apache-2.0
"""The operators ``arm_probe``, ``block_sparse_attention`` and ``video_attention`` of ``torch.ops.rainfusion``.

Opaque custom operators: Triton on the devices it serves, PyTorch's own kernels on CPU, the same results. Everything
that changes what they compute is an argument, so compiled graphs and their caches can rely on the arguments alone. No
host synchronisation on GPUs, and outputs whose shapes depend on input shapes only: safe under CUDA graphs (but for
``video_attention``). Inference only: a backward pass or a tangent is refused. What they accept is told in
:mod:`checks`. A schema has no room for :class:`AttentionTables` and :class:`ProbeTables`, so their fields are arguments
of their own; engines take them as one.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rainfusion_compile.kernels import checks, cpu
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity import layout_codec
from rainfusion_compile.sparsity.block_tables import AttentionTables, ProbeTables
from rainfusion_compile.sparsity.candidates import most_candidates

_P = ParamSpec("_P")
_R = TypeVar("_R")

_ARM_PROBE = (
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor order, Tensor keys, Tensor samples, "
    "Tensor sample_blocks, Tensor sample_keep, Tensor excess, Tensor directions, Tensor density, Tensor selected, "
    "Tensor free, int stride, int block_q, int block_k, bool int8, float scale, bool by_error, "
    "Tensor limits) -> (Tensor, Tensor, Tensor)"
)
_BLOCK_SPARSE_ATTENTION = (
    "(Tensor q, Tensor k, Tensor v, Tensor choice, Tensor? key_mask, Tensor order, Tensor key_order, Tensor rows, "
    "Tensor row_ptr, Tensor indices, Tensor sampled, Tensor weight, Tensor selected, Tensor free, "
    "int block_q, int block_k, bool int8, float scale) -> Tensor"
)
_VIDEO_ATTENTION = (
    "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor layout, float[] sparsity, str patterns, bool int8, "
    "float scale, bool by_error, Tensor limits) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _operator(schema: str, *tags: torch.Tag) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Defines a function as ``torch.ops.rainfusion.NAME``.

    As `torch.library.custom_op` does, but that one compares the memory of all arguments and results in every call.
    """

    def define(compute: Callable[_P, _R]) -> Callable[_P, _R]:
        name = f"rainfusion::{compute.__name__}"
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        torch.library.impl(name, "CompositeExplicitAutograd", compute)
        torch.library.register_autograd(name, _refuse)
        operator: Callable[_P, _R] = getattr(torch.ops.rainfusion, compute.__name__).default
        return operator

    return define


def _refuse(*_: object) -> None:
    raise NotImplementedError(checks.INFERENCE_ONLY)


@_operator(_ARM_PROBE)
def arm_probe(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Adaptive Recognition Module: what each head may leave out (after RainFusion, arXiv 2505.21036, section 3).

    Takes attention of a few query rows, over all keys or an even part of them, and tells for each candidate, a pattern
    at one sparsity, how far its output is expected to be from the dense one, values included, and how much of the
    attention it reads. Then it chooses, ``by_error``: the candidates that drop most in all heads of a sample together,
    while their squared errors add up to at most ``error**2`` of the outputs' squares. Or by recall, as the paper does:
    a head takes the sparsest candidate whose recall reaches ``recall_target``, else that of highest recall, and stays
    dense if none has ``min_recall``.

    Args:
        q: ``[B, H, S, D]``, bfloat16, float16 or float32, any strides.
        k, v: ``[B, Hk, S, D]`` with ``H`` a multiple of ``Hk``.
        key_mask: None, or ``[B or 1, H or 1, S]`` in token order: bool (True: attend) or an additive float bias.
            Sampled queries whose own token a bool mask hides are not counted.
        rest: the fields of :class:`ProbeTables` (1 to 30 candidates), then ``scale``, the softmax scale, ``by_error``,
            and ``limits``, float32 ``[B or 1, 2]``: a sample's ``(error, any)`` or ``(recall_target, min_recall)``; on
            the device, so that they can change from call to call. What `options.DENSE` has keeps all heads dense.

    Returns:
        ``choice``, int32 ``[B, H]``: the candidate's number, or P for dense; ``errors``, float32 ``[B, H, P + 1]``: the
        squared output errors to be expected of the sampled rows and, last, their dense outputs' squares; ``recall``,
        float32 ``[B, H, P]``, the mean share of attention that is read.
    """
    tables, (scale, by_error, limits) = ProbeTables(*rest[:-3]), rest[-3:]
    checks.check_operands(q, k, v, key_mask)
    checks.check_probe(tables, q, limits)
    return _engine("probe", q).arm_probe(q, k, v, key_mask, tables, scale, by_error, limits)


@torch.library.register_fake("rainfusion::arm_probe")
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    tables = ProbeTables(*rest[:-3])
    checks.check_devices(q, k=k, v=v, key_mask=key_mask, limits=rest[-1], **checks.tensors_of(tables))
    return _empty_choice(q, tables.density.shape[0])


@_operator(_BLOCK_SPARSE_ATTENTION)
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, choice: Tensor, key_mask: Tensor | None, *rest: Any
) -> Tensor:
    """Attention over the key blocks that each head's pattern lists for each query block.

    The Triton kernels follow ``order`` and ``key_order`` in their loads and stores, or read runs of tokens as they lie:
    nothing is reordered, padded or copied (unless rows are scattered, repeated or do not start at 16 bytes).

    Args:
        q, k, v, key_mask: as of :func:`arm_probe`; ``v`` like ``k``.
        choice: int32 ``[B, H]``, the candidate's number for each sample and head, or P for dense.
        rest: the fields of :class:`AttentionTables`, then ``scale``, the softmax scale.

    Returns:
        ``[B, H, S, D]`` of ``q``'s dtype, in ``[B, S, H, D]`` memory as flash kernels return it. A query that sees no
        key gives 0, as ``scaled_dot_product_attention`` does.
    """
    tables, scale = AttentionTables(*rest[:-1]), rest[-1]
    checks.check_operands(q, k, v, key_mask)
    checks.check_attention(tables, q, choice)
    return _engine("attention", q).block_sparse_attention(q, k, v, choice.contiguous(), key_mask, tables, scale)


@torch.library.register_fake("rainfusion::block_sparse_attention")
def _(q: Tensor, k: Tensor, v: Tensor, choice: Tensor, key_mask: Tensor | None, *rest: Any) -> Tensor:
    tables = AttentionTables(*rest[:-1])
    checks.check_devices(q, k=k, v=v, choice=choice, key_mask=key_mask, **checks.tensors_of(tables))
    return _empty_output(q)


# The tables live in a bounded cache. One that was dropped from there would be freed under a CUDA graph that was
# recorded with its addresses, and a replay would not look at the layout at all. With this tag, Inductor leaves the
# operator out of the CUDA graphs that it records around it (graph partition), or records none.
@_operator(_VIDEO_ATTENTION, torch.Tag.cudagraph_unsafe)
def video_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, layout: Tensor, sparsity: list[float], patterns: str,
    int8: bool, scale: float, by_error: bool, limits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Probe and sparse attention over the layout of this call, for graphs that serve many resolutions.

    Args:
        q, k, v, key_mask, scale, by_error, limits: as of the other operators.
        layout: int64 on the CPU, a row of :mod:`layout_codec`. Without video, attention is dense.
        sparsity: wanted shares of dropped token pairs, in [0, 1).
        patterns: names of the patterns that heads may take, joined by commas. P is how many candidates they make
            at most.
        int8: whether queries and keys are multiplied as 8-bit integers.

    Returns:
        The attention, ``[B, H, S, D]`` in ``[B, S, H, D]`` memory; ``choice``, int32 ``[B, H]``, ``errors``, float32
        ``[B, H, P + 1]``, and ``recall``, float32 ``[B, H, P]``, by the order of this layout's tables, 0 for candidates
        that these do not have; and the layout with its rest filled in.

    Raises:
        ValueError: if the layout is of another number of tokens, or for patterns and sparsities that cannot be.
    """
    arm: Any = "error" if by_error else "recall"
    precision: Any = "int8" if int8 else "full"
    options = Options(sparsity=tuple(sparsity), patterns=tuple(patterns.split(",")), arm=arm, precision=precision)
    most = most_candidates(len(options.ladder), options.names)
    checks.check_operands(q, k, v, key_mask)
    checks.check_row(layout)
    checks.check_limits(q, limits)
    video = layout_codec.decode(layout.tolist(), q.shape[2])
    if video is None:
        mask = None if key_mask is None else key_mask[:, :, None]
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        dense = torch._C._nn.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        choice, errors, recall = _empty_choice(q, most)
        row = torch.tensor(layout_codec.NO_VIDEO, device="cpu")
        return _empty_output(q).copy_(dense), choice.fill_(most), errors.zero_(), recall.zero_(), row
    tables = options.tables(video, q.device)
    choice, errors, recall = arm_probe(q, k, v, key_mask, *tables.probe_arguments, scale, by_error, limits)
    out = block_sparse_attention(q, k, v, choice, key_mask, *tables.attention_arguments, scale)
    absent = most - len(tables.patterns)  # a small grid has fewer candidates, and an image fewer patterns
    errors, recall = F.pad(errors, (0, absent)), F.pad(recall, (0, absent))
    return out, choice, errors, recall, torch.tensor(layout_codec.encode(video), device="cpu")


@torch.library.register_fake("rainfusion::video_attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, layout: Tensor, sparsity: list[float], patterns: str,
    int8: bool, scale: float, by_error: bool, limits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    checks.check_devices(q, k=k, v=v, key_mask=key_mask, limits=limits)
    checks.check_row(layout)
    row = torch.empty_like(layout, memory_format=torch.contiguous_format)
    return _empty_output(q), *_empty_choice(q, most_candidates(len(sparsity), patterns.split(","))), row


def source_hash() -> str:
    """Hash of what compiled graphs assume of the operators (schemas and fakes), for Inductor's cache keys."""
    source = "".join(map(inspect.getsource, (inspect.getmodule(source_hash), layout_codec)))  # type: ignore[arg-type]
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _engine(part: str, q: Tensor) -> ModuleType:
    if q.device.type == "cpu":
        return cpu  # and imports no Triton
    from rainfusion_compile.kernels.gpu import attention, probe

    return probe if part == "probe" else attention


def _empty_output(q: Tensor) -> Tensor:
    """``[B, H, S, D]`` in ``[B, S, H, D]`` memory."""
    return q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)


def _empty_choice(q: Tensor, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    errors = q.new_empty(*q.shape[:2], candidates + 1, dtype=torch.float32)
    return q.new_empty(q.shape[:2], dtype=torch.int32), errors, errors.new_empty(*q.shape[:2], candidates)
