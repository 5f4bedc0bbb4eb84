# SPDX-License-Identifier: Apache-2.0
"""Builders: CogVideoX, ConsisID and the classes of JoyImage, which are image editors with a time axis."""

from __future__ import annotations

from functools import partial
from typing import Any

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
)

CHANNELS = 4
LAYERS = 2
JOY: dict[str, Any] = {
    "in_channels": CHANNELS,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": WIDTH,
    "num_layers": LAYERS,
    "rope_dim_list": [4, 6, 6],
}


def _cog_config(grid: Grid = GRID, patch_t: int | None = None) -> dict[str, Any]:
    t, h, w = grid
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 8,
        "text_embed_dim": WIDTH,
        "num_layers": LAYERS,
        "sample_width": 2 * w,
        "sample_height": 2 * h,
        "sample_frames": 4 * (t * (patch_t or 1) - 1) + 1,
        "max_text_seq_length": TEXT,
    }


def _cog_inputs(
    grid: Grid = GRID, batch: int = BATCH, patch_t: int | None = None, *, rotary: bool = True, head_dim: int = 16
) -> dict[str, Any]:
    t, h, w = grid
    inputs: dict[str, Any] = {
        "hidden_states": randn(batch, t * (patch_t or 1), CHANNELS, 2 * h, 2 * w),
        "encoder_hidden_states": text(batch),
        "timestep": timestep(500, batch),
    }
    if rotary:  # as the pipelines make it
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(head_dim, ((0, 0), (h, w)), (h, w), t)
    return inputs


@builds("CogVideoXTransformer3DModel", "1.0, 2B: sinusoidal positions")
def cogvideox(grid: Grid = GRID, batch: int = BATCH, *, rotary: bool = False, patch_t: int | None = None) -> ModelCase:
    """Convolution frame by frame, or, with `patch_t`, patches by reshape; text before."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        **_cog_config(grid, patch_t),
        patch_size_t=patch_t,
        patch_bias=patch_t is None,
        use_rotary_positional_embeddings=rotary,
    )
    inputs = _cog_inputs(grid, batch, patch_t, rotary=rotary)
    return ModelCase(model, inputs, grid, (TEXT, 0), video=LAYERS, dense=0)


builds("CogVideoXTransformer3DModel", "1.0, 5B: rotary positions")(partial(cogvideox, rotary=True))
builds("CogVideoXTransformer3DModel", "1.5")(partial(cogvideox, rotary=True, patch_t=2))


@builds("ConsisIDTransformer3DModel")
def consisid() -> ModelCase:
    from diffusers import ConsisIDTransformer3DModel

    model = ConsisIDTransformer3DModel(
        **_cog_config() | {"attention_head_dim": 48},
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=16,
        cross_attn_num_heads=1,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=4,
        LFE_output_dim=64,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )
    inputs = _cog_inputs(head_dim=48) | {
        "id_cond": randn(BATCH, 8, seed=4),
        "id_vit_hidden": [randn(BATCH, 6, 8, seed=5)],
    }
    return ModelCase(model, inputs, GRID, (TEXT, 0))


@builds("JoyImageEditTransformer3DModel")
def joyimage_edit() -> ModelCase:
    from diffusers import JoyImageEditTransformer3DModel

    inputs = {"hidden_states": latents(CHANNELS), "timestep": timestep(500), "encoder_hidden_states": text()}
    return ModelCase(JoyImageEditTransformer3DModel(**JOY), inputs, GRID, (0, TEXT))


@builds("JoyImageEditPlusTransformer3DModel")
def joyimage_edit_plus() -> ModelCase:
    from diffusers import JoyImageEditPlusTransformer3DModel

    t, h, w = GRID
    inputs = {
        "hidden_states": randn(BATCH, t * h * w, CHANNELS, 1, 2, 2),
        "timestep": timestep(500),
        "encoder_hidden_states": text(),
        "shape_list": [[(1, h, w)] * t] * BATCH,
    }
    model = JoyImageEditPlusTransformer3DModel(**JOY)
    note = "the frames are images that a caller packed; here of one size"
    grids, around = ((1, h, w),) * t, (*(0,) * t, TEXT)
    return ModelCase(model, inputs, grids, around, note=note)
