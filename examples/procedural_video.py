# SPDX-License-Identifier: Apache-2.0
"""Endless procedural video: textured shapes that move over a textured background, with a caption.

Every clip is drawn on the fly with vectorised torch code, on any device. All randomness comes from one
``torch.Generator``, so a seed gives the same clips again (on the same device type).

A scene holds one or two objects and a background. Each is described by discrete attributes (``SLOTS``), and
the caption has one token per attribute. Position, size, speed and phase are drawn at random and are not in
the caption: a model has to make them up, and keep them consistent over all frames, by self-attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "ring", "cross")
TEXTURES = ("plain", "striped", "checkered", "dotted", "cloudy")
MOTIONS = ("left", "right", "up", "down", "clockwise", "anticlockwise", "bounce")
PANS = ("still", "left", "right", "up", "down")
COLOURS = {
    "red": (0.93, 0.20, 0.18),
    "orange": (0.98, 0.58, 0.12),
    "yellow": (0.98, 0.90, 0.25),
    "green": (0.25, 0.80, 0.32),
    "cyan": (0.25, 0.85, 0.90),
    "blue": (0.25, 0.42, 0.95),
    "magenta": (0.92, 0.32, 0.80),
    "white": (0.96, 0.96, 0.96),
}
BACKDROPS = {
    "slate": (0.24, 0.28, 0.34),
    "forest": (0.15, 0.32, 0.24),
    "brown": (0.38, 0.27, 0.20),
    "navy": (0.13, 0.18, 0.40),
    "plum": (0.33, 0.18, 0.34),
    "sand": (0.66, 0.60, 0.48),
}

# One caption token per slot. The second object may be absent: its shape is then "none".
SLOTS: dict[str, tuple[str, ...]] = {
    "shape 1": SHAPES,
    "texture 1": TEXTURES,
    "colour 1": tuple(COLOURS),
    "motion 1": MOTIONS,
    "shape 2": (*SHAPES, "none"),
    "texture 2": TEXTURES,
    "colour 2": tuple(COLOURS),
    "motion 2": MOTIONS,
    "background": TEXTURES,
    "background colour": tuple(BACKDROPS),
    "pan": PANS,
}
CAPTION_TOKENS = len(SLOTS)
_VALUES = max(len(values) for values in SLOTS.values())
MIN_TEXT_DIM = _VALUES + CAPTION_TOKENS

REFERENCE_SPAN = 12.0  # frames from first to last of the reference clip: speeds are per frame, not per clip
_SOLO_SHARE = 0.35  # share of the scenes with one object only


@dataclass(frozen=True)
class Clips:
    """A batch of clips: `video` [B, 3, T, H, W] float32 in [-1, 1], `labels` int64 [B, CAPTION_TOKENS] (one
    index into each of `SLOTS`), `caption` [B, CAPTION_TOKENS, text_dim] float32."""

    video: Tensor
    labels: Tensor
    caption: Tensor


def labels_from(attributes: Mapping[str, str], slots: Mapping[str, tuple[str, ...]] = SLOTS) -> Tensor:
    """Labels int64 [1, slots] of one scene, from a value for every slot.

    Raises:
        ValueError: a slot or a value is unknown, or a slot is missing.
    """
    if set(attributes) != set(slots):
        raise ValueError(f"need exactly the slots {list(slots)}, got {list(attributes)}")
    row = []
    for slot, values in slots.items():
        if attributes[slot] not in values:
            raise ValueError(f"{slot!r} cannot be {attributes[slot]!r}; choose from {values}")
        row.append(values.index(attributes[slot]))
    return torch.tensor([row])


def describe(labels: Tensor) -> str:
    """One scene's labels [CAPTION_TOKENS] as an English phrase."""
    words = {slot: values[int(i)] for (slot, values), i in zip(SLOTS.items(), labels, strict=True)}
    parts = [
        f"a {words[f'texture {n}']} {words[f'colour {n}']} {words[f'shape {n}']} ({words[f'motion {n}']})"
        for n in (1, 2)
        if words[f"shape {n}"] != "none"
    ]
    backdrop = f"{words['background']} {words['background colour']} background (pan {words['pan']})"
    return " and ".join(parts) + f" on a {backdrop}"


def caption_tokens(labels: Tensor, text_dim: int) -> Tensor:
    """Labels [B, CAPTION_TOKENS] -> caption [B, CAPTION_TOKENS, text_dim] float32: a one-hot of the value
    beside a one-hot of the slot. The texture, colour and motion of an absent object have no value.

    Raises:
        ValueError: `text_dim` < `MIN_TEXT_DIM`.
    """
    if text_dim < MIN_TEXT_DIM:
        raise ValueError(f"text_dim must be at least {MIN_TEXT_DIM}, got {text_dim}")
    names = list(SLOTS)
    value = F.one_hot(labels, _VALUES).float()
    absent = labels[:, names.index("shape 2")] == len(SHAPES)
    silent = table(tuple(n.endswith(" 2") and n != "shape 2" for n in names), labels.device)
    value = value.masked_fill((absent[:, None] & silent)[..., None], 0.0)
    slot = torch.eye(CAPTION_TOKENS, device=labels.device).expand(labels.shape[0], -1, -1)
    return F.pad(torch.cat([value, slot], dim=-1), (0, text_dim - MIN_TEXT_DIM))


