# SPDX-License-Identifier: Apache-2.0
"""Video transformers of diffusers at their published configurations, with random weights and inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Config = dict[str, Any]
Latent = tuple[int, int, int]
REAL_TEXT = 60  # text tokens that are not padding, where a model is told


def wan_inputs(config: Config, latent: Latent) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, config["in_channels"], *latent),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, config["text_dim"]),
    }


def hunyuan_inputs(config: Config, latent: Latent) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, config["in_channels"], *latent),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 256, config["text_embed_dim"]),
        "encoder_attention_mask": (torch.arange(256) < REAL_TEXT).long()[None],
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
        "guidance": torch.tensor([6000.0]),
    }


def cogvideox_inputs(config: Config, latent: Latent) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, h, w = latent
    grid = (h // 2, w // 2)
    return {
        "hidden_states": torch.randn(1, frames, config["in_channels"], h, w),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 226, config["text_embed_dim"]),
        "image_rotary_emb": get_3d_rotary_pos_embed(config["attention_head_dim"], ((0, 0), grid), grid, frames),
    }


def allegro_inputs(config: Config, latent: Latent) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, h, w = latent
    grid = (h // 2, w // 2)
    scales = tuple(config[f"interpolation_scale_{axis}"] for axis in "thw")
    *freqs, t_pos, h_pos, w_pos = get_3d_rotary_pos_embed_allegro(
        config["attention_head_dim"], ((0, 0), grid), grid, frames, interpolation_scale=scales
    )
    mesh = torch.cartesian_prod(t_pos.long(), h_pos.long(), w_pos.long())
    return {
        "hidden_states": torch.randn(1, config["in_channels"], *latent),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, config["caption_channels"]),
        "encoder_attention_mask": (torch.arange(512) < REAL_TEXT).long()[None],
        "image_rotary_emb": (tuple(freqs), tuple(x[None].contiguous() for x in mesh.unbind(-1))),
    }


@dataclass(frozen=True)
class Model:
    """A class of diffusers, its published configuration, and one forward's inputs.

    Attributes:
        latent: frames, height and width of the latent; all models here have patches of 1x2x2.
        text: text tokens in the video's self-attention.
        masked: whether that attention has a key mask.
        shrunk: what ``--shrink`` puts in the place of parts of the configuration.
    """

    name: str
    cls: str
    config: Config
    latent: Latent
    inputs: Callable[[Config, Latent], dict[str, Any]]
    shrunk: Config
    text: int = 0
    masked: bool = False

    def sized(self, layers: int | None, shrink: bool) -> tuple[Config, Latent]:
        """The configuration and latent to run, with ``layers`` attentions where given."""
        config = self.config | (self.shrunk if shrink else {})
        if layers is not None and "num_single_layers" in config:  # HunyuanVideo has two single blocks to a dual one
            config = config | {"num_layers": max(1, layers // 3), "num_single_layers": layers - max(1, layers // 3)}
        elif layers is not None:
            config = config | {"num_layers": layers}
        return config, (5, 24, 40) if shrink else self.latent


# fmt: off
WAN: Config = {
    "patch_size": (1, 2, 2), "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
}
HUNYUAN: Config = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20,
    "num_single_layers": 40, "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 2, "patch_size_t": 1,
    "qk_norm": "rms_norm", "guidance_embeds": True, "text_embed_dim": 4096, "pooled_projection_dim": 768,
    "rope_theta": 256.0, "rope_axes_dim": (16, 56, 56),
}
COGVIDEOX: Config = {
    "num_attention_heads": 48, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "time_embed_dim": 512,
    "text_embed_dim": 4096, "num_layers": 42, "attention_bias": True, "sample_width": 90, "sample_height": 60,
    "sample_frames": 49, "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 226,
    "activation_fn": "gelu-approximate", "norm_elementwise_affine": True, "norm_eps": 1e-5,
    "use_rotary_positional_embeddings": True,
}
# Open-Sora-Plan 1.2 is not in diffusers. Allegro has its architecture and sizes; it runs with 22 frames, this with 24.
ALLEGRO: Config = {
    "patch_size": 2, "patch_size_t": 1, "num_attention_heads": 24, "attention_head_dim": 96, "in_channels": 4,
    "out_channels": 4, "num_layers": 32, "cross_attention_dim": 2304, "attention_bias": True, "sample_height": 90,
    "sample_width": 160, "sample_frames": 24, "activation_fn": "gelu-approximate", "norm_elementwise_affine": False,
    "norm_eps": 1e-6, "caption_channels": 4096, "interpolation_scale_h": 2.0, "interpolation_scale_w": 2.0,
    "interpolation_scale_t": 2.2,
}
# fmt: on
WAN_14B = WAN | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
TINY: Config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24}
TINY_WAN = TINY | {"text_dim": 32, "ffn_dim": 64}
TINY_HUNYUAN: Config = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
TINY_HUNYUAN |= {"rope_axes_dim": (4, 6, 6), "text_embed_dim": 32, "pooled_projection_dim": 16}
TINY_COGVIDEOX = TINY | {"attention_head_dim": 16, "text_embed_dim": 32}
TINY_ALLEGRO = TINY | {"cross_attention_dim": 48, "caption_channels": 32}
MODELS = {
    "wan-1.3b": Model("Wan2.1 1.3B 480p", "WanTransformer3DModel", WAN, (21, 60, 104), wan_inputs, TINY_WAN),
    "wan-1.3b-small": Model("Wan2.1 1.3B 272x368", "WanTransformer3DModel", WAN, (21, 34, 46), wan_inputs, TINY_WAN),
    "wan-14b": Model("Wan2.1 14B 720p", "WanTransformer3DModel", WAN_14B, (21, 90, 160), wan_inputs, TINY_WAN),
    "hunyuan": Model(
        *("HunyuanVideo 720p", "HunyuanVideoTransformer3DModel", HUNYUAN, (33, 90, 160), hunyuan_inputs, TINY_HUNYUAN),
        text=256,
        masked=True,
    ),
    "cogvideox": Model(
        *("CogVideoX-5B", "CogVideoXTransformer3DModel", COGVIDEOX, (13, 60, 90), cogvideox_inputs, TINY_COGVIDEOX),
        text=226,
    ),
    "allegro": Model(
        "Allegro at Open-Sora-Plan 1.2's shape",
        *("AllegroTransformer3DModel", ALLEGRO, (24, 90, 160), allegro_inputs, TINY_ALLEGRO),
    ),
}


@contextmanager
def making(device: str) -> Iterator[None]:
    """New tensors are bfloat16 and on the device, unless they say otherwise, as rotary tables do."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def build(cls: str, config: Config, device: str) -> torch.nn.Module:
    """A model with random weights, made on the device, with the dtypes that ``from_pretrained`` would give it."""
    from diffusers.models.modeling_utils import no_init_weights

    with no_init_weights(), making(device):
        model: torch.nn.Module = getattr(importlib.import_module("diffusers"), cls)(**config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        if not set(name.split(".")).isdisjoint(getattr(model, "_keep_in_fp32_modules", None) or ()):
            parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)
