# SPDX-License-Identifier: Apache-2.0
"""Builders: Wan and the classes that grew out of it. Patches by 3-D convolution, text by cross-attention."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.zoo.case import (
    BATCH,
    GRID,
    TEXT,
    WIDTH,
    Grid,
    ModelCase,
    builds,
    latents,
    randn,
    text,
    timestep,
    tokens_of,
)

CHANNELS = 4
LAYERS = 2
WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": LAYERS,
    "cross_attn_norm": True,
    "rope_max_seq_len": 64,
}


def wan_inputs(grid: Grid = GRID, batch: int = BATCH) -> dict[str, Any]:
    """What forward of most of the family takes."""
    hidden = latents(CHANNELS, grid, batch)
    return {"hidden_states": hidden, "timestep": timestep(500, batch), "encoder_hidden_states": text(batch)}


@builds("WanTransformer3DModel")
def wan(grid: Grid = GRID, batch: int = BATCH, *, layers: int = LAYERS) -> ModelCase:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**WAN | {"num_layers": layers})
    return ModelCase(model, wan_inputs(grid, batch), grid, video=layers, dense=layers)


@builds("WanTransformer3DModel", "image to video")
def wan_image(grid: Grid = GRID) -> ModelCase:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**WAN, image_dim=WIDTH, added_kv_proj_dim=48)
    return ModelCase(model, wan_inputs(grid) | {"encoder_hidden_states_image": text(tokens=6, seed=2)}, grid)


@builds("WanTransformer3DModel", "a timestep for each token")
def wan_timesteps(grid: Grid = GRID) -> ModelCase:
    from diffusers import WanTransformer3DModel

    steps = torch.linspace(0, 900, tokens_of(grid)).expand(BATCH, -1).clone()
    return ModelCase(WanTransformer3DModel(**WAN), wan_inputs(grid) | {"timestep": steps}, grid)


@builds("WanVACETransformer3DModel")
def wan_vace() -> ModelCase:
    from diffusers import WanVACETransformer3DModel

    model = WanVACETransformer3DModel(**WAN, vace_layers=[0, 1], vace_in_channels=6)
    return ModelCase(model, wan_inputs() | {"control_hidden_states": latents(6, seed=2)})


@builds("WanAnimateTransformer3DModel")
def wan_animate() -> ModelCase:
    from diffusers import WanAnimateTransformer3DModel

    t, h, w = GRID
    model = WanAnimateTransformer3DModel(
        **WAN | {"in_channels": 2 * CHANNELS + 4},
        latent_channels=CHANNELS,
        image_dim=WIDTH,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    inputs = wan_inputs() | {
        "hidden_states": latents(2 * CHANNELS + 4),
        "encoder_hidden_states_image": text(tokens=6, seed=2),
        "pose_hidden_states": latents(CHANNELS, (t - 1, h, w), seed=3),
        "face_pixel_values": randn(BATCH, 3, 4 * (t - 2) + 1, 16, 16, seed=4),
    }
    return ModelCase(model, inputs)


def _wan_animate_2() -> tuple[Any, dict[str, Any]]:
    from diffusers import WanAnimate2Transformer3DModel

    model = WanAnimate2Transformer3DModel(
        text_len=TEXT,
        in_dim=CHANNELS + 6,
        dim=48,
        ffn_dim=32,
        freq_dim=32,
        text_dim=WIDTH,
        out_dim=CHANNELS,
        num_heads=2,
        num_layers=LAYERS,
        use_img_emb=False,
    )
    inputs = {
        "hidden_states": [latents(CHANNELS)[0]],
        "timestep": timestep(500.0),
        "encoder_hidden_states": [text()[0]],
        "condition_latents": [latents(6, seed=2)[0]],
        "seq_len": tokens_of(),
    }
    return model, inputs


@builds("WanAnimate2Transformer3DModel", "reference pass")
def wan_animate_2_extract() -> ModelCase:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    model, inputs = _wan_animate_2()
    inputs |= {
        "kv_cache": WanAnimate2KVCache(LAYERS),
        "kv_cache_mode": "extract",
        "offset_grid_sizes": torch.tensor([GRID]),
    }
    return ModelCase(model, inputs)


@builds("WanAnimate2Transformer3DModel", "generation pass")
def wan_animate_2_cached() -> ModelCase:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    t, h, w = GRID
    model, inputs = _wan_animate_2()
    cache = WanAnimate2KVCache(LAYERS)
    for number in range(LAYERS):
        reference = (randn(BATCH, (t - 1) * h * w, 2, 24, seed=seed + 2 * number) for seed in (5, 6))
        cache.get(number).store(*reference)
    inputs |= {
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "reference_grid_sizes": torch.tensor([(t - 1, h, w)]),
        "origin_len": 4 * (t - 2) + 1,
        "origin_area": [16 * h, 16 * w],
    }
    return ModelCase(model, inputs, otherwise=(LAYERS, "FlexAttention, keys of the reference beside its own"))


@builds("SkyReelsV2Transformer3DModel")
def skyreels_v2(grid: Grid = GRID, batch: int = BATCH) -> ModelCase:
    from diffusers import SkyReelsV2Transformer3DModel

    model = SkyReelsV2Transformer3DModel(**WAN)
    return ModelCase(model, wan_inputs(grid, batch), grid, video=LAYERS, dense=LAYERS)


@builds("SkyReelsV2Transformer3DModel", "diffusion forcing, causal in blocks")
def skyreels_v2_causal() -> ModelCase:
    from diffusers import SkyReelsV2Transformer3DModel

    _, h, w = GRID
    grid = (4, h, w)
    model = SkyReelsV2Transformer3DModel(**WAN, inject_sample_info=True, num_frame_per_block=2)
    inputs = wan_inputs() | {
        "hidden_states": latents(CHANNELS, grid),
        "timestep": torch.full((BATCH, grid[0]), 500),
        "enable_diffusion_forcing": True,
        "fps": torch.zeros(BATCH, dtype=torch.long),
    }
    note = "its mask lets two frames see themselves and the frames before them"
    return ModelCase(model, inputs, grid, note=note)


@builds("ChronoEditTransformer3DModel")
def chronoedit(grid: Grid = GRID) -> ModelCase:
    from diffusers import ChronoEditTransformer3DModel

    model = ChronoEditTransformer3DModel(**WAN, image_dim=WIDTH, added_kv_proj_dim=48, rope_temporal_skip_len=8)
    return ModelCase(model, wan_inputs(grid) | {"encoder_hidden_states_image": text(tokens=6, seed=2)}, grid)


@builds("AnyFlowTransformer3DModel")
def anyflow() -> ModelCase:
    from diffusers import AnyFlowTransformer3DModel

    t, _, _ = GRID
    inputs = wan_inputs() | {
        "hidden_states": latents(CHANNELS).transpose(1, 2).contiguous(),
        "timestep": torch.full((BATCH, t), 500.0),
        "r_timestep": torch.full((BATCH, t), 250.0),
    }
    return ModelCase(AnyFlowTransformer3DModel(**WAN), inputs)


@builds("AnyFlowFARTransformer3DModel")
def anyflow_far() -> ModelCase:
    from diffusers import AnyFlowFARTransformer3DModel

    t, h, w = GRID
    model = AnyFlowFARTransformer3DModel(**WAN | {"attention_head_dim": 24}, full_chunk_limit=3)
    inputs = wan_inputs() | {
        "hidden_states": randn(BATCH, t, CHANNELS, 4 * h, 4 * w),
        "timestep": torch.full((BATCH, t), 500.0),
        "r_timestep": torch.full((BATCH, t), 250.0),
        "chunk_partition": [1, 2],
    }
    grid = (t, 2 * h, 2 * w)
    return ModelCase(model, inputs, grid, otherwise=(LAYERS, "FlexAttention, causal in chunks"))


def _helios(grid: Grid) -> tuple[Any, dict[str, Any]]:
    from diffusers import HeliosTransformer3DModel

    config = {name: value for name, value in WAN.items() if name != "rope_max_seq_len"}
    model = HeliosTransformer3DModel(**config, rope_dim=(8, 8, 8))
    indices = torch.arange(20, 20 + grid[0], dtype=torch.float32).expand(BATCH, -1).clone()
    return model, wan_inputs(grid) | {"indices_hidden_states": indices}


@builds("HeliosTransformer3DModel", "without history")
def helios(grid: Grid = GRID) -> ModelCase:
    model, inputs = _helios(grid)
    inputs.pop("indices_hidden_states")
    return ModelCase(model, inputs, grid)


@builds("HeliosTransformer3DModel", "with history of three resolutions")
def helios_history(grid: Grid = GRID) -> ModelCase:
    _, h, w = grid
    model, inputs = _helios(grid)
    frames = {"short": (16, 2), "mid": (12, 2), "long": (0, 4)}
    for number, (name, (first, count)) in enumerate(frames.items()):
        indices = torch.arange(first, first + count, dtype=torch.float32).expand(BATCH, -1).clone()
        inputs[f"indices_latents_history_{name}"] = indices
        inputs[f"latents_history_{name}"] = latents(CHANNELS, (count, h, w), seed=5 + number)
    grids = ((1, -(-h // 4), -(-w // 4)), (1, -(-h // 2), -(-w // 2)), (2, h, w), grid)
    around = (0,) * 5
    note = "before the video: frames of the past at a half, a quarter and the full resolution"
    return ModelCase(model, inputs, grids, around, note=note)
