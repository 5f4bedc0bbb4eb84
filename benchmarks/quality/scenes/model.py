# SPDX-License-Identifier: Apache-2.0
"""The scene model: diffusers' `HunyuanVideoTransformer3DModel`, small, on pixels (no VAE), its text in the sequence.

Clips of 16 x 128 x 128 pixels in patches of 4 x 4 are 16 x 32 x 32 = 16,384 tokens, and 32 of the caption come after
them in every attention. Few layers that are wide: attention costs most at this length, and it grows with the width and
the number of layers alone, while the parameters grow with the square of the width.
"""

from __future__ import annotations

from typing import Any

import torch
from demo_model import ValidationSet, Velocity, shifted
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn

from benchmarks.quality.scenes.captions import TEXT_DIM
from benchmarks.quality.scenes.clips import make_scenes

FRAMES, HEIGHT, WIDTH = 16, 128, 128  # in frames and pixels
SHIFT = 5.0  # moves noise levels towards more noise, further than the demo's: these clips have more pixels
CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "num_refiner_layers": 1,
    "mlp_ratio": 3.0,
    "patch_size": 4,
    "patch_size_t": 1,
    "guidance_embeds": False,
    "text_embed_dim": TEXT_DIM,
    "pooled_projection_dim": TEXT_DIM,
    "rope_axes_dim": (16, 24, 24),
}


class WithoutMask(HunyuanVideoAttnProcessor2_0):
    """The class's own attention without its mask: of a caption with no padding it hides nothing, but scaled dot-product
    attention takes no flash kernel where there is one."""

    def __call__(  # spelled out: diffusers passes on what it finds in the signature
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


def build_model(**overrides: Any) -> HunyuanVideoTransformer3DModel:
    """A model with fresh weights in float32; `overrides` replace entries of `CONFIG`.

    As usual for diffusion transformers, every block begins as the identity and the model predicts nothing.
    """
    model = HunyuanVideoTransformer3DModel(**{**CONFIG, **overrides})
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    blocks = (*model.transformer_blocks, *model.single_transformer_blocks)
    modulations = [part for name, part in model.named_modules() if name.endswith(("norm.linear", "norm_out.linear"))]
    modulations += [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in (*modulations, model.proj_out):
        nn.init.zeros_(linear.weight)
    for block in blocks:
        block.attn.set_processor(WithoutMask())
    return model


def velocity_of(model: HunyuanVideoTransformer3DModel) -> Velocity:
    """`model` as a function of video, timestep and caption: the mask says that all of the caption is text, and the
    pooled text is its mean."""

    def velocity(mixed: Tensor, timestep: Tensor, caption: Tensor, return_dict: bool = False) -> tuple[Tensor, ...]:
        real = torch.ones(caption.shape[:2], dtype=torch.int64, device=caption.device)
        pooled = caption.mean(1)
        result: tuple[Tensor, ...] = model(mixed, timestep, caption, real, pooled, return_dict=return_dict)
        return result

    return velocity


def validation_set(
    count: int = 16, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, seed: int = 30_000_001
) -> ValidationSet:
    """`count` held-out clips drawn on the CPU, with noise levels spread evenly (before the shift)."""
    generator = torch.Generator().manual_seed(seed)
    clips = make_scenes(count, frames, height, width, generator=generator)
    noise = torch.randn(clips.video.shape, generator=generator)
    return ValidationSet(clips.video, clips.caption, shifted((torch.arange(count) + 0.5) / count, SHIFT), noise)
