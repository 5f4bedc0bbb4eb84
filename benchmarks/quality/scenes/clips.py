# SPDX-License-Identifier: Apache-2.0
"""Endless procedural scenes: two to four textured objects that move, turn, grow and hide one another over a textured
ground, seen by a camera that pans, zooms or rolls, in changing light.

Drawn in batches of tensor operations on any device, from one ``torch.Generator``: a seed gives the same clips again (on
the same device type). Every surface has a fine grain of its own that moves along with it, so what a patch looks like
is best told by the same spot in other frames. Places, speeds and phases are random and not in the caption.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from procedural_video import (
    BACKDROPS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Clips,
    Draw,
    columns,
    coordinates,
    cover_of,
    move_of,
    pick,
    table,
    texture_of,
)
from torch import Tensor

from benchmarks.quality.scenes.captions import OBJECT, OBJECTS, SLOTS, embed, present, random_labels

_SIZES = (0.14, 0.19, 0.25)  # radius over the shorter side


def make_scenes(
    batch: int, frames: int, height: int, width: int, *, generator: torch.Generator, labels: Tensor | None = None
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

    view_x, view_y, pan_x, pan_y = _view(column, x, y, moment, draw)
    picture = _ground(column, view_x + 0.6 * pan_x, view_y + 0.6 * pan_y, draw)
    colour, cover = _objects(labels, view_x + pan_x, view_y + pan_y, moment, (height, width), generator)
    for number in reversed(range(OBJECTS)):  # the first object is painted last, so it is in front
        picture = torch.lerp(picture, colour[:, number], cover[:, number, None])
    picture = (picture * _light(column["light"], x, moment, width, draw)[:, None]).clamp(0, 1)
    return Clips(picture * 2 - 1, labels, embed(labels))


def _view(
    column: dict[str, Tensor], x: Tensor, y: Tensor, moment: Tensor, draw: Draw
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the pixels of a turned and zoomed camera look, [B, T, H, W] each, and where it stands, [B, T, 1, 1]."""
    kind, batch = column["camera"], len(column["camera"])
    fast = column["pace"].view(-1, 1, 1, 1) == 1
    way = torch.where(fast, draw(batch, 18.0, 30.0), draw(batch, 8.0, 16.0)) * moment  # pixels
    turn = torch.where(fast, draw(batch, 0.4, 0.7), draw(batch, 0.15, 0.35)) * moment  # radians, or log of the zoom
    still = torch.zeros_like(way)
    pan_x = pick(kind, [still, -way, way, still, still, still, still, still])
    pan_y = pick(kind, [still, still, still, -way, way, still, still, still])
    zoom = pick(kind, [still, still, still, still, still, -turn, turn, still]).exp()
    angle = pick(kind, [still] * 7 + [turn])
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    return x * cos - y * sin, x * sin + y * cos, pan_x, pan_y


