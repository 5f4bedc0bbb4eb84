# SPDX-License-Identifier: Apache-2.0
"""Queries and keys whose attention follows a known pattern: ground truth for the ARM, realistic work for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rainfusion_compile.sparsity.layout import VideoLayout


def structured_qk(
    layout: VideoLayout,
    kinds: Sequence[str],
    *,
    head_dim: int,
    classes: int = 2,
    sharpness: float = 16.0,
    noise: float = 0.25,
    batch: int = 1,
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """``q`` and ``k``, float32 ``[batch, len(kinds), tokens, head_dim]`` seen through ``[B, S, H, D]`` memory.

    Each head follows its kind: "spatial" looks at its own frame, "temporal" at its own place in every frame, "textural"
    at the checkerboard ``(t + h + w) % classes == 0`` everywhere, "uniform" at everything alike. Each head has another
    random basis; all have noise. Text tokens are noise.

    Args:
        sharpness: log-odds between the keys that a query looks at and the others, roughly.
        device: where to make them (default: CPU); another device draws other numbers.
    """
    device = torch.device("cpu") if device is None else device
    generator = torch.Generator(device).manual_seed(seed)
    (span,) = layout.spans
    video = slice(span.start, span.stop)
    t, h, w = (place[video].to(device).double() for place in layout.coordinates()[1:])
    shape = (batch, layout.tokens, len(kinds), head_dim)
    q, k = (noise * torch.randn(shape, generator=generator, device=device) for _ in range(2))
    gain = (sharpness * head_dim**0.5) ** 0.5
    for number, kind in enumerate(kinds):
        features = {
            "spatial": lambda: _bump_features(t, span.grid[0]),
            "temporal": lambda: (
                torch.cat([_bump_features(h, span.grid[1]), _bump_features(w, span.grid[2])], 1) / 2**0.5
            ),
            "textural": lambda: ((t + h + w) % classes == 0).double()[:, None],
            "uniform": lambda: torch.zeros_like(t)[:, None],
        }[kind]()
        query = torch.ones_like(features) if kind == "textural" else features
        mixture = torch.randn(head_dim, head_dim, generator=generator, device=device)
        basis = torch.linalg.qr(mixture.double())[0][: features.shape[1]]
        q[:, video, number] += (gain * query @ basis).float()
        k[:, video, number] += (gain * features @ basis).float()
    return q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3)


def _bump_features(x: Tensor, size: int, count: int = 4) -> Tensor:
    """Unit vectors ``[n, 2 * count]`` whose inner product is largest at equal ``x`` and falls off with distance."""
    frequency = torch.arange(1, count + 1, dtype=torch.float64, device=x.device) * torch.pi / size
    angle = x[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1) / count**0.5
