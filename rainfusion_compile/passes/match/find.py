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

from rainfusion_compile.passes.graph.symbolic_sizes import fixed, hint_of
from rainfusion_compile.passes.match.masks import MaskFactors, factor_mask
from rainfusion_compile.passes.match.partial_queries import LeftOut, find_left_out, lacks_video, too_many
from rainfusion_compile.passes.provenance.axes import same, size_of
from rainfusion_compile.passes.provenance.find_layout import Layout, find_layout
from rainfusion_compile.passes.provenance.trace import (
    Tokens,
    Trace,
    example_of,
    is_sdpa,
    sdpa_arguments,
    subgraphs,
    trace,
)
from rainfusion_compile.sparsity.layout import Grids, VideoLayout, as_grids

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
        open: it stays dense because this graph does not show enough of its tokens; another one may.
        mask_factors: instead of ``key_mask``, where the mask hides queries as well as keys.
        scale: factor of the logits.
        batch, heads, kv_heads, tokens, head_dim: sizes of the query (and heads of the key); tokens of a cross-attention
            are those of the query. None where they are known at run time only.
        left_out: how many tokens before and after those of the query have a key only; none in most self-attentions.
        dtype: of query, key and value. out_dtype: of the result, another one under autocast. device: of the result.
        grid, text: as :class:`VideoLayout` has them; None where unknown.
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
    mask_factors: MaskFactors | None = None
    open: bool = False
    scale: float | None = None
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    tokens: int | None = None
    head_dim: int | None = None
    left_out: LeftOut = (0, 0)
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    device: torch.device | None = None
    grid: Grids | None = None
    text: tuple[int, ...] | None = None
    reason: str | None = None

    @property
    def keys(self) -> int:
        """Tokens of the key of a self-attention."""
        return (self.tokens or 0) + sum(self.left_out)


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
    grid: Grids | None = None,
    text: tuple[int, ...] | None = None,
    min_tokens: int = 0,
    traced: Trace | None = None,
    supports_device: Callable[[torch.device], bool] = runs_on_cpu_or_cuda,
) -> list[AttentionMatch]:
    """All attentions of a Dynamo graph, in the order they run, each with its layout or with why it stays dense.

    Args:
        gm: a graph as Dynamo hands it to a backend; it is not changed.
        grid, text: the layout where it is known from outside; applies to the self-attentions with that many tokens.
            One that contradicts the graph is not believed: the attention stays dense. Where text is not told, it is
            what the graph shows, or the tokens without a query.
        min_tokens: attentions with fewer queries stay dense.
        traced: the graph's axes, where they have been followed already.
        supports_device: which devices can run the sparse operators.
    """
    nodes = [node for node in gm.graph.nodes if is_sdpa(node)]
    tokens = (traced or trace(gm)).tokens if nodes else {}
    matches = []
    for node in nodes:
        match = _describe(node, "")
        match.reason = (
            _unreadable(match)
            or _needs_dense(match)
            or _crosses(match, tokens[node])
            or _bind_mask(match)
            or _unsupported(match, supports_device)
            or _too_few(match, min_tokens)
            or _lay_out(match, tokens[node], grid, text)
        )
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
    value = example_of(node) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _module_name(node: fx.Node) -> str:
    """``L['self']._modules['blocks']...`` and the like as ``blocks.0.attn1``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    names = [name for name in path.split(".") if name not in ("L", "self", "_modules", "__dict__", "_orig_mod", "")]
    return ".".join(names) or node.name


def _unreadable(match: AttentionMatch) -> str | None:
    operands = [_example(item) for item in (match.query, match.key, match.value)]
    for item in operands:
        if item is None or match.device is None:
            return "operands are not known"
        if type(item) is not FakeTensor:
            return f"operand is no plain tensor ({type(item).__name__})"
        if item.dim() != 4:
            return f"not 4-D: operand of shape {_shape(item)}"
    if None in (match.batch, match.heads, match.kv_heads, match.tokens, match.head_dim, match.scale):
        return "sizes are known at run time only"
    return None


def _needs_dense(match: AttentionMatch) -> str | None:
    given = bind(match.node)
    if given["is_causal"] is not False:
        return "causal"
    if given["dropout_p"] != 0:
        return "dropout"
    operands = (match.query, match.key, match.value, given["attn_mask"])
    if torch.is_grad_enabled() and any(item.requires_grad for item in map(_example, operands) if item is not None):
        return "needs gradients"
    return None


def _crosses(match: AttentionMatch, tokens: Tokens) -> str | None:
    """Why these are not provably the tokens of a self-attention."""
    if tokens.query is None or tokens.key is None or tokens.value is None:
        return "operands are not known"
    query, key, value = tokens.query[2], tokens.key[2], tokens.value[2]
    if size_of(key) != match.tokens:
        sizes = f"cross-attention: {match.tokens} queries, {size_of(key)} keys"
        left_out = find_left_out(query, key)
        if left_out is None:
            return sizes
        match.left_out = left_out
        if too_many(match.tokens, match.keys):
            return f"{sizes}; too many of the same tokens have no query"
    match.open = True
    whose, whose_keys, whose_values = tokens.contents
    ours = (
        whose.inputs <= whose_keys.inputs
        if any(match.left_out)
        else whose.within(whose_keys) and whose_keys.within(whose)
    )
    if not ours or not same(tokens.query[0], tokens.key[0]):
        return "cross-attention: queries and keys are not provably the same tokens"
    if not whose_values.within(whose_keys) or not same(tokens.key[0], tokens.value[0]):
        return "cross-attention: keys and values are not provably the same tokens"
    if not any(match.left_out) and not same(query, key):
        return "cross-attention: queries and keys are not provably the same tokens"
    if not same(key, value):
        return "cross-attention: keys and values are not provably the same tokens"
    match.open = False
    return None


def _bind_mask(match: AttentionMatch) -> str | None:
    """Set the key mask, if the mask is one."""
    node = bind(match.node)["attn_mask"]
    if node is None:
        return None
    mask = _example(node)
    if mask is None or type(mask) is not FakeTensor:
        return "mask is not a plain tensor"
    batch, heads, _, keys = (1,) * (4 - mask.dim()) + tuple(map(hint_of, mask.shape))
    if batch not in (1, match.batch) or heads not in (1, match.heads) or keys != match.keys:
        return f"mask of shape {_shape(mask)}"
    # a mask expanded over the queries is still one of keys
    if fixed(mask.shape[-2] if mask.dim() > 1 else 1) != 1 and fixed(mask.stride(-2)) != 0:
        factors = factor_mask(node)
        if factors is None or (factors.queries and any(match.left_out)):
            return f"mask depends on the query: shape {_shape(mask)}"
        match.mask_factors, match.key_mask_kind = factors, "bool"
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return f"mask of {mask.dtype}"
    match.key_mask, match.key_mask_kind = node, "bool" if mask.dtype == torch.bool else "additive"
    return None


def _unsupported(match: AttentionMatch, supports_device: Callable[[torch.device], bool]) -> str | None:
    """What the operators have no engine for."""
    query, key, value = (_shape(_example(item)) for item in (match.query, match.key, match.value))
    if query[3] != key[3] or query[3] != value[3] or key[1] != value[1] or not query[0] == key[0] == value[0]:
        return f"shapes differ: {query}, {key}, {value}"
    heads, kv_heads, head_dim = query[1] or 0, key[1] or 1, query[3] or 0
    if heads % kv_heads or (heads != kv_heads and not bind(match.node)["enable_gqa"]):
        return f"{heads} query heads, {kv_heads} key heads"
    if head_dim % 8 or not 16 <= head_dim <= 256:
        return f"head dim {head_dim} (supported: multiples of 8 from 16 to 256)"
    if match.out_dtype not in _DTYPES:
        return f"dtype {match.out_dtype} (supported: bfloat16, float16, float32)"
    if match.device is None or not supports_device(match.device):
        return f"device {match.device}"
    return None


def _too_few(match: AttentionMatch, min_tokens: int) -> str | None:
    few = match.tokens is None or match.tokens < min_tokens
    return f"{match.tokens} tokens, fewer than min_tokens={min_tokens}" if few else None


def _lay_out(match: AttentionMatch, tokens: Tokens, grid: Grids | None, text: tuple[int, ...] | None) -> str | None:
    """Set grid and text. Returns why they are unknown, or none of a self-attention over a video."""
    assert tokens.key is not None
    found = find_layout(tokens.key[2])
    match.grid, match.text = found.grid, found.text
    match.open = found.reason is not None and not found.certain
    if grid is None and found.reason is None and text not in (None, found.text):
        return f"the graph shows text={found.text}, not text={text}"
    if grid is not None and not found.certain:
        found.reason = _given(match, found, grid, text)
    if found.reason is not None:
        return found.reason
    assert match.grid is not None
    assert match.text is not None
    if lacks_video(VideoLayout(match.grid, match.text), match.left_out):
        match.open = False
        return f"cross-attention: {match.tokens} queries, {match.keys} keys; tokens of the video have no query"
    return None


def _given(match: AttentionMatch, found: Layout, grid: Grids, text: tuple[int, ...] | None) -> str | None:
    """Set grid and text as they are told. Returns why they are not believed."""
    before, after = match.left_out
    texts = [text] if text is not None else [found.text, (before, *(0,) * (len(as_grids(grid)) - 1), after)]
    for around in texts:
        if around is None or len(around) != len(as_grids(grid)) + 1:
            continue
        if VideoLayout(grid, around).tokens == match.keys:
            if found.grid not in (None, grid) or found.text not in (None, around):
                return f"the graph shows grid={found.grid} with text={found.text}, not grid={grid} with text={around}"
            match.grid, match.text = grid, around
            return None
    return found.reason and f"{match.keys} tokens do not fit grid={grid} with text={text}"


def _shape(tensor: Tensor | None) -> tuple[int | None, ...]:
    return () if tensor is None else tuple(map(hint_of, tensor.shape))
