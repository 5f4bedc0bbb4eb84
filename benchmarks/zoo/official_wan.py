# SPDX-License-Identifier: Apache-2.0
"""Builders of the official classes of Wan and of what is made of it."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.zoo.case import ModelCase, randn
from benchmarks.zoo.checkouts import (
    HEADS,
    LAYERS,
    TEXT,
    WIDTH,
    Edits,
    OfficialCase,
    flash_attention,
    import_from,
    official,
    stand_in,
)
from rainfusion_compile.sparsity.layout import Grid

_ANY_DTYPE: Edits = {
    "half_dtypes = (torch.float16, torch.bfloat16)": "half_dtypes = (torch.float16, torch.bfloat16, torch.float32)",
    "dtype=torch.bfloat16": "dtype=torch.float32",
}
_SDPA: Edits = {"import flash_attention": "import attention as flash_attention"}


_WAN = "wan.modules.model"
_SKYREELS = "skyreels_v2_infer.modules.transformer"
_CUDA_ONLY = {"assert q.device.type == 'cuda' and": "assert"}


def _wan(module: Any, grid: Grid, batch: int) -> ModelCase:
    time, height, width = grid
    sizes = {"in_dim": 4, "out_dim": 4, "dim": WIDTH, "ffn_dim": WIDTH, "freq_dim": 32, "text_dim": 24}
    model = module.WanModel(**sizes, text_len=TEXT, num_heads=HEADS, num_layers=LAYERS)
    inputs = {
        "x": list(randn(batch, 4, time, 2 * height, 2 * width)),
        "t": torch.full((batch,), 500.0),
        "context": list(randn(batch, 9, 24, seed=1)),
        "seq_len": time * height * width,
    }
    return OfficialCase(model, inputs, grid, video=LAYERS)


def _register_wan(repository: str) -> None:
    @official(repository, "WanModel", "SDPA, two videos")
    def sdpa(root: Path, grid: Grid) -> ModelCase:
        edits = {"wan.modules.attention": _ANY_DTYPE, _WAN: _SDPA}
        case = _wan(import_from(root, _WAN, ("wan", "wan.modules"), edits), grid, 2)
        if "t = t.expand(t.size(0), seq_len)" in inspect.getsource(type(case.model)):  # a timestep for each token
            case.inputs["t"] = case.inputs["t"][:, None].expand(-1, case.inputs["seq_len"])
        return case

    @official(repository, "WanModel", "flash-attn, varlen")
    def flash(root: Path, grid: Grid) -> ModelCase:
        flash_attention()
        edits = {"wan.modules.attention": {**_ANY_DTYPE, **_CUDA_ONLY}}
        return _wan(import_from(root, _WAN, ("wan", "wan.modules"), edits), grid, 1)


_register_wan("Wan-Video/Wan2.1")
_register_wan("Wan-Video/Wan2.2")


@official("SkyworkAI/SkyReels-V2", "WanModel", "SDPA, two videos")
def skyreels(root: Path, grid: Grid) -> ModelCase:
    eager = {"torch.compile(dynamic=True": 'torch.compile(backend="eager", dynamic=True'}
    edits = {
        "skyreels_v2_infer.modules.attention": _ANY_DTYPE,
        _SKYREELS: {**_SDPA, **eager, "x.to(torch.bfloat16)": "x.to(torch.float32)"},
    }
    module = import_from(root, _SKYREELS, ("skyreels_v2_infer", "skyreels_v2_infer.modules"), edits)
    case = _wan(module, grid, 2)
    case.inputs = {"x": torch.stack(case.inputs["x"]), "t": case.inputs["t"], "context": randn(2, TEXT, 24, seed=1)}
    return case


@official("aigc-apps/VideoX-Fun", "WanTransformer3DModel", "SDPA, two videos")
def videox_fun(root: Path, grid: Grid) -> ModelCase:
    stand_in("videox_fun.dist", **dict.fromkeys(("get_sequence_parallel_rank", "get_sequence_parallel_world_size")))
    stand_in("videox_fun.dist", **dict.fromkeys(("get_sp_group", "usp_attn_forward", "xFuserLongContextAttention")))
    stand_in("videox_fun.utils", cfg_skip=lambda: lambda function: function)
    name = "videox_fun.models.wan_transformer3d"
    edits = {name: {"dtype=torch.bfloat16": "dtype=torch.float32"}}
    module = import_from(root, name, ("videox_fun", "videox_fun.models"), edits)
    case = _wan(SimpleNamespace(WanModel=module.WanTransformer3DModel), grid, 2)
    case.inputs["x"] = torch.stack(case.inputs["x"])
    return case


@official(
    "modelscope/DiffSynth-Studio",
    "WanModel",
    "SDPA, two videos",
    "its forward unpacks what its `patchify` does not return; the tokens and their grid are given to it",
)
def diffsynth(root: Path, grid: Grid) -> ModelCase:
    name = "diffsynth.models.wan_video_dit"
    patches = {"x, (f, h, w) = self.patchify(x)": "x = self.patchify(x); f, h, w = x.shape[2:]; x = x.flatten(2).mT"}
    module = import_from(root, name, ("diffsynth", "diffsynth.models", "diffsynth.core"), {name: patches})
    time, height, width = grid
    sizes = {"in_dim": 4, "out_dim": 4, "dim": WIDTH, "ffn_dim": WIDTH, "freq_dim": 32, "text_dim": 24, "eps": 1e-6}
    shape = {"patch_size": (1, 2, 2), "num_heads": HEADS, "num_layers": LAYERS, "has_image_input": False}
    inputs = {
        "x": randn(2, 4, time, 2 * height, 2 * width),
        "timestep": torch.full((2,), 500.0),
        "context": randn(2, TEXT, 24, seed=1),
    }
    return OfficialCase(module.WanModel(**sizes, **shape), inputs, grid, video=LAYERS)
