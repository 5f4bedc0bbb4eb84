# SPDX-License-Identifier: Apache-2.0
"""The models whose videos are compared, each with what to sample from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rainfusion_compile.sparsity.layout import VideoLayout

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))
import demo_model  # noqa: E402
from demo_model import ValidationSet, Velocity, sample_steps, validation_loss  # noqa: E402
from procedural_video import caption_tokens, random_labels  # noqa: E402

from benchmarks.quality.scenes import captions as scene_captions  # noqa: E402
from benchmarks.quality.scenes import model as scene_model  # noqa: E402
from benchmarks.quality.scenes import weights as scene_weights  # noqa: E402

HELD_OUT = 8  # clips of the validation loss


@dataclass(frozen=True)
class Subject:
    """A model on a device, the layout of its tokens, and what its videos are sampled from: `noise` [B, 3, T, H, W]
    float32, `captions` [B, tokens, text_dim]."""

    name: str
    model: Velocity
    parameters: int
    layout: VideoLayout
    noise: Tensor
    captions: Tensor
    held_out: ValidationSet
    dtype: torch.dtype
    shift: float

    def sample(self, before: Callable[[int], None], steps: int) -> Tensor:
        """Videos [B, 3, T, H, W]; `before` is told each step."""

        def model_at(step: int) -> Velocity:
            before(step)
            return self.model

        samples: Iterator[Tensor] = sample_steps(
            model_at, self.noise, self.captions, steps=steps, dtype=self.dtype, shift=self.shift
        )
        *_, video = samples
        return video

    def loss(self) -> float:
        """Of the held-out clips."""
        return validation_loss(self.model, self.held_out, self.noise.device, self.dtype)


def demo(captions: int, device: torch.device, dtype: torch.dtype | None = None, folder: Path | None = None) -> Subject:
    """The demo model: Wan's class, no text in the sequence; float32 by default."""
    frames, height, width = demo_model.FRAMES, demo_model.HEIGHT, demo_model.WIDTH
    model = demo_model.load_model(folder or EXAMPLES / "weights", dtype or torch.float32).to(device)
    generator = torch.Generator().manual_seed(0)
    labels = random_labels(captions, generator)
    return Subject(
        name="demo",
        model=model,
        parameters=_parameters(model),
        layout=VideoLayout((frames, height // 2, width // 2)),
        noise=torch.randn(captions, 3, frames, height, width, generator=generator).to(device),
        captions=caption_tokens(labels, model.config.text_dim).to(device),
        held_out=demo_model.validation_set(HELD_OUT),
        dtype=dtype or torch.float32,
        shift=demo_model.SHIFT,
    )


def scenes(
    captions: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    folder: Path | None = None,
    size: tuple[int, int, int] = (scene_model.FRAMES, scene_model.HEIGHT, scene_model.WIDTH),
) -> Subject:
    """The scene model: HunyuanVideo's class, the caption after the video in the sequence; bfloat16 by default.

    Args:
        size: of the clips, frames, height and width in pixels.
    """
    dtype = dtype or torch.bfloat16
    model = scene_weights.load_model(folder or scene_weights.FOLDER)
    torch.nn.Module.to(model, device, dtype)  # without diffusers' warning
    patch = model.config.patch_size
    generator = torch.Generator().manual_seed(0)
    labels = scene_captions.random_labels(captions, generator)
    return Subject(
        name="scenes",
        model=scene_model.velocity_of(model),
        parameters=_parameters(model),
        layout=VideoLayout((size[0], size[1] // patch, size[2] // patch), text=(0, scene_captions.CAPTION_TOKENS)),
        noise=torch.randn(captions, 3, *size, generator=generator).to(device),
        captions=scene_captions.embed(labels).to(device),
        held_out=scene_model.validation_set(HELD_OUT, *size),
        dtype=dtype,
        shift=scene_model.SHIFT,
    )


SUBJECTS: dict[str, Callable[..., Subject]] = {"demo": demo, "scenes": scenes}


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