def coordinates(batch: int, frames: int, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Moments [1, T, 1, 1], 0 in the middle of the clip, and pixels from the centre, y [1, 1, H, 1] and x [1, 1, 1, W].

    Raises:
        ValueError: a size is not positive.
    """
    if min(batch, frames, height, width) < 1:
        raise ValueError(f"sizes must be positive, got {batch=} {frames=} {height=} {width=}")
    t = torch.arange(frames, device=device).view(1, -1, 1, 1)
    moment = (t - (frames - 1) / 2) / REFERENCE_SPAN
    y = torch.arange(height, device=device).view(1, 1, -1, 1) - (height - 1) / 2
    return moment, y, torch.arange(width, device=device).view(1, 1, 1, -1) - (width - 1) / 2


def columns(labels: Tensor, batch: int, slots: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Labels [batch, slots] by the name of their slot.

    Raises:
        ValueError: `labels` has the wrong shape.
    """
    if labels.shape != (batch, len(slots)):
        raise ValueError(f"labels must be [{batch}, {len(slots)}], got {list(labels.shape)}")
    return dict(zip(slots, labels.unbind(1), strict=True))


def make_clips(
    batch: int,
    frames: int,
    height: int,
    width: int,
    *,
    generator: torch.Generator,
    text_dim: int = 32,
    labels: Tensor | None = None,
) -> Clips:
    """Draw `batch` clips on the device of `generator`.

    Args:
        labels: int64 [batch, CAPTION_TOKENS]; drawn at random if None.

    Raises:
        ValueError: a size is not positive, or `labels` has the wrong shape.
    """
    device, draw = generator.device, Draw(generator)
    moment, y, x = coordinates(batch, frames, height, width, device)
    labels = random_labels(batch, generator) if labels is None else labels.to(device)
    column = columns(labels, batch, SLOTS)

    palette = table(tuple(BACKDROPS.values()), device)[column["background colour"]]
    shift_x, shift_y = _pan(column["pan"], moment, draw)
    weave = texture_of(column["background"], x - shift_x, y - shift_y, draw, period=(9.0, 14.0), cell=6.0)
    colour = palette.view(batch, 3, 1, 1, 1)
    picture = colour * (1 - 0.45 * weave[:, None])

    side = min(height, width)
    angle = draw(batch, 0.0, 2 * math.pi)
    apart = torch.where(column["shape 2"] == len(SHAPES), 0.0, 0.24).view(batch, 1, 1, 1)
    for number, sign in ((2, -1.0), (1, 1.0)):  # the first object is painted last, so it is in front
        middle_x = sign * apart * width * angle.cos() + draw(batch, -0.08, 0.08) * width
        middle_y = sign * apart * height * angle.sin() + draw(batch, -0.08, 0.08) * height
        move_x, move_y = move_of(column[f"motion {number}"], moment, draw, side)
        local_x, local_y = x - middle_x - move_x, y - middle_y - move_y
        radius = draw(batch, 0.19, 0.28) * side
        cover = cover_of(column[f"shape {number}"], local_x, local_y, radius)[:, None]
        weave = texture_of(column[f"texture {number}"], local_x, local_y, draw, period=(7.0, 10.0), cell=3.5)
        palette = table(tuple(COLOURS.values()), device)[column[f"colour {number}"]]
        colour = palette.view(batch, 3, 1, 1, 1) * (1 - 0.72 * weave[:, None])
        picture = picture + cover * (colour - picture)
    return Clips(picture * 2 - 1, labels, caption_tokens(labels, text_dim))


def random_labels(batch: int, generator: torch.Generator) -> Tensor:
    """Labels int64 [batch, CAPTION_TOKENS], uniform per slot except for how often there is a second object."""
    draw = Draw(generator)
    columns = []
    for slot, values in SLOTS.items():
        kinds = len(SHAPES) if slot == "shape 2" else len(values)
        column = torch.randint(kinds, (batch,), generator=generator, device=generator.device)
        if slot == "shape 2":
            column = torch.where(draw(batch).view(batch) < _SOLO_SHARE, kinds, column)
        columns.append(column)
    return torch.stack(columns, dim=1)


@lru_cache
def table(rows: tuple[Any, ...], device: torch.device) -> Tensor:
    """Constants on a device, copied there once: a copy from the host makes a GPU wait."""
    return torch.tensor(rows, device=device)


class Draw:
    """Uniform numbers [batch, 1, 1, 1], to broadcast over [batch, T, H, W]."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, batch: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        unit = torch.rand(batch, 1, 1, 1, generator=self.generator, device=self.generator.device)
        return low + (high - low) * unit


def pick(kind: Tensor, options: list[Tensor]) -> Tensor:
    """options[kind[b]][b] for every b; the options broadcast against each other."""
    stacked = torch.stack(torch.broadcast_tensors(*options))
    return stacked[kind, torch.arange(len(kind), device=kind.device)]


def _pan(kind: Tensor, moment: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """How far (x, y) in pixels the background has moved, each [B, T, 1, 1]."""
    way = draw(len(kind), 10.0, 20.0) * moment
    still = torch.zeros_like(way)
    return pick(kind, [still, -way, way, still, still]), pick(kind, [still, still, still, -way, way])


def move_of(kind: Tensor, moment: Tensor, draw: Draw, side: int) -> tuple[Tensor, Tensor]:
    """Where (x, y) in pixels an object is, about the middle of its way, each [B, T, 1, 1]."""
    batch = len(kind)
    line = draw(batch, 0.35, 0.65) * side * moment
    still = torch.zeros_like(line)
    turn = 2 * math.pi * (draw(batch) + draw(batch, 0.6, 1.0) * moment)
    radius = draw(batch, 0.13, 0.20) * side
    circle_x, circle_y = radius * turn.cos(), radius * turn.sin()
    hop = (math.pi * (draw(batch) + draw(batch, 1.0, 1.6) * moment)).sin().abs()
    hop_x, hop_y = draw(batch, -0.3, 0.3) * side * moment, draw(batch, 0.25, 0.40) * side * (0.5 - hop)
    # y grows downwards, so a growing angle turns clockwise
    move_x = pick(kind, [-line, line, still, still, circle_x, circle_x, hop_x])
    return move_x, pick(kind, [still, still, -line, line, circle_y, -circle_y, hop_y])


def cover_of(kind: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Share [B, T, H, W] of each pixel that the shape covers, from its signed distance in pixels.
    The kind after the last shape ("none") covers nothing."""
    x, y = torch.broadcast_tensors(x, y)
    distance = (x * x + y * y).sqrt()
    across, along = x.abs(), y.abs()
    circle = distance - radius
    square = torch.maximum(across, along) - 0.85 * radius
    triangle = torch.maximum(across * math.cos(math.pi / 6) - y / 2, y) - 0.58 * radius
    ring = (distance - 0.72 * radius).abs() - 0.28 * radius
    bar_x = torch.maximum(across - radius, along - 0.36 * radius)
    bar_y = torch.maximum(along - radius, across - 0.36 * radius)
    cross = torch.minimum(bar_x, bar_y)
    nothing = torch.ones_like(circle)
    return (0.5 - pick(kind, [circle, square, triangle, ring, cross, nothing])).clamp(0.0, 1.0)


def texture_of(kind: Tensor, x: Tensor, y: Tensor, draw: Draw, period: tuple[float, float], cell: float) -> Tensor:
    """Texture [B, T, H, W] in [0, 1] (0 = main colour, 1 = second colour) at local coordinates in pixels.

    Waves are cut off with a slope of one per pixel, which anti-aliases their edges.
    """
    batch = len(kind)
    x, y = torch.broadcast_tensors(x, y)
    length = draw(batch, *period)
    angle = draw(batch, 0.0, math.pi)
    phase_x, phase_y = draw(batch) * length, draw(batch) * length
    u, v = x + phase_x, y + phase_y
    frequency = 2 * math.pi / length

    plain = torch.zeros_like(u)
    stripes = (frequency * (x * angle.cos() + y * angle.sin() + phase_x)).sin()
    checker = (frequency * u).sin() * (frequency * v).sin()
    to_dot_x, to_dot_y = u.remainder(length) - length / 2, v.remainder(length) - length / 2
    dots = 0.34 * length - (to_dot_x * to_dot_x + to_dot_y * to_dot_y).sqrt()

    points = 16  # a random field on 16 x 16 points, `cell` pixels apart, mirrored beyond its ends
    field = torch.rand(batch, 1, points, points, generator=draw.generator, device=draw.generator.device)
    place = torch.stack([x, y], dim=-1) / (cell * (points - 1) / 2)
    noise = F.grid_sample(field, place.flatten(1, 2), mode="bilinear", padding_mode="reflection", align_corners=True)
    noise = noise.view_as(u)
    waves = pick(kind, [plain, stripes / frequency, checker / frequency, dots, (noise - 0.5) * 1.5])
    return torch.where((kind == 0).view(-1, 1, 1, 1), plain, (waves + 0.5).clamp(0.0, 1.0))