def _ground(column: dict[str, Tensor], x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """The background [B, 3, T, H, W] in [0, 1]."""
    coarse = column["grain"].view(-1, 1, 1, 1) == 1
    scale = torch.where(coarse, 1.6, 1.0)
    weave = texture_of(column["background"], x / scale, y / scale, draw, period=(9.0, 14.0), cell=8.0)
    dark = table(tuple(BACKDROPS.values()), x.device)[column["background colour"]].view(-1, 3, 1, 1, 1)
    tint = table(tuple(COLOURS.values()), x.device)[column["background tint"]].view(-1, 3, 1, 1, 1)
    mixed = torch.lerp(dark, 0.55 * tint, weave[:, None])
    return mixed * (1 + 0.6 * _grain(x / scale, y / scale, draw))[:, None]


def _objects(
    labels: Tensor, x: Tensor, y: Tensor, moment: Tensor, size: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Colours [B, OBJECTS, 3, T, H, W] and how much of each pixel they cover, [B, OBJECTS, T, H, W], if nothing hides
    them; all objects at once, as if they were clips of their own."""
    batch, side = len(labels), min(size)
    said = labels[:, : OBJECTS * len(OBJECT)].reshape(-1, len(OBJECT))
    each = dict(zip(OBJECT, said.unbind(1), strict=True))  # int64 [B * OBJECTS]
    count = batch * OBJECTS
    draw = Draw(generator)
    x, y = (place.repeat_interleave(OBJECTS, 0) for place in (x, y))

    number = torch.arange(count, device=labels.device).view(-1, 1, 1, 1) % OBJECTS
    first = draw(batch, 0.0, 2 * math.pi).repeat_interleave(OBJECTS, 0)
    angle = first + number * (2 * math.pi / OBJECTS) + draw(count, -0.5, 0.5)
    apart = draw(count, 0.10, 0.30)
    free = each["motion"].clamp_max(len(MOTIONS) - 1)
    goes = (each["motion"] < len(MOTIONS)).view(-1, 1, 1, 1)
    move_x, move_y = move_of(free, moment, draw, side)
    x = x - apart * size[1] * angle.cos() - move_x * goes
    y = y - apart * size[0] * angle.sin() - move_y * goes

    rate = draw(count, 0.4, 0.8) * moment
    still = torch.zeros_like(rate)
    growth = pick(each["motion"], [still] * len(MOTIONS) + [rate, -rate, still]).exp()
    spin = draw(count, 0.8, 2.0) * moment
    spin = draw(count, 0.0, 2 * math.pi) + pick(each["turn"], [torch.zeros_like(spin), spin, -spin])
    cos, sin = spin.cos() / growth, spin.sin() / growth
    x, y = x * cos + y * sin, y * cos - x * sin

    radius = table(_SIZES, labels.device)[each["size"]].view(-1, 1, 1, 1) * draw(count, 0.9, 1.1) * side
    shape = torch.where(present(labels).flatten(), each["shape"], len(SHAPES))  # the kind that covers nothing
    cover = cover_of(shape, x, y, radius)
    weave = texture_of(each["texture"], x, y, draw, period=(7.0, 10.0), cell=4.0)
    shade = (1 - 0.72 * weave) * (1.05 - 0.2 * (x * x + y * y) / (radius * radius)) * (1 + 0.5 * _grain(x, y, draw))
    colour = table(tuple(COLOURS.values()), labels.device)[each["colour"]].view(-1, 3, 1, 1, 1) * shade[:, None]
    return colour.clamp(0, 1).unflatten(0, (batch, OBJECTS)), cover.unflatten(0, (batch, OBJECTS))


def _grain(x: Tensor, y: Tensor, draw: Draw) -> Tensor:
    """Smooth noise of two octaves in about [-1, 1], of every surface its own: [N, T, H, W]."""
    points = 32  # a random field on 32 x 32 points, mirrored beyond its ends
    field = torch.rand(len(x), 2, points, points, generator=draw.generator, device=draw.generator.device) - 0.5
    total = torch.zeros_like(x)
    for octave, cell in enumerate((3.0, 9.0)):  # pixels from point to point
        place = torch.stack([x, y], dim=-1) / (cell * (points - 1) / 2)
        part = field[:, octave : octave + 1]
        noise = F.grid_sample(part, place.flatten(1, 2), padding_mode="reflection", align_corners=True)
        total = total + noise.view_as(x)
    return total


def _light(kind: Tensor, x: Tensor, moment: Tensor, width: int, draw: Draw) -> Tensor:
    """How bright it is, [B, T, 1, W], 1 being neutral."""
    batch = len(kind)
    even = torch.ones_like(moment * x).expand(batch, -1, -1, -1)
    change = draw(batch, 0.5, 0.9) * moment
    pulse = 1 + draw(batch, 0.2, 0.35) * (2 * math.pi * (draw(batch) + draw(batch, 1.0, 2.0) * moment)).sin()
    front = (draw(batch, -0.2, 0.2) + draw(batch, 0.5, 1.0) * moment) * width
    sweep = 0.7 + 0.55 * (-((x - front) / (0.22 * width)).square()).exp()
    return pick(kind, [even, even * (1 + change), even * (1 - change), even * pulse, sweep])
