# SPDX-License-Identifier: Apache-2.0
"""Matching: which attentions of a Dynamo graph are self-attention over a video, and why the others are not.

Every `scaled_dot_product_attention` of the graph gets an `AttentionMatch`. One with ``reason`` None may be made sparse;
all others stay dense, for a reason that a user can read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from rainfusion_compile.passes.axes import same
from rainfusion_compile.passes.layout import Grid, Text, find_layout
from rainfusion_compile.passes.provenance import Tokens, hint_of, is_sdpa, sdpa_arguments, subgraphs, trace_tokens

_DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class AttentionMatch:
    """One attention of a graph.

    Attributes:
        node: the SDPA node; graph: the name of the graph it stands in, "" for the graph itself.
        name: the module that calls it, such as ``blocks.0.attn1``, or the node's own name.
        query, key, value: nodes of ``[B, H, S, D]`` tensors. key_mask: node of a mask that broadcasts to
            ``[B, H, queries, S]`` and is the same for all queries, or None.
        key_mask_kind: "bool" (True attends) or "additive".
        scale: factor of the logits.
        batch, heads, kv_heads, tokens, head_dim: sizes of the query (and heads of the key); tokens of a cross-attention
            are those of the query. None where they are known at run time only.
        dtype: of query, key and value. out_dtype: of the result, another one under autocast. device: of the result.
        grid: ``(T, H, W)`` and text: ``(before, after)`` in tokens; None where unknown. tokens = before + T*H*W + after.
        reason: why it stays dense; None if it can be sparse.
    """

    node: fx.Node
    graph: str
    name: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    key_mask: fx.Node | None = None
    key_mask_kind: Literal["bool", "additive"] | None = None
    scale: float | None = None
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    tokens: int | None = None
    head_dim: int | None = None
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    device: torch.device | None = None
    grid: Grid | None = None
    text: Text | None = None
    reason: str | None = None


def bind(node: fx.Node) -> dict[str, Any]:
    """All eight arguments of an SDPA node by name, with their defaults.

    Raises:
        ValueError: if the node calls something else.
    """
    if not is_sdpa(node):
        raise ValueError(f"not a scaled_dot_product_attention: {node.format_node()}")
    return {**_DEFAULTS, **sdpa_arguments(node)}


def runs_on_cpu_or_cuda(device: torch.device) -> bool:
    """The devices that the operators have engines for."""
    return device.type in ("cpu", "cuda")


def find_attentions(
    gm: fx.GraphModule,
    *,
    grid: Grid | None = None,
    text: Text | None = None,
    min_tokens: int = 0,
    supports_device: Callable[[torch.device], bool] = runs_on_cpu_or_cuda,
) -> list[AttentionMatch]:
    """All attentions of a Dynamo graph, in the order they run, each with its layout or with why it stays dense.

    Args:
        gm: a graph as Dynamo hands it to a backend; it is not changed.
        grid, text: the layout where it is known from outside; applies to the self-attentions with that many tokens.
        min_tokens: attentions over fewer tokens stay dense.
        supports_device: which devices can run the sparse operators.
    """
    nodes = [node for node in gm.graph.nodes if is_sdpa(node)]
    traced = trace_tokens(gm) if nodes else {}
    matches = []
    for node in nodes:
        match = _describe(node, "")
        match.reason = _objection(match, supports_device) or _objection_to_tokens(match, traced[node], min_tokens)
        match.reason = _lay_out(match, traced[node], grid, text) or match.reason
        matches.append(match)
    for name, graph in subgraphs(gm):
        for node in filter(is_sdpa, graph.graph.nodes):
            match = _describe(node, name)
            match.reason = f"inside a higher-order operator ({name})"
            matches.append(match)
    return matches


def _describe(node: fx.Node, graph: str) -> AttentionMatch:
    given = bind(node)
    match = AttentionMatch(node, graph, _module_name(node), given["query"], given["key"], given["value"])
    q, k, out = (_example(item) for item in (match.query, match.key, node))
    if q is not None and q.dim() == 4:
        match.batch, match.heads, match.tokens, match.head_dim = map(hint_of, q.shape)
        match.dtype = q.dtype
    if k is not None and k.dim() == 4:
        match.kv_heads = hint_of(k.shape[1])
    if out is not None:
        match.out_dtype, match.device = out.dtype, out.device
    if isinstance(given["scale"], (int, float)):
        match.scale = float(given["scale"])
    elif given["scale"] is None and match.head_dim:
        match.scale = 1 / math.sqrt(match.head_dim)
    return match


def _example(node: Any) -> Tensor | None:
    value = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _module_name(node: fx.Node) -> str:
    """``L['self']._modules['blocks']...`` and the like as ``blocks.0.attn1``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    names = [name for name in path.split(".") if name not in ("L", "self", "_modules", "__dict__", "_orig_mod", "")]
    return ".".join(names) or node.name


