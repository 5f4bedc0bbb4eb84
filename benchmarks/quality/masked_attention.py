# SPDX-License-Identifier: Apache-2.0
"""Self-attention of an unmodified model, computed densely under block masks that a rule chooses, head by head.

So rules of other systems can be compared with ours on the same model, at realised densities that are exact: a block
mask says which pairs count, and dense attention with the others hidden says what comes out. Nothing here is fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rainfusion_compile.sparsity.blocks import Blocks
from rainfusion_compile.sparsity.layout import VideoLayout


@dataclass(frozen=True)
class Heads:
    """One sample's operands of one attention, float32 ``[H, S, D]``, tokens by position of `blocks.order`."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Blocks

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def mass(self, rows: Tensor) -> Tensor:
        """Attention weights of some query positions, ``[H, n, S]``."""
        return (self.q[:, rows] @ self.k.transpose(1, 2) * self.scale).softmax(-1)


class Rule(ABC):
    """How the pairs to compute are chosen."""

    name: str

    @abstractmethod
    def kept(self, heads: Heads) -> Tensor:
        """What each query block keeps of the keys by position, bool ``[H, nQ, S]``."""


@dataclass
class Record:
    """What one attention call of one sample came to.

    `density` over all pairs of all heads; `error` of the layer's output, relative; `recall` of the attention mass of
    every eighth query block's first row.
    """

    density: float
    error: float


@dataclass
class MaskedAttention(TorchFunctionMode):  # type: ignore[misc]
    """Runs every self-attention over the tokens of `layout` under a rule's masks, and records what that did."""

    layout: VideoLayout
    rule: Rule | None
    block_q: int = 128
    block_k: int = 64
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._blocks = Blocks(self.layout, self.block_q, self.block_k)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        given = dict(zip(names, args, strict=False)) | kwargs
        q, k, v = (given[name] for name in names)
        tokens = self.layout.tokens
        if q.shape[2] != tokens or k.shape[2] != tokens or self.rule is None:
            return func(*args, **kwargs)
        return torch.stack([self._sample(*one) for one in zip(q, k, v, strict=True)])

    def _sample(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        order = self._blocks.order.to(q.device)
        heads = Heads(*(x[:, order].float() for x in (q, k, v)), self._blocks)
        assert self.rule is not None
        kept = self.rule.kept(heads)
        size = torch.full((kept.shape[1],), self.block_q, device=q.device)
        size[-1] = len(order) - self.block_q * (len(size) - 1)
        density = float((kept.sum(-1) * size).sum() / (len(q) * len(order) ** 2))
        out, wrong, square = torch.empty_like(heads.q), 0.0, 0.0
        for head in range(len(q)):  # one at a time: the mask is tokens x tokens
            one = [x[None, head : head + 1] for x in (heads.q, heads.k, heads.v)]
            mask = kept[head].repeat_interleave(self.block_q, 0)[: len(order)]
            out[head] = F.scaled_dot_product_attention(*one, attn_mask=mask[None, None])[0, 0]
            dense = F.scaled_dot_product_attention(*one)[0, 0]
            wrong += float((out[head] - dense).square().sum())
            square += float(dense.square().sum())
        self.records.append(Record(density, (wrong / square) ** 0.5))
        result = torch.empty_like(q)
        result[:, order] = out.to(q.dtype)
        return result
