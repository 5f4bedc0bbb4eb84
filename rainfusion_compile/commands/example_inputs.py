# SPDX-License-Identifier: Apache-2.0
"""Inputs for the forward of a video transformer, from the names that its arguments and configuration have.

The names are conventions of the field, not of one model: ``hidden_states`` are latents, ``encoder_hidden_states`` is a
text, ``timestep`` a noise level. How latents lie is no convention; `LATENTS` has the ways, to be tried in turn.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rainfusion_compile.commands.arguments import WrongArgument
from rainfusion_compile.sparsity.layout import Grid

BATCH = 1
TIMESTEP = 500.0
TEXT = 256
LATENTS = ("[B, C, T, H, W]", "[B, T, C, H, W]", "[B, tokens, C]")
CHANNELS = ("in_channels", "in_visual_dim", "in_dim")
"""What configurations call the channels of latents."""
EMBEDDINGS = {
    "encoder_hidden_states": ("text_dim", "text_embed_dim", "caption_channels", "in_text_dim", "cross_attention_dim"),
    "encoder_hidden_states_2": ("text_embed_2_dim",),
    "encoder_hidden_states_image": ("image_dim",),
    "image_embeds": ("image_embed_dim", "image_proj_dim"),
}
"""Arguments of ``[B, tokens, channels]``, and what configurations call their channels."""
MASKS = ("encoder_attention_mask", "encoder_attention_mask_2", "encoder_hidden_states_mask")
POOLED_CHANNELS = ("pooled_projection_dim", "in_text_dim2")


@dataclass(frozen=True)
class VideoInputs:
    """What inputs are made for: a grid and a text in tokens, and the model's configuration by name."""

    grid: Grid
    text: int | None
    config: Mapping[str, Any]

    def __call__(self, forward: Callable[..., Any], latents: str) -> dict[str, Any]:
        """Keyword arguments of `forward`, of latents that lie as one of `LATENTS`.

        Raises:
            WrongArgument: for an argument without default that has no conventional name.
        """
        made = {}
        for parameter in inspect.signature(forward).parameters.values():
            needed = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            )
            value = self._make(parameter.name, latents)
            if value is not None:
                made[parameter.name] = value
            elif needed:
                raise WrongArgument(
                    f"the argument {parameter.name!r} of forward cannot be made: its name is no conventional one, or "
                    "the configuration does not tell its channels (see --config); write a function that returns "
                    "(model, kwargs), and give it as MODULE:FUNCTION"
                )
        return made

    @property
    def patch(self) -> tuple[int, int, int]:
        """How many latents a token spans in time, height and width."""
        size = self.config.get("patch_size") or 1
        if isinstance(size, (tuple, list)):
            return tuple(size) if len(size) == 3 else (1, *size)
        return self.config.get("patch_size_t") or 1, size, size

    @property
    def size(self) -> tuple[int, int, int]:
        """Of the latents, in time, height and width."""
        frames, height, width = (tokens * patch for tokens, patch in zip(self.grid, self.patch, strict=True))
        return frames, height, width

    def _make(self, name: str, latents: str) -> Any:
        """The value of one argument; None where its name tells nothing, or the configuration needs none."""
        frames, height, width = self.size
        flat = latents == LATENTS[2]
        tokens = self.text or self.config.get("max_text_seq_length") or TEXT
        if name == "hidden_states" and (channels := self._channels(CHANNELS)):
            shapes = ((channels, frames, height, width), (frames, channels, height, width))
            return torch.randn(BATCH, *(*shapes, (frames * height * width, channels))[LATENTS.index(latents)])
        if name in ("timestep", "r_timestep"):
            return torch.full((BATCH,), TIMESTEP)
        if name in EMBEDDINGS and (channels := self._channels(EMBEDDINGS[name])):
            return torch.randn(BATCH, tokens, channels)
        if name in MASKS and (name[-1] != "2" or self._channels(EMBEDDINGS["encoder_hidden_states_2"])):
            return torch.ones(BATCH, tokens, dtype=torch.bool)
        if name == "pooled_projections" and (channels := self._channels(POOLED_CHANNELS)):
            return torch.randn(BATCH, channels)
        if name == "guidance" and self.config.get("guidance_embeds"):
            return torch.full((BATCH,), 6000.0)
        if name == "padding_mask" and self.config.get("concat_padding_mask"):
            return torch.zeros(1, 1, height, width)
        if name in ("num_frames", "height", "width") and flat:
            return {"num_frames": frames, "height": height, "width": width}[name]
        return False if name == "return_dict" else None

    def _channels(self, names: tuple[str, ...]) -> int | None:
        """The first of these that the configuration has."""
        return next((self.config[name] for name in names if isinstance(self.config.get(name), int)), None)


def configuration(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a model was made with: those of its constructor by default, its ``config``, what was given."""
    parameters = inspect.signature(type(model).__init__).parameters.values()
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }
    config = getattr(model, "config", None)
    return defaults | (dict(config) if isinstance(config, Mapping) else {}) | dict(given)
