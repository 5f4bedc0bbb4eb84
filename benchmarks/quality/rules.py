# SPDX-License-Identifier: Apache-2.0
"""Rules that choose which pairs of tokens to attend: ours, and those of other systems as their papers tell them.

Ours and the paper's run our operators. Others run dense attention under their masks: densities are exact, speed is not
meant. All keep text and the first frame's keys for everybody, as ours does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention.call import one_phase
from rainfusion_compile.kernels import operators
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.blocks import Blocks
from rainfusion_compile.sparsity.layout import VideoLayout


class Attended(NamedTuple):
    """What came of an attention: ``[1, H, S, D]``, its realised density, and the relative error foretold, if any."""

    output: Tensor
    density: Tensor
    predicted: Tensor | None = None


class Rule(ABC):
    """How one sample's attention over a layout is computed; q, k and v are ``[1, H, S, D]`` in token order."""

    def __init__(self, layout: VideoLayout, device: torch.device) -> None:
        self.layout, self.device = layout, device

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Attended: ...


class Ours(Rule):
    """Our operators under any options: by error, or by recall as RainFusion and RainFusion+ do."""

    def __init__(self, layout: VideoLayout, device: torch.device, options: Options) -> None:
        super().__init__(layout, device)
        self.options, self.tables = options, options.tables(layout, device)
        self.densities = torch.tensor([*self.tables.densities, 1.0], device=device)

    def choose(self, choice: Tensor, errors: Tensor) -> Tensor:
        return choice

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        scale = q.shape[-1] ** -0.5
        probe = self.tables.probe_arguments
        choice, errors, _ = operators.arm_probe(q, k, v, None, *probe, scale, *self.options.rule(q.device))
        choice = self.choose(choice, errors)
        out = operators.block_sparse_attention(q, k, v, choice, None, *self.tables.attention_arguments, scale)
        spent = F.pad(errors[..., :-1], (0, 1)).gather(-1, choice.long()[..., None]).sum()
        return Attended(out, self.densities[choice.long()].mean(), (spent / errors[..., -1].sum()).sqrt())


class OneSample(Ours):
    """RainFusion's patterns with the same sample of the keys in every call: what drawing another one is worth."""

    def __init__(self, layout: VideoLayout, device: torch.device, options: Options) -> None:
        super().__init__(layout, device, options)
        self.tables = one_phase(self.tables)


class TwoBands(Ours):
    """Sparse-VideoGen's classes (arXiv 2502.01776): of a spatial and a temporal band, the one that errs less on a few
    sampled rows; no head stays dense."""

    def __init__(self, layout: VideoLayout, device: torch.device, sparsity: float) -> None:
        super().__init__(layout, device, Options(arm="recall", sparsity=sparsity, patterns=("spatial", "temporal")))

    def choose(self, choice: Tensor, errors: Tensor) -> Tensor:
        return errors[..., :-1].argmin(-1).int()


class BlockMasks(Rule):
    """Dense attention under block masks."""

    def __init__(self, layout: VideoLayout, device: torch.device, sparsity: float) -> None:
        super().__init__(layout, device)
        self.blocks = Blocks(layout, 128, 64)
        self.kept = 1.0 - sparsity
        self.order, self.always = self.blocks.order.to(device), self.blocks.always.to(device)

    @abstractmethod
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """How much each pair of blocks matters, ``[H, nQ, nB]``, of ``[H, S, D]`` in computing order."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Attended:
        q, k, v = (x[0, :, self.order] for x in (q, k, v))
        score = self.scores(q, k).masked_fill(self.always, float("inf"))
        most = max(round(self.kept * self.blocks.n_b), 1)
        top = torch.zeros_like(score, dtype=torch.bool).scatter_(2, score.topk(most, dim=-1).indices, True)
        out = torch.empty_like(q)
        densities = []
        for head, blocks in enumerate(top | self.always):  # a mask for all heads at once may not fit
            keys = blocks.repeat_interleave(self.blocks.block_k, 1)[:, : len(self.order)]
            kept = keys.repeat_interleave(self.blocks.block_q, 0)[: len(self.order)]
            of_head = [x[None, head, None] for x in (q, k, v)]
            out[head, self.order] = F.scaled_dot_product_attention(of_head[0], of_head[1], of_head[2], kept)[0, 0]
            densities.append(kept.float().mean())
        return Attended(out[None], torch.stack(densities).mean())

    def means(self, x: Tensor, size: int) -> Tensor:
        """Of blocks of tokens, float32 ``[H, blocks, D]``."""
        return torch.stack([part.float().mean(1) for part in x.split(size, dim=1)], dim=1)


class BlockMeans(BlockMasks):
    """For each query block, the key blocks whose mean key suits its mean query most (RainFusion2.0's rule)."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.means(q, self.blocks.block_q) @ self.means(k, self.blocks.block_k).transpose(1, 2)


class Heaviest(BlockMasks):
    """For each query block, the key blocks that do hold most of its attention: what no rule on mass can beat."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = q.float(), k.float()
        filling = (0, -k.shape[1] % self.blocks.block_k)
        rows = []
        for part in q.split(self.blocks.block_q, dim=1):
            mass = (part @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1).sum(1)
            rows.append(F.pad(mass, filling).unflatten(1, (-1, self.blocks.block_k)).sum(2))
        return torch.stack(rows, dim=1)
