# SPDX-License-Identifier: Apache-2.0
"""Builders: other classes that make their patches by convolution, in three dimensions or frame by frame."""

from __future__ import annotations

from functools import partial
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
)

CHANNELS = 4
LAYERS = 2
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": CHANNELS, "out_channels": CHANNELS}
ROPE = (4, 6, 6)
PADDING = 3
"""Tokens of padding at the end of a text with a mask."""


def text_mask(tokens: int = TEXT, padding: int = PADDING, batch: int = BATCH) -> torch.Tensor:
    """``[B, tokens]``: 1 for a word, 0 for padding, which the last text of a batch has."""
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, tokens - padding :] = 0
    return mask


def _inputs(grid: Grid = GRID, batch: int = BATCH) -> dict[str, Any]:
    """Latents, a timestep and a text."""
    hidden = latents(CHANNELS, grid, batch)
    return {"hidden_states": hidden, "timestep": timestep(500, batch), "encoder_hidden_states": text(batch)}


@builds("HunyuanVideoTransformer3DModel")
def hunyuan_video(
    grid: Grid = GRID, batch: int = BATCH, *, image: str | None = None, single_layers: int = 1
) -> ModelCase:
    """Text after, with a mask of its padding, refined by attention of its own; dual and single blocks."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        **HEADS,
        num_layers=1,
        num_single_layers=single_layers,
        num_refiner_layers=1,
        guidance_embeds=image is None,
        text_embed_dim=WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=ROPE,
        image_condition_type=image,
    )
    inputs = {
        "hidden_states": latents(CHANNELS, grid, batch),
        "timestep": timestep(500, batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(batch=batch),
        "pooled_projections": randn(batch, 8, seed=2),
    }
    if image is None:
        inputs["guidance"] = torch.full((batch,), 1000.0)
    return ModelCase(model, inputs, grid, (0, TEXT), video=1 + single_layers, dense=1)


builds("HunyuanVideoTransformer3DModel", "image to video, token replace")(partial(hunyuan_video, image="token_replace"))


@builds("HunyuanVideo15Transformer3DModel")
def hunyuan_video_15() -> ModelCase:
    from diffusers import HunyuanVideo15Transformer3DModel

    t, h, w = GRID
    glyphs, image = 4, 3
    model = HunyuanVideo15Transformer3DModel(
        **HEADS,
        num_layers=LAYERS,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=ROPE,
        target_size=16,
        task_type="t2v",
    )
    inputs = {
        "hidden_states": randn(BATCH, CHANNELS, t, h, w),
        "timestep": timestep(500.0),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask().float(),
        "encoder_hidden_states_2": text(tokens=glyphs, channels=8, seed=2),
        "encoder_attention_mask_2": text_mask(glyphs, 1).float(),
        "image_embeds": torch.zeros(BATCH, image, 12),
    }
    after = (0, TEXT + glyphs + image)
    return ModelCase(model, inputs, GRID, after)


@builds("HunyuanVideoFramepackTransformer3DModel")
def hunyuan_video_framepack() -> ModelCase:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    _, h, w = GRID
    model = HunyuanVideoFramepackTransformer3DModel(
        **HEADS,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=8,
        rope_axes_dim=ROPE,
        has_image_proj=True,
        image_proj_dim=WIDTH,
        has_clean_x_embedder=True,
    )
    image = 5
    inputs = {
        "hidden_states": latents(CHANNELS),
        "timestep": timestep(500),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": text_mask(),
        "pooled_projections": randn(BATCH, 8, seed=2),
        "image_embeds": text(tokens=image, seed=3),
        "indices_latents": torch.arange(8, 8 + GRID[0]),
        "guidance": torch.full((BATCH,), 1000.0),
        "latents_clean": latents(CHANNELS, (2, h, w), seed=4),
        "indices_latents_clean": torch.tensor([0, 7]),
        "latents_history_2x": latents(CHANNELS, (2, h, w), seed=5),
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": latents(CHANNELS, (4, h, w), seed=6),
        "indices_latents_history_4x": torch.arange(1, 5),
    }
    grids = ((1, -(-h // 4), -(-w // 4)), (1, -(-h // 2), -(-w // 2)), (2, h, w), GRID)
    around = (0, 0, 0, 0, image + TEXT - PADDING)
    note = "before the video: frames of the past at a half, a quarter and the full resolution; padding is cut off"
    return ModelCase(model, inputs, grids, around, note=note)


@builds("MotifVideoTransformer3DModel")
def motif_video(grid: Grid = GRID, batch: int = BATCH) -> ModelCase:
    from diffusers import MotifVideoTransformer3DModel

    model = MotifVideoTransformer3DModel(
        **HEADS, num_layers=1, num_single_layers=1, text_embed_dim=WIDTH, rope_axes_dim=ROPE
    )
    inputs = _inputs(grid, batch)
    return ModelCase(model, inputs, grid, (0, TEXT), video=2, dense=0)


@builds("MotifVideoTransformer3DModel", "padded text")
def motif_video_masked() -> ModelCase:
    case = motif_video()
    case.inputs["encoder_attention_mask"] = text_mask()
    return case


@builds("AllegroTransformer3DModel")
def allegro(grid: Grid = GRID, batch: int = BATCH, *, mask: bool = False) -> ModelCase:
    """Convolution frame by frame, rotary tables looked up by position, with `mask` one of the video's keys."""
    from diffusers import AllegroTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    t, h, w = grid
    head_dim = 24
    model = AllegroTransformer3DModel(
        **HEADS | {"attention_head_dim": head_dim},
        patch_size=2,
        patch_size_t=1,
        num_layers=LAYERS,
        cross_attention_dim=2 * head_dim,
        sample_height=2 * h,
        sample_width=2 * w,
        sample_frames=t,
        caption_channels=WIDTH,
    )
    # as AllegroPipeline prepares them
    *tables, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(head_dim, ((0, 0), (h, w)), (h, w), t)
    mesh = torch.cartesian_prod(grid_t, grid_h, grid_w).long()
    positions = tuple(axis.reshape(1, -1).expand(batch, -1).contiguous() for axis in mesh.unbind(-1))
    inputs = _inputs(grid, batch) | {
        "encoder_attention_mask": text_mask(batch=batch),
        "image_rotary_emb": (tuple(tables), positions),
    }
    if mask:
        inputs["attention_mask"] = torch.ones(batch, t, 2 * h, 2 * w)
        inputs["attention_mask"][..., -2:] = 0
    return ModelCase(model, inputs, grid, video=LAYERS, dense=LAYERS)


