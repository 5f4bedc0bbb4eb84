# SPDX-License-Identifier: Apache-2.0
"""The demo model: its shape, its files, its loss and its sampler.

It is diffusers' `WanTransformer3DModel` as it comes, only small, and it works on pixels (no VAE). The clip of
13 x 48 x 56 pixels gives a grid of 13 x 24 x 28 tokens: no axis, and not their product either, is a multiple
of a block size, because real videos seldom are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from procedural_video import make_clips
from torch import Tensor

FRAMES, HEIGHT, WIDTH = 13, 48, 56  # of the demo clip, in frames and pixels
CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 640,
    "num_layers": 6,
    "rope_max_seq_len": 64,
}
SHIFT = 3.0  # moves noise levels towards more noise: neighbouring pixels tell much about each other
TIME_SCALE = 1000.0  # Wan's timestep = noise level x 1000

# A velocity model: (noisy video [B, 3, T, H, W], timestep [B], caption [B, tokens, text_dim], return_dict=False)
Velocity = Callable[..., tuple[Tensor, ...]]


def build_model(**overrides: Any) -> WanTransformer3DModel:
    """A model with fresh weights in float32; `overrides` replace entries of `CONFIG`."""
    return WanTransformer3DModel(**{**CONFIG, **overrides})


def save_model(model: WanTransformer3DModel, folder: Path) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors with float16 weights, which
    `WanTransformer3DModel.from_pretrained(folder)` reads. `model` itself stays as it is."""
    copy = WanTransformer3DModel.from_config(dict(model.config))
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)  # where the weights came from is nobody's business
    path.write_text(json.dumps(config, indent=2) + "\n")


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """The model that `save_model` wrote, on the CPU. Like diffusers does for Wan, norms and time embedding
    stay in float32 whatever `dtype`.

    Raises:
        FileNotFoundError: `folder` holds no model.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model in {folder}: train one with examples/train_demo_model.py")
    model: WanTransformer3DModel = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    return model.eval()


def shifted(level: Tensor, shift: float = SHIFT) -> Tensor:
    """Move noise levels in [0, 1] towards 1."""
    return shift * level / (1 + (shift - 1) * level)


def flow_matching_loss(model: Velocity, video: Tensor, caption: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity `noise - video`, a float32 scalar.

    Args:
        video, noise: [B, 3, T, H, W].
        level: noise level [B] in [0, 1]; the model sees `(1 - level) * video + level * noise`.
    """
    amount = level.view(-1, 1, 1, 1, 1)
    mixed = torch.lerp(video, noise, amount)
    velocity = model(mixed, level * TIME_SCALE, caption, return_dict=False)[0]
    return (velocity.float() - (noise - video)).square().mean()


@dataclass(frozen=True)
class ValidationSet:
    """Held-out clips, each with its noise level [N] and noise: the same numbers on every machine."""

    video: Tensor
    caption: Tensor
    level: Tensor
    noise: Tensor


def validation_set(
    count: int = 32, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, seed: int = 20_000_003
) -> ValidationSet:
    """`count` clips drawn on the CPU, with noise levels spread evenly (before the shift)."""
    generator = torch.Generator().manual_seed(seed)
    clips = make_clips(count, frames, height, width, generator=generator, text_dim=CONFIG["text_dim"])
    noise = torch.randn(clips.video.shape, generator=generator)
    return ValidationSet(clips.video, clips.caption, shifted((torch.arange(count) + 0.5) / count), noise)


@torch.no_grad()
def validation_loss(
    model: Velocity,
    data: ValidationSet,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
) -> float:
    """Mean flow-matching loss over `data`, with the model's inputs in `dtype`."""
    total = 0.0
    for start in range(0, len(data.video), batch):
        part = [
            tensor[start : start + batch].to(device) for tensor in (data.video, data.caption, data.level, data.noise)
        ]
        video, caption, level, noise = part

        def in_dtype(mixed: Tensor, timestep: Tensor, caption: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
            return model(mixed.to(dtype), timestep, caption.to(dtype), **kwargs)

        total += float(flow_matching_loss(in_dtype, video, caption, level, noise)) * len(video)
    return total / len(data.video)


def sample_steps(
    model_at: Callable[[int], Velocity],
    noise: Tensor,
    caption: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    dtype: torch.dtype = torch.float32,
    shift: float = SHIFT,
) -> Iterator[Tensor]:
    """Sample a video with diffusers' Euler flow-matching scheduler: yields it [B, 3, T, H, W] float32 in [-1, 1]
    after every step, so that a caller can time steps and run two samplings in turn.

    Args:
        model_at: the velocity model to use at a step, so that some steps can run dense and others sparse.
        noise: [B, 3, T, H, W] float32; where the sampling starts.
        caption: [B, tokens, text_dim].
        guidance: strength of classifier-free guidance; 1 means none, anything else doubles the batch.
        dtype: of the model's inputs; the video itself stays in float32.
        shift: how far noise levels are moved towards more noise.

    Raises:
        ValueError: `steps` < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1.0 / steps, steps).tolist(), device=noise.device)
    scheduler.set_begin_index(0)  # else the scheduler looks each timestep up, which stalls a GPU
    guided = guidance != 1.0
    caption = (torch.cat([caption, torch.zeros_like(caption)]) if guided else caption).to(dtype)
    video = noise
    for step, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():  # not around the loop: a generator must not change what its caller runs under
            mixed = (torch.cat([video, video]) if guided else video).to(dtype)
            velocity = model_at(step)(mixed, timestep.expand(len(mixed)), caption, return_dict=False)[0].float()
            if guided:
                with_caption, without = velocity.chunk(2)
                velocity = without + guidance * (with_caption - without)
            video = scheduler.step(velocity, timestep, video, return_dict=False)[0]
        yield video.clamp(-1.0, 1.0)


def sample_video(model: Velocity, noise: Tensor, caption: Tensor, *, steps: int, guidance: float = 1.0) -> Tensor:
    """The last video of `sample_steps`, with one model in float32."""
    *_, video = sample_steps(lambda step: model, noise, caption, steps=steps, guidance=guidance)
    return video
