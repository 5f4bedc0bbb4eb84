# SPDX-License-Identifier: Apache-2.0
"""Attention as torch's modules have it: `nn.MultiheadAttention` and the fused encoder layer."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spelled import GRID, SOME, N, latents, reasons, run
from torch import Tensor, nn


class MultiHead(nn.Module):
    def __init__(self, batch_first: bool, **given: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.given = batch_first, given
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.attention = nn.MultiheadAttention(32, 2, batch_first=batch_first, dropout=0.1)

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch(video).flatten(2)
        x = x.transpose(1, 2) if self.first else x.permute(2, 0, 1)
        return self.attention(x, x, x, **self.given)[0]


class SpelledOut(MultiHead):
    def forward(self, video: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        m = self.attention
        q, k, v = (
            y.unflatten(-1, (2, 16)).transpose(1, 2) for y in F.linear(x, m.in_proj_weight, m.in_proj_bias).chunk(3, -1)
        )
        padding = self.given.get("key_padding_mask")
        mask = None if padding is None else ~padding[:, None, None]
        x = m.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x if self.first else x.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("weights", [False, True], ids=["no_weights", "weights"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_multi_head_attention(batch_first, weights, masked):
    given: dict[str, Any] = {"need_weights": weights}
    if masked:
        given["key_padding_mask"] = (torch.arange(N) % 5 == 2).expand(2, N)
    model, same = MultiHead(batch_first, **given).eval(), SpelledOut(batch_first, **given).eval()
    out, attentions = run(model, latents())
    assert [(a.reason, a.grid, a.heads, a.name) for a in attentions] == [(None, GRID, 2, "attention")]
    with torch.no_grad():
        torch.testing.assert_close(out, model(latents()), rtol=1e-4, atol=1e-5)
    out, _ = run(model, latents(), options=SOME)
    wanted, _ = run(same, latents(), options=SOME)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_multi_head_attention_but_dense():
    tril = torch.ones(N, N, dtype=torch.bool).tril()
    assert reasons(MultiHead(True, attn_mask=tril).eval()) == ["multi_head_attention_forward with attn_mask"]
    assert reasons(MultiHead(True).train()) == ["dropout"]

    class Weights(MultiHead):
        def forward(self, video: Tensor) -> Tensor:
            x = self.patch(video).flatten(2).transpose(1, 2)
            return operator.add(*map(torch.sum, self.attention(x, x, x)))

    class Cross(MultiHead):
        def forward(self, video: Tensor) -> Tensor:
            x = self.patch(video).flatten(2).transpose(1, 2)
            return self.attention(x, x[:, :9], x[:, :9])[0]

    assert reasons(Weights(True).eval()) == ["attention weights are used elsewhere"]
    assert str(reasons(Cross(True).eval())[0]).startswith("cross-attention")


def test_fused_encoder_layer_stays_dense():
    class Encoder(MultiHead):
        def __init__(self) -> None:
            super().__init__(True)
            self.layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)

        def forward(self, video: Tensor) -> Tensor:
            return self.layer(self.patch(video).flatten(2).transpose(1, 2))

    assert reasons(Encoder().eval()) == ["inside torch's fused encoder layer"]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert reasons(Encoder().eval()) == [None]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