def _objection(match: AttentionMatch, supports_device: Callable[[torch.device], bool]) -> str | None:
    """Why the operators cannot compute this attention, whatever its tokens are; sets the mask."""
    given = bind(match.node)
    q, k, v = (_example(item) for item in (match.query, match.key, match.value))
    if q is None or k is None or v is None or match.device is None:
        return "operands are not known"
    if any(type(item) is not FakeTensor for item in (q, k, v)):
        return f"tensor subclass {next(type(item).__name__ for item in (q, k, v) if type(item) is not FakeTensor)}"
    if {q.dim(), k.dim(), v.dim()} != {4}:
        return f"not 4-D: query has shape {_shape(q)}"
    if None in (match.batch, match.heads, match.kv_heads, match.tokens, match.head_dim):
        return "sizes are known at run time only"
    if given["is_causal"] is not False:
        return "causal"
    if given["dropout_p"] != 0:
        return "dropout"
    if torch.is_grad_enabled() and any(item.requires_grad for item in (q, k, v)):
        return "needs gradients"
    if match.scale is None:
        return "scale is known at run time only"
    if hint_of(q.shape[3]) != hint_of(v.shape[3]):
        return f"head dims differ: {_shape(q)} and {_shape(v)}"
    assert match.head_dim is not None and match.heads is not None and match.kv_heads is not None
    if match.head_dim % 8 or not 16 <= match.head_dim <= 256:
        return f"head dim {match.head_dim} (supported: multiples of 8 from 16 to 256)"
    if match.heads % match.kv_heads or (match.heads != match.kv_heads and not given["enable_gqa"]):
        return f"{match.heads} query heads, {match.kv_heads} key heads"
    if match.out_dtype not in _DTYPES:
        return f"dtype {match.out_dtype} (supported: bfloat16, float16, float32)"
    if not supports_device(match.device):
        return f"device {match.device.type}"
    return None


def _objection_to_tokens(match: AttentionMatch, tokens: Tokens, min_tokens: int) -> str | None:
    """Why these are not the tokens of a self-attention that pays to be sparse."""
    if tokens.query is None or tokens.key is None or tokens.value is None or match.tokens is None:
        return "operands are not known"
    keys = _example(match.key)
    assert keys is not None
    if hint_of(keys.shape[2]) != match.tokens:
        return f"cross-attention: {match.tokens} queries, {hint_of(keys.shape[2])} keys"
    if not same(tokens.query[2], tokens.key[2]):
        return "cross-attention: queries and keys are not provably the same tokens"
    if not same(tokens.key[2], tokens.value[2]):
        return "keys and values are not provably the same tokens"
    reason = _bind_mask(match)
    if reason is None and match.tokens < min_tokens:
        reason = f"{match.tokens} tokens, fewer than min_tokens={min_tokens}"
    return reason


def _bind_mask(match: AttentionMatch) -> str | None:
    node = bind(match.node)["attn_mask"]
    if node is None:
        return None
    mask = _example(node)
    if mask is None or type(mask) is not FakeTensor:
        return "mask is not a plain tensor"
    batch, heads, queries, keys = (1,) * (4 - mask.dim()) + tuple(map(hint_of, mask.shape))
    if batch not in (1, match.batch) or heads not in (1, match.heads) or keys != match.tokens:
        return f"mask of shape {_shape(mask)}"
    # a mask expanded over the queries is still one of keys
    if queries != 1 and hint_of(mask.stride(-2)) != 0:
        return f"mask depends on the query: shape {_shape(mask)}"
    if mask.requires_grad and torch.is_grad_enabled():
        return "mask needs gradients"
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return f"mask of {mask.dtype}"
    match.key_mask, match.key_mask_kind = node, "bool" if mask.dtype == torch.bool else "additive"
    return None


def _lay_out(match: AttentionMatch, tokens: Tokens, grid: Grid | None, text: Text | None) -> str | None:
    """Set grid and text. Returns why they are unknown."""
    if match.reason is not None or tokens.query is None or match.tokens is None:
        return match.reason
    found = find_layout(tokens.query[2])
    if grid is not None:
        video = math.prod(grid)
        given = text if text is not None else found.text if found.grid else (0, 0)
        if found.permuted:
            return found.reason
        if given is not None and sum(given) + video == match.tokens:
            match.grid, match.text = grid, given
            return None
    match.grid, match.text = found.grid, found.text
    return found.reason


def _shape(tensor: Tensor) -> tuple[int | None, ...]:
    return tuple(map(hint_of, tensor.shape))
