# SPDX-License-Identifier: Apache-2.0
"""The textural pattern: an even sample of the keys of all frames."""

from __future__ import annotations

import torch
from torch import Tensor

from rainfusion_compile.sparsity.blocks import Pattern


class Textural(Pattern):
    """Keeps every n-th key, whatever the query: see :mod:`rainfusion_compile.sparsity.sampled_keys`. No window."""

    name = "textural"
    samples_only = True

    @staticmethod
    def keeps(query: Tensor, key: Tensor, radius: None) -> Tensor:
        return torch.zeros_like(query[..., 0] - key[..., 0], dtype=torch.bool)

    def radius(self, target: float, *, fine: bool = True) -> None:
        return None

    def cover(self, radius: None) -> Tensor:
        return self.blocks.always
