# SPDX-License-Identifier: Apache-2.0
"""Matching: which attentions of a Dynamo graph are self-attention over a video, and why the others stay dense."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from rainfusion_compile.passes.attention_match import AttentionMatch, DenseReason, MaskFactor, MaskFactors, Reason
from rainfusion_compile.passes.graph.nodes import is_sdpa, module_name, subgraphs, tensor_at
from rainfusion_compile.passes.graph.symbolic_sizes import fixed, shape_of
from rainfusion_compile.passes.match.masks import factor_mask
from rainfusion_compile.passes.match.partial_queries import find_partial_queries, lacks_video, too_many
from rainfusion_compile.passes.provenance.axes import origins, resolve, same
from rainfusion_compile.passes.provenance.axis import Axis, Dim, size_of
from rainfusion_compile.passes.provenance.find_layout import ROLES, find_layout
from rainfusion_compile.passes.provenance.ranks import collectives_above
from rainfusion_compile.passes.provenance.trace import Tokens, Trace, trace
from rainfusion_compile.sparsity.layout import Grids, VideoLayout, as_grids

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DEVICES = ("cpu", "cuda")
_OPERANDS = ("query", "key", "value")


def find_attentions(
    gm: fx.GraphModule,
    *,
    grid: Grids | None = None,
    text: tuple[int, ...] | None = None,
    min_tokens: int = 0,
    traced: Trace | None = None,
) -> list[AttentionMatch]:
    """All attentions of a Dynamo graph, in the order they run, each with its layout or with a reason to stay dense.

    Args:
        gm: a graph as Dynamo hands it to a backend; it is not changed.
        grid, text: the layout where it is known from outside; applies to the self-attentions with that many tokens,
            also to those of which the graph does not show that they are any. It is not believed where it contradicts
            the graph. Text that is not told is what the graph shows, or the tokens without a query.
        min_tokens: attentions with fewer queries stay dense.
        traced: the graph's axes, where they have been followed already.
    """
    matches = [_describe(node, "") for node in gm.graph.nodes if is_sdpa(node)]
    tokens = (traced or trace(gm)).tokens if matches else {}
    # tensors are dual inside a level only, which may also be one of the graph itself
    dual = forward_ad._current_level >= 0 or any("dual_level" in str(node.target) for node in gm.graph.nodes)
    for match in matches:
        match.reason = _unreadable(match)
        if match.reason is None:
            match.reason = (
                _crosses_or_needs_dense(match, tokens[match.node], grid, dual=dual)
                or _bind_mask(match)
                or _unsupported(match)
                or too_few(match, min_tokens)
                or _lay_out(match, tokens[match.node], grid, text)
            )
            reason = match.reason
            if match.layout is None and reason is not None and reason.kind is not DenseReason.CROSS_ATTENTION:
                shown = find_layout(tokens[match.node].key[2])
                match.layout = shown if isinstance(shown, VideoLayout) else None
    nested = [_describe(node, name) for name, graph in subgraphs(gm) for node in filter(is_sdpa, graph.graph.nodes)]
    for match in nested:
        match.reason = Reason(DenseReason.NESTED, f"inside a higher-order operator ({match.graph})")
    return matches + nested


def too_few(match: AttentionMatch, min_tokens: int) -> Reason | None:
    """Why an attention over so many tokens is not worth it."""
    few = match.tokens is None or match.tokens < min_tokens
    return Reason(DenseReason.SIZE, f"{match.tokens} tokens, fewer than min_tokens={min_tokens}") if few else None


def _describe(node: fx.Node, graph: str) -> AttentionMatch:
    match = AttentionMatch(node, graph, module_name(node))
    sizes, scale = shape_of(match.query), match.arguments["scale"]
    if len(sizes) == 4:
        _, match.heads, match.tokens, match.head_dim = sizes
    if isinstance(scale, (int, float)):
        match.scale = float(scale)
    elif scale is None and match.head_dim:
        match.scale = 1 / math.sqrt(match.head_dim)
    return match


def _unreadable(match: AttentionMatch) -> Reason | None:
    operands = {name: tensor_at(match.arguments[name]) for name in _OPERANDS}
    if None in operands.values() or match.device is None:
        return Reason(DenseReason.NO_TENSOR, "operands are not known")
    kinds = {name: _kind(item) for name, item in operands.items() if type(item) is not FakeTensor}
    if kinds:
        alike = len(kinds) == len(operands) and len({*kinds.values()}) == 1
        names = kinds["query"] if alike else ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        return Reason(DenseReason.NO_TENSOR, f"operand is no plain tensor ({names})")
    for name in operands:
        if len(shape := shape_of(match.arguments[name])) != 4:
            return Reason(DenseReason.UNSUPPORTED, f"not 4-D: operand of shape {shape}")
    if None in (match.batch, match.heads, match.kv_heads, match.tokens, match.head_dim, match.scale):
        return Reason(DenseReason.ANY_SIZE, "sizes are known at run time only")
    return None


def _kind(item: Any) -> str:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(item)
    return "inside torch.func's grad, jvp or vmap" if wrapped else type(item).__name__


def _crosses_or_needs_dense(match: AttentionMatch, tokens: Tokens, given: Grids | None, *, dual: bool) -> Reason | None:
    """What is said of cross-attention is that, for nothing would make it sparse."""
    crosses = _crosses(match, tokens, given)
    if crosses is not None and crosses.kind is DenseReason.CROSS_ATTENTION:
        return crosses
    dense = _needs_dense(match, dual=dual)
    match.waits &= dense is None
    return dense or crosses


def _needs_dense(match: AttentionMatch, *, dual: bool) -> Reason | None:
    if match.arguments["is_causal"] is not False:
        return Reason(DenseReason.CAUSAL, "causal")
    if match.arguments["dropout_p"] != 0:
        return Reason(DenseReason.DROPOUT, "dropout")
    operands = map(tensor_at, (match.query, match.key, match.value, match.arguments["attn_mask"]))
    if torch.is_grad_enabled() and any(item.requires_grad for item in operands if item is not None):
        return Reason(DenseReason.DERIVATIVES, "needs gradients")
    if dual:
        return Reason(DenseReason.DERIVATIVES, "needs forward-mode derivatives")
    return None


def _crosses(match: AttentionMatch, tokens: Tokens, given: Grids | None) -> Reason | None:
    """Why these are not provably the tokens of a self-attention, nor, if a grid is `given`, taken at its word."""
    query, key, value = tokens.query[2], tokens.key[2], tokens.value[2]
    if size_of(key) != match.tokens:
        sizes = f"cross-attention: {match.tokens} queries, {size_of(key)} keys"
        partial_queries = find_partial_queries(query, key)
        if partial_queries is None:
            return Reason(DenseReason.CROSS_ATTENTION, sizes)
        match.partial_queries = partial_queries
        if too_many(match.tokens, match.keys):
            return Reason(DenseReason.CROSS_ATTENTION, f"{sizes}; too many of the same tokens have no query")
    # of what one of them has whole, dims tell: heads, for example
    all_dims = (*tokens.query, *tokens.key, *tokens.value)
    whose, whose_keys, whose_values = (lineage.over(all_dims) for lineage in tokens.lineage)
    if any(match.partial_queries):
        ours = whose.inputs <= whose_keys.inputs
    else:
        ours = whose.within(whose_keys) and whose_keys.within(whose) and same(query, key)
    samples = _same_samples(tokens.query[0], tokens.key[0]), _same_samples(tokens.key[0], tokens.value[0])
    reason = None
    if not ours or not samples[0]:
        reason = _differ(match, "queries and keys", query, key, whose.inputs == whose_keys.inputs)
    elif not whose_values.within(whose_keys) or not samples[1] or not same(key, value):
        reason = _differ(match, "keys and values", key, value, whose_keys.inputs == whose_values.inputs)
    if reason is not None and given is not None and match.waits and all(samples) and size_of(query) == size_of(value):
        # Nobody but the user can tell, and has. But what is known of any of them must not contradict, and keys that
        # come from somewhere to a video that the graph shows are another's.
        shown = [find_layout(dim) for dim in (query, key, value)]
        queries, keys, values = (one if isinstance(one, VideoLayout) else None for one in shown)
        reordered = any(isinstance(one, Reason) and one.kind is DenseReason.NO_GRID for one in shown)
        agree = queries == keys and values in (None, keys)
        if keys is None and values is not None and as_grids(values.grid) == as_grids(given):
            agree = queries is None or same(query, value)  # keys are of the tokens of values, place by place
        if agree and not reordered:
            return None
    return reason


def _same_samples(one: Dim, other: Dim) -> bool:
    """Whether two batches are the same; of those that other graphs hand over only tokens are told, and lineage."""
    axes = [*resolve(one), *resolve(other)]
    if {axis for axis in resolve(one) if axis.lost} != {axis for axis in resolve(other) if axis.lost}:
        return False  # a single sample may be another one, and `same` looks at longer axes alone
    moved = any(axis.permuted or axis.digit or axis.cut for axis in axes)
    handed_over = [axis.handed_over for axis in axes]
    blank = not any(axis.known or axis.handed_over for axis in axes)
    return (not moved and (blank or all(handed_over))) or same(one, other)


def _differ(match: AttentionMatch, what: str, one: Dim, other: Dim, of_one_origin: bool) -> Reason:
    """Why these are not the same tokens, or not known to be. `of_one_origin`: they come from the same inputs."""
    of_queries, of_keys = collectives_above(match.query), collectives_above(match.key)
    if of_queries.keys() < of_keys.keys():
        whence = next(name for node, name in of_keys.items() if node not in of_queries)
        return Reason(DenseReason.OTHER_RANKS, f"keys are another rank's part of the tokens, from {whence}")
    ours, theirs = _lost_axes(one), _lost_axes(other)
    lost = [axis.origin for axis in (*ours, *theirs) if (axis in ours) != (axis in theirs)]
    if not (lost or of_one_origin) and ours and same(one, other):  # one table of positions for both made them so
        match.waits = not all(axis.handed_over for axis in ours)
        return Reason(DenseReason.TOKENS_UNKNOWN, f"not known whether {what}, inputs of the graph, are the same tokens")
    if not lost:
        return Reason(DenseReason.CROSS_ATTENTION, f"cross-attention: {what} are not provably the same tokens")
    match.waits = True
    where = lost[0] or "an operator that keeps no axes"
    return Reason(DenseReason.TOKENS_UNKNOWN, f"not known whether {what} are the same tokens, lost at {where}")


def _lost_axes(dim: Dim) -> list[Axis]:
    """The axes below a dim of which nothing is known."""
    below = dict.fromkeys(one for axis in resolve(dim) for one in origins(axis))
    atoms = [axis for axis in below if axis.size > 1 and not (axis.bound or axis.parts or axis.digit or axis.cut)]
    return [axis for axis in atoms if axis.lost or not _tells(axis)]


def _tells(axis: Axis) -> bool:
    return bool(axis.role or axis.coordinate or axis.permuted) or any(not source.rank for source, _ in axis.sources)


def _bind_mask(match: AttentionMatch) -> Reason | None:
    """Set the mask, if its shape and what it hides are understood."""
    node = match.arguments["attn_mask"]
    if node is None:
        return None
    mask = tensor_at(node)
    if type(mask) is not FakeTensor:
        return Reason(DenseReason.NO_TENSOR, "mask is not a plain tensor")
    shape = shape_of(node)
    batch, heads, _, keys = (1,) * (4 - len(shape)) + shape
    if batch not in (1, match.batch) or heads not in (1, match.heads) or keys != match.keys:
        return Reason(DenseReason.MASK, f"mask of shape {shape}")
    # a mask expanded over the queries is still one of keys
    if fixed(mask.shape[-2] if mask.dim() > 1 else 1) != 1 and fixed(mask.stride(-2)) != 0:
        factors = factor_mask(node)
        if factors is None or (factors.queries and any(match.partial_queries)):
            return Reason(DenseReason.MASK, f"mask depends on the query: shape {shape}")
        match.mask, match.key_mask_kind = factors, "bool"
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return Reason(DenseReason.MASK, f"mask of {mask.dtype}")
    match.mask = MaskFactors(keys=frozenset({MaskFactor(node, -1)}))
    match.key_mask_kind = "bool" if mask.dtype == torch.bool else "additive"
    return None


def _unsupported(match: AttentionMatch) -> Reason | None:
    """What the operators have no engine for."""
    query, key, value = (shape_of(match.arguments[name]) for name in _OPERANDS)
    heads, kv_heads, head_dim = query[1] or 0, key[1] or 1, query[3] or 0
    what = None
    if query[3] != key[3] or query[3] != value[3] or key[1] != value[1] or not query[0] == key[0] == value[0]:
        what = f"shapes differ: {query}, {key}, {value}"
    elif heads % kv_heads or (heads != kv_heads and not match.arguments["enable_gqa"]):
        what = f"{heads} query heads, {kv_heads} key heads"
    elif head_dim % 8 or not 16 <= head_dim <= 256:
        what = f"head dim {head_dim} (supported: multiples of 8 from 16 to 256)"
    elif match.out_dtype not in _DTYPES:
        what = f"dtype {match.out_dtype} (supported: bfloat16, float16, float32)"
    elif match.device is None or match.device.type not in DEVICES:
        what = f"device {match.device}"
    return None if what is None else Reason(DenseReason.UNSUPPORTED, what)


def _lay_out(match: AttentionMatch, tokens: Tokens, grid: Grids | None, text: tuple[int, ...] | None) -> Reason | None:
    """Set the layout. Returns why it is unknown, or none of a self-attention over a video."""
    found = find_layout(tokens.key[2])
    reason, shown = (None, found) if isinstance(found, VideoLayout) else (found, None)
    match.layout, match.waits = shown, reason is not None and reason.kind is DenseReason.GRID_UNKNOWN
    if grid is None and shown is not None and text not in (None, shown.text):
        return Reason(DenseReason.GIVEN, f"the graph shows text={shown.text}, not text={text}")
    if grid is not None and (shown is not None or match.waits):
        reason = _other_lines(tokens.key[2], shown, grid) or _given(match, shown, grid, text)
    if reason is None and match.layout is not None and lacks_video(match.layout, match.partial_queries):
        match.waits = False
        sizes = f"cross-attention: {match.tokens} queries, {match.keys} keys"
        return Reason(DenseReason.CROSS_ATTENTION, f"{sizes}; tokens of the video have no query")
    return reason


def _other_lines(key: Dim, shown: VideoLayout | None, grid: Grids) -> Reason | None:
    """Why these are not the frames of a video of this grid, whatever else is not known of them."""
    for role, size in zip(ROLES[1:], as_grids(grid)[0][1:], strict=True):
        others = [axis.size for axis in resolve(key) if axis.role == role and axis.size not in (1, size)]
        if others and len(as_grids(grid)) == 1:
            known = f"{others[0]} {role}s" if shown is None else f"grid={shown.grid} with text={shown.text}"
            return Reason(DenseReason.GIVEN, f"the graph shows {known}, not grid={grid}")
    return None


def _given(
    match: AttentionMatch, shown: VideoLayout | None, grid: Grids, text: tuple[int, ...] | None
) -> Reason | None:
    """Set the layout as it is told. Returns why that is not believed."""
    before, after = match.partial_queries
    videos, shown_text = len(as_grids(grid)), [] if shown is None else [shown.text]
    for around in [text] if text is not None else [*shown_text, (before, *(0,) * (videos - 1), after)]:
        told = VideoLayout(grid, around) if len(around) == videos + 1 else None
        if told is not None and told.tokens == match.keys:
            if shown is not None and shown != told:
                what = f"the graph shows grid={shown.grid} with text={shown.text}, not grid={grid} with text={around}"
                return Reason(DenseReason.GIVEN, what)
            match.layout = told
            return None
    if shown is not None:
        return None
    tokens = sum(map(math.prod, as_grids(grid))) + sum(text or ())
    wanted = f"grid={grid}" if text is None else f"grid={grid} with text={text}"
    return Reason(DenseReason.GIVEN, f"{match.keys} tokens do not fit {wanted}, which makes {tokens}")
