# SPDX-License-Identifier: Apache-2.0
"""Builders: classes that make patches by reshaping and a linear layer, or take tokens that a caller packed."""

from __future__ import annotations

import math
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
from rainfusion_compile.sparsity.layout import as_grid

CHANNELS = 4
LAYERS = 2
AUDIO = 8
LTX: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": LAYERS,
    "caption_channels": WIDTH,
}
LTX_AUDIO: dict[str, Any] = {
    "audio_in_channels": CHANNELS,
    "audio_out_channels": CHANNELS,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "rope_double_precision": False,
}


def packed_inputs(grid: Grid = GRID, batch: int = BATCH) -> dict[str, Any]:
    """Tokens that a caller packed, and a text with its mask."""
    return {
        "hidden_states": randn(batch, tokens_of(grid), CHANNELS),
        "encoder_hidden_states": text(batch),
        "timestep": timestep(500.0, batch),
        "encoder_attention_mask": torch.ones(batch, TEXT),
    }


def sizes(grid: Grid) -> dict[str, int]:
    return dict(zip(("num_frames", "height", "width"), grid, strict=True))


@builds("LTXVideoTransformer3DModel")
def ltx(grid: Grid = GRID, batch: int = BATCH) -> ModelCase:
    from diffusers import LTXVideoTransformer3DModel

    inputs = packed_inputs(grid, batch) | sizes(grid) | {"rope_interpolation_scale": (0.32, 32.0, 32.0)}
    return ModelCase(LTXVideoTransformer3DModel(**LTX), inputs, grid, video=LAYERS, dense=LAYERS)


@builds("LTXVideoTransformer3DModel", "coordinates given by the caller")
def ltx_coordinates(grid: Grid = GRID) -> ModelCase:
    from diffusers import LTXVideoTransformer3DModel

    mesh = torch.stack(torch.meshgrid(*(torch.arange(float(size)) for size in grid), indexing="ij"))
    inputs = packed_inputs(grid) | {"video_coords": mesh.flatten(1).expand(BATCH, -1, -1).clone()}
    return ModelCase(LTXVideoTransformer3DModel(**LTX), inputs, grid, note="sizes are not in the call")


@builds("LTX2VideoTransformer3DModel")
def ltx2(grid: Grid = GRID, batch: int = BATCH) -> ModelCase:
    from diffusers import LTX2VideoTransformer3DModel

    audio = {
        "audio_hidden_states": randn(batch, AUDIO, CHANNELS, seed=2),
        "audio_encoder_hidden_states": text(batch, seed=3),
        "audio_encoder_attention_mask": torch.ones(batch, TEXT),
        "audio_num_frames": AUDIO,
        "fps": 25.0,
    }
    inputs = packed_inputs(grid, batch) | sizes(grid) | audio
    model = LTX2VideoTransformer3DModel(**LTX, **LTX_AUDIO)
    return ModelCase(model, inputs, grid, video=LAYERS, dense=5 * LAYERS)


@builds("SanaWMLTX2RefinerTransformer3DModel")
def sana_wm_refiner() -> ModelCase:
    from diffusers import SanaWMLTX2RefinerTransformer3DModel

    t, h, w = GRID
    model = SanaWMLTX2RefinerTransformer3DModel(**LTX, **LTX_AUDIO)
    rotary = model.build_rotary_emb_for_absolute_positions(BATCH, list(range(t)), h, w, torch.device("cpu"), 24.0)
    steps = torch.full((BATCH, tokens_of()), 500.0)
    inputs = packed_inputs() | {"timestep": steps, "video_rotary_emb": rotary}
    return ModelCase(model, inputs, note="the caller makes the rotary tables; no sizes in the call")


