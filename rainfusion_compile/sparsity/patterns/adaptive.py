# SPDX-License-Identifier: Apache-2.0
"""The adaptive pattern: for each query block, the key blocks that suit it most, by mean query and mean key."""

from __future__ import annotations

import torch
from torch import Tensor

from rainfusion_compile.sparsity.blocks import Pattern


class Adaptive(Pattern):
    """Reads key blocks that a head selects in each call, and samples all others: see :mod:`selected_blocks`.

    Which those are no grid can tell, so here it has no window.
    """

    name = "adaptive"
    selects = True

    @staticmethod
    def keeps(query: Tensor, key: Tensor, radius: None) -> Tensor:
        return torch.zeros_like(query[..., 0] - key[..., 0], dtype=torch.bool)

    def radius(self, target: float, *, fine: bool = True) -> None:
        return None

    def cover(self, radius: None) -> Tensor:
        return self.blocks.always
