# SPDX-License-Identifier: Apache-2.0
"""Attention written out by hand, in any combination of spellings: equal to its definition."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled import GRID, N, run
from strategies import tolerance
from torch import Tensor, nn

PRODUCTS = {
    "matmul": lambda a, b: a.matmul(b),
    "@": lambda a, b: a @ b,
    "einsum": lambda a, b: torch.einsum("bhij,bhjk->bhik" if a.dim() == 4 else "bij,bjk->bik", a, b),
    "...": lambda a, b: torch.einsum("...ij,...jk->...ik", a, b),
}
SOFTMAXES = {
    "method": lambda s: s.softmax(-1),
    "function": lambda s: torch.softmax(s, dim=s.dim() - 1),
    "functional": lambda s: F.softmax(s, -1),
    "float32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "upcast": lambda s: s.float().softmax(-1).type_as(s),
    "dropout": lambda s: F.dropout(s.softmax(-1), 0.3, training=False),
}
MASKS: dict[str, Any] = {
    "none": lambda s, hidden: s,
    "additive": lambda s, hidden: s + torch.zeros(N, dtype=s.dtype).masked_fill(hidden, float("-inf")),
    "added_to": lambda s, hidden: hidden.to(s.dtype) * -1e4 + s,
    "filled": lambda s, hidden: s.masked_fill(hidden, float("-inf")),
    "where": lambda s, hidden: torch.where(hidden, float("-inf"), s),
}
SCALES: dict[str, Any] = {
    "scores": (lambda q: q, lambda k: k, lambda s: s * 0.25),
    "divided": (lambda q: q, lambda k: k, lambda s: s / 4),
    "query": (lambda q: q * 0.25, lambda k: k, lambda s: s),
    "both": (lambda q: q.mul(0.5), lambda k: 0.5 * k, lambda s: s),
    "key": (lambda q: q, lambda k: k / 4.0, lambda s: s),
}


def reference(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """Attention in float64, from its definition."""
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) / 4
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights if hidden is None else weights * ~hidden
    return torch.einsum("bhij,bhjd->bhid", weights, v.double()) / weights.sum(-1, keepdim=True)


class Spelled(nn.Module):
    """One attention of a random spelling, over a 3-D convolution's tokens; returns its operands too."""

    def __init__(self, product: str, softmax: str, mask: str, scale: str, last: str, merge: bool) -> None:
        super().__init__()
        self.multiply, self.last, self.softmax, self.mask = PRODUCTS[product], PRODUCTS[last], SOFTMAXES[softmax], mask
        self.scale, self.merge = SCALES[scale], merge
        self.patch = nn.Conv3d(4, 96, 1)

    def forward(self, latents: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.patch(latents).flatten(2).unflatten(1, (3, 2, 16)).transpose(-1, -2).unbind(1)
        q_, k_, v_ = (x.flatten(0, 1) if self.merge else x for x in (q, k, v))
        of_query, of_key, of_scores = self.scale
        scores = of_scores(self.multiply(of_query(q_), of_key(k_).transpose(-1, -2)))
        out = self.last(self.softmax(MASKS[self.mask](scores, hidden)), v_)
        return out.view(v.shape), q, k, v


@given(
    *map(st.sampled_from, map(sorted, (PRODUCTS, SOFTMAXES, MASKS, SCALES, PRODUCTS))),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=15)
def test_any_spelling(product, softmax, mask, scale, last, dtype, merge, seed):
    torch.manual_seed(seed)
    model = Spelled(product, softmax, mask, scale, last, merge).to(dtype).eval()
    video, hidden = torch.randn(2, 4, *GRID).to(dtype), torch.rand(N) < 0.3
    (out, q, k, v), attentions = run(model, video, hidden)
    assert [(a.reason, a.grid, a.tokens, a.heads) for a in attentions] == [(None, GRID, N, 2)]
    expected = reference(q, k, v, None if mask == "none" else hidden)
    torch.testing.assert_close(out.double(), expected, **tolerance(dtype))
