# SPDX-License-Identifier: Apache-2.0
"""The shrunk video models of `benchmarks.zoo` that tests build at several grids, and the graphs that Dynamo makes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo.testing import EagerAndRecordGraphs

from benchmarks.zoo.case import Builder, Grid, ModelCase, randn
from benchmarks.zoo.cog import cogvideox
from benchmarks.zoo.conv import allegro, easyanimate, latte, motif_video, sana_wm
from benchmarks.zoo.conv import hunyuan_video as _hunyuan_video
from benchmarks.zoo.linear import cosmos3, kandinsky5, ltx, ltx2
from benchmarks.zoo.wan import skyreels_v2, wan

__all__ = ["VIDEO_MODELS", "Grid", "ModelCase", "capture", "cosmos3", "latte", "randn", "sana_wm"]

hunyuan_video = partial(_hunyuan_video, single_layers=2)


def capture(
    model: Callable[..., Any],
    *args: Any,
    dynamic: bool = False,
    grad: bool = False,
    fullgraph: bool = True,
    **kwargs: Any,
) -> list[fx.GraphModule]:
    """The Dynamo graphs of one call."""
    torch._dynamo.reset()
    recorder = EagerAndRecordGraphs()
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=recorder, fullgraph=fullgraph, dynamic=dynamic)(*args, **kwargs)
    return recorder.graphs


VIDEO_MODELS: dict[str, Builder] = {
    "wan": wan,
    "hunyuan_video": hunyuan_video,
    "hunyuan_video_token_replace": partial(hunyuan_video, image="token_replace"),
    "cogvideox": cogvideox,
    "cogvideox_rotary": partial(cogvideox, rotary=True),
    "cogvideox_15": partial(cogvideox, rotary=True, patch_t=2),
    "allegro": allegro,
    "allegro_masked": partial(allegro, mask=True),
    "ltx": ltx,
    "ltx2": ltx2,
    "skyreels_v2": skyreels_v2,
    "easyanimate": easyanimate,
    "motif_video": motif_video,
    "kandinsky5": kandinsky5,
}
"""Builders that take a grid and a batch size."""
