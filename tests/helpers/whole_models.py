# SPDX-License-Identifier: Apache-2.0
"""Whole models through the backend, and the same models with their attention done by the reference."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import rainfusion_compile
from rainfusion_compile.kernels import reference
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import DENSE

SPARSE = {"sparsity": (0.8, 0.6), "error": 1.0}


class ReferenceAttention(TorchFunctionMode):
    """Runs an eager model with its video self-attentions done by the reference, under given choices of candidates."""

    def __init__(self, entries: list[dict[str, Any]], options: dict[str, Any]) -> None:
        super().__init__()
        self.entries: Iterator[dict[str, Any]] = iter(entries)
        self.options = Options(**options)
        self.layout = VideoLayout(tuple(entries[0]["grid"]), tuple(entries[0]["text"]))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        q, k, v, mask = (named.get(name) for name in ("query", "key", "value", "attn_mask"))
        if (
            k.shape[2] != self.layout.tokens
            or q.shape[2] < self.layout.tokens - sum(self.layout.text)
            or named.get("is_causal")
        ):
            return func(*args, **kwargs)
        entry = next(self.entries)
        before = self.layout.text[0] if q.shape[2] < k.shape[2] else 0  # text has no queries
        kept = slice(before, before + q.shape[2])
        q = F.pad(q, (0, 0, before, k.shape[2] - q.shape[2] - before))
        tables = self.options.tables(self.layout)
        candidates = [*zip(tables.patterns, tables.sparsities, strict=True), (DENSE, 0.0)]
        taken = [zip(*one, strict=True) for one in zip(entry["patterns"], entry["sparsity"], strict=True)]
        choice = torch.tensor([[candidates.index(one_head) for one_head in one] for one in taken])
        key_mask = None if mask is None else mask[:, :, 0]
        scale = named.get("scale") or q.shape[-1] ** -0.5
        out = reference.block_sparse_attention(q, k, v, choice, key_mask, tables.attention_arguments, scale)
        return out[:, :, kept].to(q.dtype)


def sample(output):
    return output[0] if isinstance(output, tuple) else output.sample


def run(case, **options):
    torch._dynamo.reset()
    compiled = torch.compile(
        case.model.eval(), backend="rainfusion", fullgraph=True, options={"min_tokens": 0, **options}
    )
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = sample(compiled(**case.inputs))
    return out, report.to_dict()["attentions"]


def check_found(case, attentions):
    """All video self-attentions and nothing else, with the right grid and text."""
    sparse = [entry for entry in attentions if entry["status"] == "sparse"]
    assert len(sparse) == case.video
    assert len(attentions) == case.video + case.dense
    for entry in sparse:
        assert (tuple(entry["grid"]), tuple(entry["text"])) == (case.grid, case.text)
    assert all(entry["reason"] for entry in attentions if entry["status"] == "dense")