builds("AllegroTransformer3DModel", "padded video")(partial(allegro, mask=True))


@builds("EasyAnimateTransformer3DModel")
def easyanimate(grid: Grid = GRID, batch: int = BATCH) -> ModelCase:
    from diffusers import EasyAnimateTransformer3DModel

    model = EasyAnimateTransformer3DModel(
        **HEADS,
        patch_size=2,
        sample_width=16,
        sample_height=16,
        num_layers=LAYERS,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        time_position_encoding_type="3d_rope",
    )
    return ModelCase(model, _inputs(grid, batch), grid, (TEXT, 0), video=LAYERS, dense=0)


@builds("MochiTransformer3DModel")
def mochi() -> ModelCase:
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=LAYERS,
        pooled_projection_dim=32,
        in_channels=CHANNELS,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )
    inputs = {
        "hidden_states": latents(CHANNELS),
        "encoder_hidden_states": text(),
        "timestep": timestep(500),
        "encoder_attention_mask": text_mask().bool(),
    }
    after = (0, TEXT - PADDING)
    return ModelCase(model, inputs, GRID, after, note="the text's padding is cut off")


@builds("LatteTransformer3DModel")
def latte(grid: Grid = GRID, batch: int = BATCH) -> ModelCase:
    from diffusers import LatteTransformer3DModel

    t, h, w = grid
    model = LatteTransformer3DModel(
        **HEADS | {"out_channels": 2 * CHANNELS},
        num_layers=1,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=2 * h,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=WIDTH,
        video_length=t,
    )
    note = "never over the whole video: inside frames and along time in turn; counted are those inside frames"
    return ModelCase(model, _inputs(grid, batch), (1, h, w), video=1, dense=2, note=note)


@builds("SanaVideoTransformer3DModel")
def sana_video() -> ModelCase:
    from diffusers import SanaVideoTransformer3DModel

    model = SanaVideoTransformer3DModel(
        **HEADS,
        num_layers=LAYERS,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    inputs: dict[str, Any] = {
        "hidden_states": latents(CHANNELS),
        "encoder_hidden_states": text(),
        "timestep": timestep(500),
    }
    return ModelCase(model, inputs, otherwise=(LAYERS, "linear attention"))


@builds("SanaWMTransformer3DModel")
def sana_wm(grid: Grid = GRID, batch: int = BATCH) -> ModelCase:
    from diffusers import SanaWMTransformer3DModel

    t, h, w = grid
    model = SanaWMTransformer3DModel(
        in_channels=CHANNELS,
        num_layers=LAYERS,
        hidden_size=32,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=16,
        caption_channels=WIDTH,
        mlp_ratio=2.0,
        chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=LAYERS,
    )
    # each frame's camera: its pose, 0.1 forward at a time, and focal lengths and centre
    pose = torch.eye(4).repeat(batch, t, 1, 1)
    pose[..., 2, 3] = 0.1 * torch.arange(t)
    camera = torch.tensor([w, h, w / 2, h / 2]).expand(batch, t, 4)
    inputs = {
        "hidden_states": randn(batch, CHANNELS, t, h, w),
        "timestep": torch.full((batch, 1, t), 500.0),
        "encoder_hidden_states": text(batch)[:, None],
        "encoder_attention_mask": text_mask(batch=batch),
        "camera_conditions": torch.cat([pose.flatten(-2), camera], dim=-1),
        "chunk_plucker": randn(batch, 6, t, h, w, seed=2),
    }
    recurrent = 1, "gated delta rule, a recurrence over frames"
    return ModelCase(model, inputs, grid, video=LAYERS, dense=LAYERS, otherwise=recurrent)
