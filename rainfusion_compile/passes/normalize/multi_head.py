# SPDX-License-Identifier: Apache-2.0
"""`nn.MultiheadAttention`, of which Dynamo keeps `multi_head_attention_forward` whole, with its projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from rainfusion_compile.passes.attention_match import DenseReason
from rainfusion_compile.passes.graph.mutation import Order
from rainfusion_compile.passes.graph.nodes import arguments
from rainfusion_compile.passes.graph.symbolic_sizes import shape_of
from rainfusion_compile.passes.normalize.spelling import Attention, NotSdpa, Step, only_first, over, tensor_of

_UNLIKE_SDPA = (
    *("bias_k", "bias_v", "attn_mask", "static_k", "static_v"),
    *("add_zero_attn", "use_separate_proj_weight", "is_causal"),
)


def read(node: fx.Node, order: Order) -> Attention | None:
    """The attention, on ``[S, B, C]``. Raises NotSdpa if its weights are needed or it does more than self-attention."""
    fused = node.target is torch._transformer_encoder_layer_fwd
    if not fused and node.target is not F.multi_head_attention_forward:
        return None
    sizes = shape_of(node.args[0] if fused else arguments(node)["query"])
    with over(sizes[1 if fused else 0] if len(sizes) == 3 else None):
        if fused:
            raise NotSdpa("inside torch's fused encoder layer")
        return _attention(node)


def _attention(node: fx.Node) -> Attention:
    given = arguments(node)
    for name in _UNLIKE_SDPA:
        if given[name]:
            raise NotSdpa(f"multi_head_attention_forward with {name}")
    inputs = [given["query"], given["key"], given["value"]]
    if not inputs[0] is inputs[1] is inputs[2]:
        what = "multi_head_attention_forward of different inputs"
        if shape_of(inputs[0]) != shape_of(inputs[1]):
            raise NotSdpa(f"cross-attention: {what}", DenseReason.CROSS_ATTENTION)
        raise NotSdpa(what, DenseReason.TOKENS_UNKNOWN)
    if tensor_of(inputs[0]).dim() != 3:
        raise NotSdpa("multi_head_attention_forward without a batch")
    width, heads = given["embed_dim_to_check"], given["num_heads"]
    split: list[Step] = [(torch.unflatten, -1, (heads, width // heads)), (torch.permute, (1, 2, 0, 3))]
    project: Step = (F.linear, given["in_proj_weight"], given["in_proj_bias"])
    operands = [(x, [project, (torch.narrow, -1, number * width, width), *split]) for number, x in enumerate(inputs)]
    back: list[Step] = [(torch.permute, (2, 0, 1, 3)), (torch.flatten, 2)]
    mask = None
    if (padding := given["key_padding_mask"]) is not None:
        steps: list[Step] = [(torch.logical_not,)] if tensor_of(padding).dtype == torch.bool else []  # True pads
        mask = padding, [*steps, (torch.unsqueeze, 1), (torch.unsqueeze, 1)]
    back.append((F.linear, given["out_proj_weight"], given["out_proj_bias"]))
    dropout = given["dropout_p"] if given["training"] else 0.0
    return Attention(node, only_first(node, "attention weights"), operands, back, mask=mask, dropout=dropout)
