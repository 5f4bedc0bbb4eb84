# SPDX-License-Identifier: Apache-2.0
"""The record that all steps share: one attention of a graph, what is found out about it, and why it stays dense."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple

import torch
from torch import fx

from rainfusion_compile.passes.graph.nodes import bind, tensor_at
from rainfusion_compile.passes.graph.symbolic_sizes import shape_of
from rainfusion_compile.sparsity.layout import Grids, VideoLayout


class DenseReason(Enum):
    """Kinds of reasons to stay dense: what is so, what a user can do, and whether it is as it should be.

    ``docs/troubleshooting.md`` has them as a table; see ``benchmarks/pages/reasons_page.py``.
    """

    ASKED = "the option `dense_layers` names it", "take its number out of dense_layers", True
    CROSS_ATTENTION = "queries and keys are not the same tokens", "leave it: cross-attention is no self-attention", True
    OTHER_RANKS = (
        "keys come from another rank, as in ring attention",
        "gather all tokens on each rank, and split the heads between ranks",
        False,
    )
    CAUSAL = "it is causal", "drop is_causal, if all tokens may look at all", False
    SIZE = "it has fewer tokens than `min_tokens`", "set the option min_tokens to at most that many", False
    DROPOUT = "it drops attention weights at random", "call model.eval()", False
    DERIVATIVES = "gradients or tangents may be needed", "call it under torch.no_grad()", False
    MASK = "its mask is none of keys alone", "pass a mask of keys, [B, 1, 1, S], bool or floating", False
    UNSUPPORTED = (
        "the operators do not take its shapes, dtype or device",
        "pass [B, H, S, D] in bfloat16, float16 or float32 on CPU or CUDA, D a multiple of 8 from 16 to 256",
        False,
    )
    SPELLING = (
        "it is written in a way that is not understood",
        "call torch.nn.functional.scaled_dot_product_attention instead",
        False,
    )
    NESTED = "it stands in a graph inside the graph", "compile without checkpoints or nested regions", False
    NO_TENSOR = "an operand is no plain tensor", "call it on plain tensors, outside torch.func", False
    TOKENS_UNKNOWN = (
        "the graph does not show that queries and keys are the same tokens",
        "give options grid=(T, H, W), compute queries, keys and values from one tensor in one graph (where .item() or "
        ".tolist() breaks it, set torch._dynamo.config.capture_scalar_outputs = True), or tell of a quantized layer's "
        "operator by rainfusion_compile.row_wise",
        False,
    )
    GRID_UNKNOWN = "the graph does not show a grid", "give options grid=(T, H, W)", False
    NO_GRID = "tokens are not in the order of a video", "keep tokens in the order of frames, rows, columns", False
    GIVEN = (
        "the given grid or text is not that of its tokens",
        "correct the options grid and text, or the video_layout: they count tokens, not pixels",
        False,
    )
    OUTSIDE = (
        "it runs outside all graphs: the model, or this part of it, is not compiled",
        "open `with rainfusion_compile.sparse_eager_attention(grid=(T, H, W)):` around the model",
        False,
    )
    ANY_SIZE = "one graph cannot serve all sizes of it", "compile with dynamic=False", False

    def __init__(self, meaning: str, remedy: str, expected: bool) -> None:
        self.meaning, self.remedy, self.expected = meaning, remedy, expected


class Reason(str):
    """The message that a report shows, of a `kind`."""

    kind: DenseReason

    def __new__(cls, kind: DenseReason, message: str) -> Reason:
        reason = super().__new__(cls, message)
        reason.kind = kind
        return reason

    def __getnewargs__(self) -> tuple[DenseReason, str]:  # type: ignore[override]
        return self.kind, str(self)

    @property
    def advice(self) -> str:
        """The message, and what can be done about it."""
        return f"{self}; {self.kind.remedy}"


class MaskFactor(NamedTuple):
    """A mask that varies along one of its last two dimensions only: ``axis`` is -1 or -2."""

    node: fx.Node
    axis: int


@dataclass(frozen=True)
class MaskFactors:
    """A mask as the conjunction of what hides keys and what hides queries; none of either hides nothing."""

    keys: frozenset[MaskFactor] = frozenset()
    queries: frozenset[MaskFactor] = frozenset()

    def __and__(self, other: MaskFactors) -> MaskFactors:
        return MaskFactors(self.keys | other.keys, self.queries | other.queries)


@dataclass
class AttentionMatch:
    """One attention of a graph. Sizes are those of one call, None where they are known at run time only.

    Attributes:
        node: the SDPA node; where another spelling is not understood, the node that makes it out.
        graph: the name of the graph it stands in, "" for the graph itself.
        name: the module that calls it, such as ``blocks.0.attn1``, or the node's own name.
        tokens, heads, head_dim: of the query.
        scale: factor of the logits.
        partial_queries: how many tokens before and after those of the query have a key only; most often none.
        mask: what hides keys, and what hides queries. key_mask_kind: "bool" (True attends) or "additive".
        layout: the video and its text, of dense ones too; None where unknown. grid, text: the same.
        reason: why it stays dense; None if it can be sparse.
        waits: it stays dense because this graph does not show enough of its tokens; what is known outside may.
        query, key, value: nodes of ``[B, H, queries, D]``, ``[B, Hk, keys, D]`` and ``[B, Hk, keys, D]`` tensors.
        keys: tokens of the key of a self-attention.
        dtype, out_dtype, device: of the query; of the result, where autocast may change it; of the result.
    """

    node: fx.Node
    graph: str
    name: str
    tokens: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    scale: float | None = None
    partial_queries: tuple[int, int] = (0, 0)
    mask: MaskFactors = MaskFactors()
    key_mask_kind: Literal["bool", "additive"] | None = None
    layout: VideoLayout | None = None
    reason: Reason | None = None
    waits: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the SDPA node, as they are now: one may come straight out of an attention that was replaced."""
        return bind(self.node)

    @property
    def query(self) -> fx.Node:
        return self.arguments["query"]

    @property
    def key(self) -> fx.Node:
        return self.arguments["key"]

    @property
    def value(self) -> fx.Node:
        return self.arguments["value"]

    @property
    def keys(self) -> int:
        return (self.tokens or 0) + sum(self.partial_queries)

    @property
    def batch(self) -> int | None:
        return shape_of(self.query)[0]

    @property
    def kv_heads(self) -> int | None:
        return shape_of(self.key)[1]

    @property
    def grid(self) -> Grids | None:
        return None if self.layout is None else self.layout.grid

    @property
    def text(self) -> tuple[int, ...] | None:
        return None if self.layout is None else self.layout.text

    @property
    def dtype(self) -> torch.dtype | None:
        return getattr(tensor_at(self.query), "dtype", None)

    @property
    def out_dtype(self) -> torch.dtype | None:
        return getattr(tensor_at(self.node), "dtype", None)

    @property
    def device(self) -> torch.device | None:
        return getattr(tensor_at(self.node), "device", None)
