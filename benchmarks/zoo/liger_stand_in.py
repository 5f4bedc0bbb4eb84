# SPDX-License-Identifier: Apache-2.0
"""What Liger's fused norm and rotary embedding compute, by PyTorch: the kernels themselves need a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RMSNorm:
    """In float32, as its casting mode "llama" does it, over the last dim."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, epsilon: float, *rest: Any) -> Tensor:
        size = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
        return (x.float() * size).to(x.dtype) * weight


class Rope:
    """Of queries and keys ``[B, H, S, D]`` by sines and cosines ``[B, S, D]``."""

    @staticmethod
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None]
