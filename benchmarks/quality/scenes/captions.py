# SPDX-License-Identifier: Apache-2.0
"""What can be in a scene, and how a caption says it: one word for each slot, always as many.

A caption has no padding, and what is said of an absent object is the word "nothing". So every token of the text is
real, no attention needs a mask, and flash attention serves the model in training and at measurement.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from procedural_video import BACKDROPS, COLOURS, MOTIONS, SHAPES, TEXTURES
from torch import Tensor

OBJECTS = 4  # at most; the first is in front
OBJECT = {
    "shape": SHAPES,
    "size": ("small", "medium", "large"),
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "motion": (*MOTIONS, "approach", "recede", "rest"),
    "turn": ("steady", "clockwise", "anticlockwise"),
}
SCENE = {
    "count": ("two", "three", "four"),
    "background": TEXTURES,
    "background colour": tuple(BACKDROPS),
    "background tint": tuple(COLOURS),
    "grain": ("fine", "coarse"),
    "camera": ("still", "left", "right", "up", "down", "zoom in", "zoom out", "roll"),
    "pace": ("slow", "fast"),
    "light": ("even", "brighter", "darker", "pulsing", "sweeping"),
}
# One caption token per slot.
SLOTS: dict[str, tuple[str, ...]] = {
    f"{what} {number}": values for number in range(1, OBJECTS + 1) for what, values in OBJECT.items()
} | SCENE
CAPTION_TOKENS = len(SLOTS)
TEXT_DIM = 64
NOTHING = "nothing"
WORDS = tuple(dict.fromkeys([NOTHING, *(word for values in SLOTS.values() for word in values)]))


def random_labels(batch: int, generator: torch.Generator) -> Tensor:
    """Labels int64 [batch, CAPTION_TOKENS], uniform in each slot, on the device of `generator`."""
    unit = torch.rand(batch, CAPTION_TOKENS, generator=generator, device=generator.device)
    kinds = _constant("kinds", generator.device)
    return (unit * kinds).long().minimum(kinds - 1)


def present(labels: Tensor) -> Tensor:
    """Which objects are there, bool [B, OBJECTS]."""
    count = labels[:, list(SLOTS).index("count"), None] + 2
    return torch.arange(OBJECTS, device=labels.device) < count


def words(labels: Tensor) -> Tensor:
    """The number in `WORDS` of every token, int64 [B, CAPTION_TOKENS]."""
    there = present(labels).repeat_interleave(len(OBJECT), 1)
    there = torch.nn.functional.pad(there, (0, len(SCENE)), value=True)
    table = _constant("words", labels.device)
    slot = torch.arange(CAPTION_TOKENS, device=labels.device)
    return torch.where(there, table[slot, labels], WORDS.index(NOTHING))


def embed(labels: Tensor) -> Tensor:
    """Labels [B, CAPTION_TOKENS] -> caption float32 [B, CAPTION_TOKENS, TEXT_DIM]: fixed random vectors, of the word
    and of its place in the caption."""
    return _constant("word vectors", labels.device)[words(labels)] + _constant("slot vectors", labels.device)


def describe(labels: Tensor) -> str:
    """One scene's labels [CAPTION_TOKENS] as an English phrase."""
    said = {slot: values[int(i)] for (slot, values), i in zip(SLOTS.items(), labels, strict=True)}
    parts = []
    for n in range(1, int(present(labels[None]).sum()) + 1):
        of = {what: said[f"{what} {n}"] for what in OBJECT}
        parts.append(
            f"a {of['size']} {of['texture']} {of['colour']} {of['shape']} ({of['motion']}, turning {of['turn']})"
        )
    ground = f"{said['grain']} {said['background']} {said['background colour']} and {said['background tint']} ground"
    return f"{', '.join(parts)} on a {ground}; camera {said['camera']}, {said['pace']}; light {said['light']}"


@lru_cache
def _constant(name: str, device: torch.device) -> Tensor:
    """Constants on a device, copied there once: a copy from the host makes a GPU wait."""
    if name == "kinds":
        return torch.tensor([len(values) for values in SLOTS.values()], device=device)
    if name == "words":
        most = max(map(len, SLOTS.values()))
        rows = [[WORDS.index(word) for word in values] + [0] * (most - len(values)) for values in SLOTS.values()]
        return torch.tensor(rows, device=device)
    generator = torch.Generator().manual_seed(7)
    both = torch.randn(len(WORDS) + CAPTION_TOKENS, TEXT_DIM, generator=generator) / math.sqrt(2)
    return (both[: len(WORDS)] if name == "word vectors" else both[len(WORDS) :]).to(device)