def _cosmos(condition: bool = False) -> ModelCase:
    from diffusers import CosmosTransformer3DModel

    t, h, w = GRID
    model = CosmosTransformer3DModel(
        in_channels=CHANNELS + condition,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=LAYERS,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(t, 2 * h, 2 * w),
        concat_padding_mask=False,
        extra_pos_embed_type=None if condition else "learnable",
    )
    inputs = {
        "hidden_states": latents(CHANNELS),
        "timestep": timestep(500.0),
        "encoder_hidden_states": text(),
        "attention_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "fps": 24,
    }
    if condition:
        inputs["condition_mask"] = torch.ones(BATCH, 1, t, 2 * h, 2 * w)
        inputs["timestep"] = torch.full((BATCH, 1, t, 1, 1), 0.5)
    return ModelCase(model, inputs, note="without the padding mask, which needs torchvision")


@builds("CosmosTransformer3DModel", "Predict 1: learnt positions")
def cosmos_predict1() -> ModelCase:
    return _cosmos()


@builds("CosmosTransformer3DModel", "Predict 2: condition mask, a timestep for each frame")
def cosmos_predict2() -> ModelCase:
    return _cosmos(condition=True)


@builds("Cosmos3OmniTransformer")
def cosmos3(grid: Grid = GRID) -> ModelCase:
    from diffusers import Cosmos3OmniTransformer

    model = Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=CHANNELS,
        patch_latent_dim=4 * CHANNELS,
        num_attention_heads=2,
        num_hidden_layers=LAYERS,
        num_key_value_heads=1,
        rope_axes_dim=[4, 2, 2],
        vocab_size=32,
    )
    tokens = tokens_of(grid)
    vision = torch.arange(TEXT, TEXT + tokens)
    mesh = torch.stack(torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")).flatten(1)
    inputs = {
        "input_ids": torch.arange(1, 1 + TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat([torch.arange(TEXT).expand(3, -1), TEXT + mesh], dim=1),
        "und_len": TEXT,
        "sequence_length": TEXT + tokens,
        "vision_tokens": [latents(CHANNELS, grid)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": torch.full((tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(grid[0])],
    }
    note = (
        "keys: the text before the video; its queries go alone, causal. The caller's indices put both in one sequence"
    )
    return ModelCase(model, inputs, grid, (TEXT, 0), tokens=tokens, video=LAYERS, dense=LAYERS, note=note)


def _minimax_h3(*grids: Grid) -> ModelCase:
    """Text, audio and videos in one sequence, every token at its place in it; a video in front is a reference."""
    from diffusers import MiniMaxH3Transformer3DModel

    model = MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=LAYERS,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=CHANNELS,
        audio_in_channels=6,
        text_dim=WIDTH,
        freq_dim=8,
        time_embed_hidden_dim=24,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    # text, references, audio, then the video, each at its place in time, row and column
    references = grids[:-1]
    video, audio_from = tokens_of(grids), TEXT + sum(map(math.prod, references))
    total, target_from = video + TEXT + AUDIO, audio_from + AUDIO
    positions = torch.zeros(total, 3)
    positions[:TEXT, 0] = torch.arange(TEXT)
    positions[audio_from:target_from, 0] = TEXT + len(references) + torch.arange(AUDIO)
    start, time = TEXT, TEXT
    for number, grid in enumerate(grids):
        start = start if number < len(references) else target_from
        mesh = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), dim=-1).flatten(0, 2)
        positions[start : start + len(mesh)] = mesh + torch.tensor([time, 0, 0])
        start, time = start + len(mesh), time + grid[0]
    audio = torch.arange(audio_from, target_from)
    modality = torch.zeros(total, dtype=torch.int64)
    modality[:TEXT], modality[audio] = 1, 2
    inputs = {
        "hidden_states": randn(BATCH, video, 4 * CHANNELS),
        "audio_hidden_states": randn(BATCH, AUDIO, 6, seed=2),
        "encoder_hidden_states": text(),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (modality == 2).long(),
        "token_tags": modality,
        "position_ids": positions,
        "video_indices": (modality == 0).nonzero()[:, 0],
        "audio_indices": audio,
        "text_indices": torch.arange(TEXT),
    }
    between = [0] * len(references) + [AUDIO]
    between[0] += TEXT
    note = "text, audio and video are scattered into one sequence by indices that are data; positions show the videos"
    return ModelCase(model, inputs, as_grid(grids), (*between, 0), note=note)


@builds("MiniMaxH3Transformer3DModel")
def minimax_h3(grid: Grid = GRID) -> ModelCase:
    return _minimax_h3(grid)


@builds("MiniMaxH3Transformer3DModel", "reference and target video")
def minimax_h3_reference(grid: Grid = GRID) -> ModelCase:
    return _minimax_h3((1, *grid[1:]), grid)


def _kandinsky_config() -> dict[str, Any]:
    return {
        "in_visual_dim": CHANNELS,
        "out_visual_dim": CHANNELS,
        "in_text_dim": WIDTH,
        "in_text_dim2": 8,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": LAYERS,
        "axes_dims": (4, 6, 6),
    }


def _kandinsky_inputs(channels: int, grid: Grid = GRID, batch: int = BATCH) -> dict[str, Any]:
    return {
        "hidden_states": latents(channels, grid, batch).permute(0, 2, 3, 4, 1).contiguous(),
        "encoder_hidden_states": text(batch),
        "timestep": timestep(500.0, batch),
        "pooled_projections": randn(batch, 8, seed=2),
    }


@builds("Kandinsky5Transformer3DModel")
def kandinsky5(grid: Grid = GRID, batch: int = BATCH) -> ModelCase:
    from diffusers import Kandinsky5Transformer3DModel

    model = Kandinsky5Transformer3DModel(**_kandinsky_config(), patch_size=(1, 2, 2))
    positions = {
        "visual_rope_pos": tuple(torch.arange(size) for size in grid),
        "text_rope_pos": torch.arange(TEXT),
    }
    channels = CHANNELS * (2 if model.visual_cond else 1) + model.visual_cond
    inputs = _kandinsky_inputs(channels, grid, batch) | positions
    return ModelCase(model, inputs, grid, video=LAYERS, dense=LAYERS + 1)


@builds("Kandinsky6Transformer3DModel", "video alone")
def kandinsky6() -> ModelCase:
    from diffusers import Kandinsky6Transformer3DModel

    model = Kandinsky6Transformer3DModel(**_kandinsky_config(), in_audio_dim=6, out_audio_dim=6)
    return ModelCase(model, _kandinsky_inputs(2 * CHANNELS + 1))


@builds("Kandinsky6Transformer3DModel", "with audio, as released")
def kandinsky6_audio() -> ModelCase:
    from diffusers import Kandinsky6Transformer3DModel

    flags = dict.fromkeys(("text_token_padding", "ca_rope", "cross_gates", "fix_modulation"), True)
    model = Kandinsky6Transformer3DModel(**_kandinsky_config(), **flags, in_audio_dim=6, out_audio_dim=6)
    inputs = _kandinsky_inputs(2 * CHANNELS + 1) | {
        "audio_hidden_states": randn(BATCH, AUDIO, 6, seed=3),
        "encoder_attention_mask": torch.arange(TEXT).expand(BATCH, -1) < TEXT - 2,
    }
    return ModelCase(model, inputs)


@builds("Kandinsky6SRTransformer3DModel")
def kandinsky6_sr() -> ModelCase:
    from diffusers import Kandinsky6SRTransformer3DModel

    grid = (3, 8, 16)
    model = Kandinsky6SRTransformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_visual_blocks=LAYERS,
        axes_dims=(4, 6, 6),
        nabla_window=(3, 3, 3),
    )
    inputs = {"hidden_states": randn(BATCH, *grid, 2 * CHANNELS + 1), "timestep": timestep(500.0)}
    return ModelCase(model, inputs, grid, otherwise=(LAYERS, "FlexAttention, sparse by NABLA"))
