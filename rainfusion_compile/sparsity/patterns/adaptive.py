# SPDX-License-Identifier: Apache-2.0
"""The adaptive pattern: for each query block, the key blocks that suit it most, by mean query and mean key."""

from __future__ import annotations

from rainfusion_compile.sparsity.blocks import WithoutWindow


class Adaptive(WithoutWindow):
    """Reads key blocks that a head selects in each call, and samples all others: see :mod:`selected_blocks`."""

    name = "adaptive"
    selects = True
