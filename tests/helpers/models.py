# SPDX-License-Identifier: Apache-2.0
"""Shrunk, unmodified diffusers video transformers, with inputs and with what the analysis must find in them.

Each builder takes the token grid `(T, H, W)` and the batch size, and returns a `Case`: random weights, one forward's
inputs, the expected text segment and the expected number of video self-attentions. `capture` gives the graphs that
Dynamo makes of a model, without compiling them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import EagerAndRecordGraphs

Grid = tuple[int, int, int]


@dataclass
class Case:
    """A model, its inputs and what is known about its attentions."""

    model: nn.Module
    inputs: dict[str, Any]
    grid: Grid
    text: tuple[int, int]
    video: int
    """number of video self-attentions"""
    dense: int
    """number of all other SDPA calls"""


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


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Seeded normal float32 tensor of the given shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan(grid: Grid, batch: int = 1, *, layers: int = 2, heads: int = 2, head_dim: int = 24) -> Case:
    """Wan: 3-D convolution, interleaved rotary written in place, text by cross-attention."""
    from diffusers import WanTransformer3DModel

    t, h, w = grid
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    inputs = {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 12, 16, seed=1),
        "return_dict": False,
    }
    return Case(model.eval(), inputs, grid, (0, 0), layers, layers)


def skyreels_v2(grid: Grid, batch: int = 1, *, layers: int = 2) -> Case:
    """SkyReels-V2: Wan's layout with its own timestep path."""
    from diffusers import SkyReelsV2Transformer3DModel

    t, h, w = grid
    model = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    inputs = {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 12, 16, seed=1),
        "return_dict": False,
    }
    return Case(model.eval(), inputs, grid, (0, 0), layers, layers)


def hunyuan_video(grid: Grid, batch: int = 1, *, image: str | None = None) -> Case:
    """HunyuanVideo: 3-D convolution, text after, key-padding mask, a text refiner, dual and single blocks."""
    from diffusers import HunyuanVideoTransformer3DModel

    t, h, w = grid
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=image is None,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=image,
    )
    text = 10
    mask = torch.ones(batch, text)
    mask[-1, -3:] = 0
    inputs = {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, text, 16, seed=1),
        "pooled_projections": randn(batch, 8, seed=2),
        "encoder_attention_mask": mask,
        "return_dict": False,
    }
    if image is None:
        inputs["guidance"] = torch.full((batch,), 1000.0)
    return Case(model.eval(), inputs, grid, (0, text), 3, 1)


def cogvideox(grid: Grid, batch: int = 1, *, rotary: bool = False, patch_t: int | None = None) -> Case:
    """CogVideoX: per-frame 2-D convolution (1.0) or 3-D patches by reshape (1.5, `patch_t`), text before."""
    from diffusers import CogVideoXTransformer3DModel

    t, h, w = grid
    text, head_dim, frames = 9, 16, t * (patch_t or 1)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=2 * w,
        sample_height=2 * h,
        sample_frames=4 * (frames - 1) + 1,
        patch_size=2,
        patch_size_t=patch_t,
        patch_bias=patch_t is None,
        temporal_compression_ratio=4,
        max_text_seq_length=text,
        use_rotary_positional_embeddings=rotary,
    )
    inputs: dict[str, Any] = {
        "hidden_states": randn(batch, frames, 4, 2 * h, 2 * w),
        "encoder_hidden_states": randn(batch, text, 16, seed=1),
        "timestep": torch.full((batch,), 500),
        "return_dict": False,
    }
    if rotary:
        inputs["image_rotary_emb"] = (randn(t * h * w, head_dim, seed=2), randn(t * h * w, head_dim, seed=3))
    return Case(model.eval(), inputs, grid, (text, 0), 2, 0)


