# SPDX-License-Identifier: Apache-2.0
"""A video model for several resolutions, and what it gives when it is compiled and by the library's own function."""

from types import SimpleNamespace
from typing import Any

import models
import pytest
import small_video
import torch
from torch import Tensor, nn

import rainfusion_compile

GRIDS = ((4, 9, 16), (4, 16, 9), (6, 8, 10), (3, 10, 18), (4, 9, 16))  # the first two have as many tokens
OPTIONS = {"min_tokens": 0, "sparsity": 0.6, "error": 1.0}
EVERYTHING = {"min_tokens": 0, "sparsity": 0.0}
CLOSE = {"rtol": 1e-3, "atol": 2e-4}


class Video(nn.Module):
    """Patches by convolution, text behind them, blocks, and a video again."""

    def __init__(self, dim: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, dim, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(small_video.Block(dim, heads) for _ in range(layers))
        for block in self.blocks:  # attention that looks at single tokens: what is left out shows
            nn.init.normal_(block.qkv.weight, std=0.35)
            nn.init.normal_(block.out.weight, std=0.35)

    def forward(self, video: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.patch(video)
        size = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        tokens = x.shape[1]
        if text is not None:
            x = torch.cat([x, text], dim=1)
        for block in self.blocks:
            x = x + block(x, mask)
        return x[:, :tokens].transpose(1, 2).unflatten(2, size)


def latents(grid, batch=1, seed=0):
    t, h, w = grid
    return models.randn(batch, 3, t, 2 * h, 2 * w, seed=seed)


def compiled_by_us(model, *, dynamic=True, options=OPTIONS):
    return torch.compile(model, backend="rainfusion", fullgraph=True, dynamic=dynamic, options=options)


def call(function, *args, **kwargs):
    """Output and reported attentions."""
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = function(*args, **kwargs)
    return out, report.to_dict()["attentions"]


def plain_compilations(model, calls, dynamic):
    """How often a backend is called that knows of nothing."""
    graphs = []

    def backend(gm: Any, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    function = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for args, kwargs in calls:
            function(*args, **kwargs)
    torch._dynamo.reset()
    return len(graphs)


def by_function(model, *args, **layout):
    """The model with the library's own function for its attention."""

    def sparse(q, k, v, **_):
        return rainfusion_compile.attention(q, k, v, **layout, sparsity=0.6, error=1.0)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_video, "F", SimpleNamespace(scaled_dot_product_attention=sparse))
        return model(*args)
