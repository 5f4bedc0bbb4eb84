# SPDX-License-Identifier: Apache-2.0
"""The order in which tokens are computed: block sparsity is only as good as its blocks, so any run of consecutive video
tokens must be compact in space and time. Tensors are never reordered; kernels follow the order in their loads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rainfusion_compile.sparsity.layout import VideoLayout


def token_order(layout: VideoLayout, *, run: int) -> Tensor:
    """The computing order: ``order[position] = token``, an int64 permutation ``[tokens]``.

    Text and videos stay where they are, and frames in order. Inside a frame, tokens are walked in horizontal bands,
    column by column, turning round at the end of each band, so that *every* run of about ``run`` consecutive tokens
    (between the key block's and the query block's size) covers a compact window of the frame. Unlike a raster of fixed
    windows this has no ragged edge to straddle: a run is as compact wherever it starts.
    """
    order = torch.arange(layout.tokens)
    _, t, h, w = layout.coordinates()
    for span in layout.spans:
        inside, (_, height, width) = slice(span.start, span.stop), span.grid
        bands = min(max(round(height / math.sqrt(run)), 1), height)  # about as high as a square window of `run`
        band = h[inside] * bands // height
        column = torch.where(band % 2 == 0, w[inside], width - 1 - w[inside])
        order[inside] = (((t[inside] * height + band) * width + column) * height + h[inside]).argsort() + span.start
    return order