def allegro(grid: Grid, batch: int = 1, *, mask: bool = False) -> Case:
    """Allegro: per-frame 2-D convolution, rotary tables looked up by position, optional additive key mask."""
    from diffusers import AllegroTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    t, h, w = grid
    head_dim = 24
    model = AllegroTransformer3DModel(
        patch_size=2,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=2 * head_dim,
        sample_height=2 * h,
        sample_width=2 * w,
        sample_frames=t,
        caption_channels=16,
    )
    # what AllegroPipeline prepares
    *freqs, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(head_dim, ((0, 0), (h, w)), (h, w), t)
    mesh = torch.cartesian_prod(grid_t, grid_h, grid_w).to(torch.int64)
    positions = tuple(p.reshape(1, -1).expand(batch, -1).contiguous() for p in mesh.unbind(-1))
    inputs: dict[str, Any] = {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "encoder_hidden_states": randn(batch, 11, 16, seed=1),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.ones(batch, 11),
        "image_rotary_emb": (tuple(freqs), positions),
        "return_dict": False,
    }
    if mask:
        inputs["attention_mask"] = torch.ones(batch, t, 2 * h, 2 * w)
    return Case(model.eval(), inputs, grid, (0, 0), 2, 2)


def ltx(grid: Grid, batch: int = 1) -> Case:
    """LTX-Video: packed tokens; the grid shows in the rotary mesh only."""
    from diffusers import LTXVideoTransformer3DModel

    t, h, w = grid
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    inputs = {
        "hidden_states": randn(batch, t * h * w, 4),
        "encoder_hidden_states": randn(batch, 13, 16, seed=1),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.ones(batch, 13),
        "num_frames": t,
        "height": h,
        "width": w,
        "rope_interpolation_scale": (0.32, 32.0, 32.0),
        "return_dict": False,
    }
    return Case(model.eval(), inputs, grid, (0, 0), 2, 2)


def ltx2(grid: Grid, batch: int = 1) -> Case:
    """LTX-2: LTX's packed video next to an audio stream, with attention between the two."""
    from diffusers import LTX2VideoTransformer3DModel

    t, h, w = grid
    model = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
    )
    inputs = {
        "hidden_states": randn(batch, t * h * w, 4),
        "audio_hidden_states": randn(batch, 9, 4, seed=1),
        "encoder_hidden_states": randn(batch, 13, 16, seed=2),
        "audio_encoder_hidden_states": randn(batch, 13, 16, seed=3),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": torch.ones(batch, 13),
        "audio_encoder_attention_mask": torch.ones(batch, 13),
        "num_frames": t,
        "height": h,
        "width": w,
        "audio_num_frames": 9,
        "fps": 25.0,
        "return_dict": False,
    }
    return Case(model.eval(), inputs, grid, (0, 0), 2, 10)


def easyanimate(grid: Grid, batch: int = 1) -> Case:
    """EasyAnimate: per-frame 2-D convolution, text before, rotary computed in the model."""
    from diffusers import EasyAnimateTransformer3DModel

    t, h, w = grid
    model = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=16,
        sample_height=16,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
        time_position_encoding_type="3d_rope",
    )
    inputs = {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 7, 16, seed=1),
        "return_dict": False,
    }
    return Case(model.eval(), inputs, grid, (7, 0), 2, 0)


def motif_video(grid: Grid, batch: int = 1) -> Case:
    """Motif-Video: 3-D convolution, text after, no mask."""
    from diffusers import MotifVideoTransformer3DModel

    t, h, w = grid
    model = MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        patch_size=2,
        text_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
    )
    inputs = {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 7, 16, seed=1),
        "return_dict": False,
    }
    return Case(model.eval(), inputs, grid, (0, 7), 2, 0)


