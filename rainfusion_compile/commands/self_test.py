# SPDX-License-Identifier: Apache-2.0
"""Every operator against the reference, on small inputs of one device. Takes seconds.

``video_attention`` is the other two in one, and is compared with these.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rainfusion_compile.kernels import operators, reference
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity import layout_codec
from rainfusion_compile.sparsity.block_tables import AttentionTables
from rainfusion_compile.sparsity.layout import VideoLayout

LAYOUT = VideoLayout((8, 12, 16), (5, 3))
HEADS, KEY_HEADS, HEAD_DIM = 6, 3, 64
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of attention, for inputs of a dtype: the largest difference relative to the largest value that is compared."""
RECALL_TOLERANCE, ERRORS_TOLERANCE = 4e-3, 4e-2
"""Of the probe, which rounds more on a GPU, and may there rank blocks otherwise that are nearly as good."""


class Difference(NamedTuple):
    """How far an operator is from the reference: its largest difference over the reference's largest value."""

    operator: str
    found: float
    allowed: float

    @property
    def passes(self) -> bool:
        return self.found <= self.allowed  # not so if it is NaN


def dtypes_of(device: str) -> list[torch.dtype]:
    """What is worth testing: on a CPU, the two kinds of 16 bits take the same way."""
    return [dtype for dtype in TOLERANCE if device != "cpu" or dtype != torch.float16]


def differences(device: torch.device, dtype: torch.dtype) -> list[Difference]:
    """Of all operators, over a video with text, grouped-query attention and a key mask; a pattern for each head."""
    options, generator = Options(sparsity=(0.8, 0.5)), torch.Generator().manual_seed(0)
    tables, scale = options.tables(LAYOUT, device), 1 / math.sqrt(HEAD_DIM)

    def random(heads: int) -> Tensor:
        shape = (1, LAYOUT.tokens, heads, HEAD_DIM)  # as models lay them out
        return torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2)

    q, k, v = random(HEADS), random(KEY_HEADS), random(KEY_HEADS)
    key_mask = torch.ones(1, 1, LAYOUT.tokens, dtype=torch.bool, device=device)
    key_mask[..., -2:] = False
    inputs = (q, k, v, key_mask)
    one_of_each = [*{name: number for number, name in enumerate(tables.patterns)}.values(), len(tables.patterns)]
    taken_in_turn = [one_of_each[head % len(one_of_each)] for head in range(HEADS)]
    choice = torch.tensor([taken_in_turn], dtype=torch.int32, device=device)

    out = operators.block_sparse_attention(q, k, v, choice, key_mask, *tables.attention_arguments, scale)
    lists = _lists(q, k, choice, key_mask, tables.attention_arguments, scale)
    meant = reference.block_sparse_attention(q, k, v, choice, key_mask, tables.attention_arguments, scale, lists)

    rule = options.rule(device)
    taken, errors, recall = operators.arm_probe(*inputs, *tables.probe_arguments, scale, *rule)
    told = (tables.probe_arguments, scale, tables.directions)  # errors are of values in these directions
    meant_errors, meant_recall = reference.arm_errors(*inputs, *told)

    row = torch.tensor(layout_codec.encode(LAYOUT))
    ladder, names = [*options.ladder], ",".join(options.names)
    whole, chosen, *_ = operators.video_attention(*inputs, row, ladder, names, False, scale, *rule)
    in_two = operators.block_sparse_attention(q, k, v, taken, key_mask, *tables.attention_arguments, scale)

    allowed = TOLERANCE[dtype]
    return [
        Difference("block_sparse_attention", _relative(out, meant), allowed),
        Difference("arm_probe, recall", _relative(recall, meant_recall), RECALL_TOLERANCE),
        Difference("arm_probe, errors", _relative(errors[..., :-1], meant_errors[..., :-1]), ERRORS_TOLERANCE),
        Difference("video_attention", _relative(whole, in_two), allowed),
        Difference("video_attention, choice", float((chosen != taken).sum()), 0.0),
    ]


def _lists(
    q: Tensor, k: Tensor, choice: Tensor, key_mask: Tensor, tables: AttentionTables, scale: float
) -> Tensor | None:
    """What Triton's engine selects, as the reference takes it: two blocks may be as good but for rounding."""
    if not q.is_cuda or not len(tables.selected):
        return None
    from rainfusion_compile.kernels.gpu.selection import select_blocks

    return select_blocks(q, k, choice, key_mask, tables, scale)[..., : int(tables.free.sum())].long()


def _relative(found: Tensor, meant: Tensor) -> float:
    return float((found.double() - meant.double()).abs().max() / meant.abs().max())
