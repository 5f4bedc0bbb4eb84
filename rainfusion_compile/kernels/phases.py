# SPDX-License-Identifier: Apache-2.0
"""Which sample of the keys a head reads in a call: see :mod:`rainfusion_compile.sparsity.sampled_keys`.

The phase is drawn from the bits of the query in the middle: it changes from step to step, and from head to head, yet
the same inputs give the same output, with nothing to count or to store. Kernels on a GPU do the same arithmetic
(`sampled_blocks` of :mod:`rainfusion_compile.kernels.gpu.rows`).
"""

from __future__ import annotations

import torch
from torch import Tensor

NUMBERS = 4  # of the query whose bits are mixed
MIX = 0x2C1B3C6D


def draws(q: Tensor, order: Tensor) -> Tensor:
    """A number in [0, 2**32) for each head of ``q [B, H, S, D]``, int64 ``[B, H]``; modulo the phases, its phase.

    The sign counts for nothing: engines may turn a negative scale into negative queries.
    """
    middle = q[:, :, int(order[len(order) // 2]), :NUMBERS].contiguous()
    narrow = middle.dtype.itemsize == 2
    bits = middle.view(torch.int16 if narrow else torch.int32).long() & (0x7FFF if narrow else 0x7FFFFFFF)
    drawn = torch.zeros_like(bits[..., 0])
    for number in range(NUMBERS):
        drawn = ((drawn ^ bits[..., number]) * MIX) & 0xFFFFFFFF
        drawn = drawn ^ (drawn >> 15)
    return drawn