def kandinsky5(grid: Grid, batch: int = 1) -> Case:
    """Kandinsky 5: channels-last latents, 3-D patches by reshape and a linear layer, text by cross-attention."""
    from diffusers import Kandinsky5Transformer3DModel

    t, h, w = grid
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    inputs = {
        "hidden_states": randn(batch, t, 2 * h, 2 * w, 4),
        "encoder_hidden_states": randn(batch, 7, 16, seed=1),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": randn(batch, 8, seed=2),
        "visual_rope_pos": (torch.arange(t), torch.arange(h), torch.arange(w)),
        "text_rope_pos": torch.arange(7),
        "return_dict": False,
    }
    return Case(model.eval(), inputs, grid, (0, 0), 2, 3)


def latte(grid: Grid, batch: int = 1) -> Case:
    """Latte: attention inside frames and along time in turn, never over the whole video."""
    from diffusers import LatteTransformer3DModel

    t, h, w = grid
    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=2 * h,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=16,
        video_length=t,
    )
    inputs = {
        "hidden_states": randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(batch, 7, 16, seed=1),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }
    return Case(model.eval(), inputs, (1, h, w), (0, 0), 1, 2)


def cosmos3(grid: Grid, batch: int = 1) -> Case:
    """Cosmos 3: the video attends to text and video, the text to itself; the caller packs both into one sequence."""
    from diffusers import Cosmos3OmniTransformer

    assert batch == 1
    t, h, w = grid
    text, tokens = 9, t * h * w
    model = Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        patch_latent_dim=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        rope_axes_dim=[4, 2, 2],
        vocab_size=32,
    )
    vision = torch.arange(text, text + tokens)
    mesh = torch.stack(torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")).flatten(1)
    inputs = {
        "input_ids": torch.arange(1, 1 + text),
        "text_indexes": torch.arange(text),
        "position_ids": torch.cat([torch.arange(text).expand(3, -1), text + mesh], dim=1),
        "und_len": text,
        "sequence_length": text + tokens,
        "vision_tokens": [randn(1, 4, t, 2 * h, 2 * w)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": torch.full((tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(t)],
        "return_dict": False,
    }
    return Case(model.eval(), inputs, grid, (text, 0), 2, 2)


def sana_wm(grid: Grid, batch: int = 1) -> Case:
    """SANA-WM: every second block attends; between, scans over the frames both ways and convolutions along them."""
    from diffusers import SanaWMTransformer3DModel

    t, h, w = grid
    model = SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=16,
        caption_channels=16,
        mlp_ratio=2.0,
        chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=2,
    )
    pose = torch.eye(4).repeat(batch, t, 1, 1)
    camera = torch.tensor([w, h, w / 2, h / 2]).expand(batch, t, 4)
    inputs = {
        "hidden_states": randn(batch, 4, t, h, w),
        "timestep": torch.full((batch, 1, t), 500.0),
        "encoder_hidden_states": randn(batch, 1, 9, 16, seed=1),
        "encoder_attention_mask": torch.ones(batch, 9),
        "camera_conditions": torch.cat([pose.flatten(-2), camera], dim=-1),
        "chunk_plucker": randn(batch, 6, t, h, w, seed=2),
        "return_dict": False,
    }
    return Case(model.eval(), inputs, grid, (0, 0), 2, 2)


VIDEO_MODELS: dict[str, Callable[[Grid, int], Case]] = {
    "wan": wan,
    "hunyuan_video": hunyuan_video,
    "hunyuan_video_token_replace": lambda grid, batch: hunyuan_video(grid, batch, image="token_replace"),
    "cogvideox": cogvideox,
    "cogvideox_rotary": lambda grid, batch: cogvideox(grid, batch, rotary=True),
    "cogvideox_15": lambda grid, batch: cogvideox(grid, batch, rotary=True, patch_t=2),
    "allegro": allegro,
    "allegro_masked": lambda grid, batch: allegro(grid, batch, mask=True),
    "ltx": ltx,
    "ltx2": ltx2,
    "skyreels_v2": skyreels_v2,
    "easyanimate": easyanimate,
    "motif_video": motif_video,
    "kandinsky5": kandinsky5,
}
