# SPDX-License-Identifier: Apache-2.0
"""A small video model that takes any spelling of attention, and what to check of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import randn
from torch import Tensor, fx, nn

from rainfusion_compile.options import Options
from rainfusion_compile.passes.rewrite.writer import rewrite
from rainfusion_compile.report import AttentionReport

T, H, W = GRID = (8, 8, 12)
N = T * H * W
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
ALL: dict[str, Any] = {"sparsity": 0.0, "min_tokens": 0}
# windows that drop a third, whatever heads would choose, and no sample, which would depend on the bits of queries
SOME: dict[str, Any] = {"sparsity": 0.8, "min_tokens": 0, "patterns": ("spatial",), "arm": "recall", "min_recall": 0.0}


class Video(nn.Module):
    """Two attentions over the tokens of a 3-D convolution; `attend` takes and returns ``[B, H, S, D]``."""

    def __init__(self, attend: Attend, heads: int = 2, kv_heads: int = 2, dim: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.heads, self.kv_heads = attend, heads, kv_heads
        self.patch = nn.Conv3d(4, heads * dim, (1, 2, 2), (1, 2, 2))
        self.q = nn.Linear(heads * dim, heads * dim)
        self.kv = nn.Linear(heads * dim, 2 * kv_heads * dim)
        self.out = nn.Linear(heads * dim, heads * dim)
        self.register_buffer("padded", torch.arange(N) % 7 == 3)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.patch(latents).flatten(2).transpose(1, 2)
        for _ in range(2):
            q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) * 3
            k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x


def latents(batch: int = 2) -> Tensor:
    return randn(batch, 4, T, 2 * H, 2 * W)


def run(
    model: nn.Module, *args: Any, options: dict[str, Any] = ALL, **named: Any
) -> tuple[Tensor, list[AttentionReport]]:
    """One call of the rewritten graph without Inductor, and what was found in it."""
    found: list[AttentionReport] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        report = rewrite(gm, Options.parse(options, None))
        found.extend(report.attentions)
        extra = 3 * len(report.sparse)
        return lambda *inputs: (out := gm.forward(*inputs))[: len(out) - extra]

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=backend, fullgraph=True)(*args, **named), found


class _NotRun(Exception):
    pass


def traced(model: nn.Module, *args: Any) -> fx.GraphModule:
    """The graph of a model, which is not run: its operators need not be able to on this machine."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        def stop(*_: Any) -> Any:
            raise _NotRun

        graphs.append(gm)
        return stop

    torch._dynamo.reset()
    with torch.no_grad(), contextlib.suppress(_NotRun):
        torch.compile(model, backend=backend, fullgraph=True)(*args)
    (graph,) = graphs
    return graph


def reasons(model: nn.Module, *args: Any) -> list[str | None]:
    """Of a graph that is not compiled; one with dense attentions only must come out as it went in."""
    graph = traced(model, *(args or (latents(),)))
    before = graph.code
    with torch.no_grad():
        report = rewrite(graph, Options(min_tokens=0))
    graph.graph.lint()
    graph.recompile()
    if not report.sparse:
        assert graph.code == before
    return [attention.reason for attention in report.attentions]


def merged(attend: Attend) -> Attend:
    """Attention on ``[B * H, S, D]``."""
    return lambda q, k, v: attend(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, q.shape[:2])


def reshaped(attend: Attend) -> Attend:
    """Attention on ``[B, S, H, D]``."""
    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.25).softmax(dim=-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.25, **given)


def check(attend: Attend, like: Attend = sdpa, dtype: torch.dtype = torch.float32, **sizes: int) -> None:
    """All kept equals eager; sparse equals what SDPA becomes."""
    tight = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    model, video = Video(attend, **sizes).to(dtype).eval(), latents().to(dtype)
    out, attentions = run(model, video)
    assert [(a.reason, a.grid, a.tokens, a.heads) for a in attentions] == [(None, GRID, N, model.heads)] * 2
    with torch.no_grad():
        torch.testing.assert_close(out, model(video), **tight)
    out, attentions = run(model, video, options=SOME)
    wanted, alike = run(Video(like, **sizes).to(dtype).eval(), video, options=SOME)
    torch.testing.assert_close(out, wanted, **tight)
    assert attentions[0].densities == alike[0].densities
    assert attentions[0].densities[0] < 0.7
