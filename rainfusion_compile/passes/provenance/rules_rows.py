# SPDX-License-Identifier: Apache-2.0
"""Provenance rules of linear layers as libraries of quantization have them: each row of the output is from one row."""

from __future__ import annotations

import torch

from rainfusion_compile.passes.provenance.axis import Dims, fresh
from rainfusion_compile.passes.provenance.lineage import lineage_of
from rainfusion_compile.passes.provenance.rules import RULES, Call, Split, dims_of, fresh_dims, rule
from rainfusion_compile.passes.provenance.rules_compute import free_dim

_BITSANDBYTES = (
    "gemm_4bit gemv_4bit int8_vectorwise_quant int8_double_quant int8_linear_matmul int8_mm_dequant int8_scaled_mm"
)


@rule(
    "_weight_int4pack_mm _weight_int4pack_mm_for_cpu _weight_int4pack_mm_with_scales_and_zeros _weight_int8pack_mm"
    " _dyn_quant_matmul_4bit"
)
@rule(" ".join(f"bitsandbytes::{name}" for name in _BITSANDBYTES.split()))
def rows(call: Call) -> Dims | Split:
    """Of the first output the first operand's dims, but for the last one. Nothing is known of others."""
    if call.first.dim() == 0 or call.first.shape[:-1] != call.out.shape[:-1]:
        return fresh_dims(call.out.shape, lost=call.func._schema.name)
    (*dims, summed), (first, *others) = dims_of(call.first), call.outs
    lineage, lost = lineage_of(call.first), call.func._schema.name
    known = (*dims, free_dim(summed, fresh(first.shape[-1])))
    return [(known, lineage), *((fresh_dims(other.shape, lost=lost), lineage) for other in others)]


def row_wise(name: str) -> None:
    """Say of an operator that row i of its first output is computed from row i of its first argument, for all i.

    Rows are along the last dim: an operator from ``[..., K]`` to ``[..., N]``, as a linear layer is. Tokens are
    followed through it in all that this process compiles afterwards. Attention behind an operator that is not known
    stays dense, unless a `grid` is given.

    Args:
        name: with its namespace, ``"vendor::linear_4bit"``.

    Raises:
        ValueError: if there is no such operator, if it writes into its arguments, or if its first one is no tensor.
    """
    namespace, _, packet = str(name).partition("::")
    found = getattr(getattr(torch.ops, namespace), packet, None) if packet.isidentifier() else None
    if not isinstance(found, torch._ops.OpOverloadPacket):
        raise ValueError(f"there is no operator {name!r}; its name is 'namespace::operator', once it is registered")
    for overload in (getattr(found, each) for each in found.overloads()):
        schema = overload._schema
        first = schema.arguments[0] if schema.arguments else None
        if schema.is_mutable or first is None or first.kwarg_only or str(first.type) != "Tensor":
            raise ValueError(f"{name!r} must take a tensor first and write into none, and it is {schema}")
    RULES[name.removeprefix("aten::")] = rows
