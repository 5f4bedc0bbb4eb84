# SPDX-License-Identifier: Apache-2.0
"""The demo's pictures: the two videos side by side, and which head took which pattern."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from torch import Tensor

# Every pattern that a head can take, and its colour.
PATTERN_COLOURS = {
    "spatial": "#4c9be8",
    "temporal": "#f2a33c",
    "textural": "#58b368",
    "adaptive": "#b07cc6",
    "dense": "#c9c9cf",
}


def save_gif(videos: dict[str, Tensor], path: Path, *, zoom: int = 4, milliseconds: int = 140) -> None:
    """Write `videos` (title -> [3, T, H, W] in [-1, 1], all of one shape) side by side as an endless GIF."""
    bar, gap = 20, 6
    first = next(iter(videos.values()))
    _, frames, height, width = first.shape
    size = (len(videos) * (width * zoom + gap) - gap, height * zoom + bar)
    pictures = []
    for index in range(frames):
        canvas = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(canvas)
        for place, (title, video) in enumerate(videos.items()):
            pixels = ((video[:, index].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            tile = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            left = place * (width * zoom + gap)
            pen.text((left + 4, 4), title, fill="black")
            canvas.paste(tile, (left, bar))
        pictures.append(canvas)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)


def save_head_map(calls: Sequence[Sequence[dict[str, Any]]], path: Path, title: str, *, steps: Sequence[int]) -> None:
    """Draw the pattern that each head took.

    Args:
        calls: per sparse step, the attentions of `Report.to_dict()`; the first sample of the batch is drawn.
        steps: the numbers of these steps, for the axis.
    """
    names = list(PATTERN_COLOURS)
    colours = ListedColormap(list(PATTERN_COLOURS.values()))
    middle = len(calls) // 2
    layers = [entry for entry in calls[middle] if entry["status"] == "sparse"]
    heads = max(len(entry["patterns"][0]) for entry in layers)
    width = 0.75 * heads
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(5.0 + width, 1.8 + 0.5 * len(layers)), width_ratios=(width, 3.6), layout="constrained"
    )

    for row, entry in enumerate(layers):
        taken = entry["patterns"][0]
        numbers = torch.tensor([[names.index(name) for name in taken]])
        left.imshow(
            numbers, cmap=colours, vmin=0, vmax=len(names) - 1, extent=(-0.5, len(taken) - 0.5, row + 0.5, row - 0.5)
        )
        for head, error in enumerate(entry["error"][0]):
            left.text(head, row, f"{100 * error:.0f} %", ha="center", va="center", fontsize=9)
    left.set(xlim=(-0.5, heads - 0.5), ylim=(len(layers) - 0.5, -0.5), xlabel="head", aspect="auto")
    left.set_xticks(range(heads))
    left.set_yticks(range(len(layers)), [entry["name"] for entry in layers])
    left.set_xticks([head - 0.5 for head in range(heads + 1)], minor=True)
    left.set_yticks([row - 0.5 for row in range(len(layers) + 1)], minor=True)
    left.grid(which="minor", color="white", linewidth=2)
    left.tick_params(which="both", length=0)
    left.set_title(f"pattern and expected error of each head at step {steps[middle] + 1}", fontsize=10)

    shares = [_shares(call) for call in calls]
    bottom = [0.0] * len(calls)
    for name, colour in PATTERN_COLOURS.items():
        part = [share[name] for share in shares]
        right.bar([step + 1 for step in steps], part, bottom=bottom, color=colour, width=0.9)
        bottom = [a + b for a, b in zip(bottom, part, strict=True)]
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(xlabel="denoising step", ylabel="share of the heads", ylim=(0, 1))
    right.set_title("over the steps", fontsize=10)
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in PATTERN_COLOURS.items()],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
    )
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _shares(call: Sequence[dict[str, Any]]) -> dict[str, float]:
    taken = Counter(name for entry in call if entry["status"] == "sparse" for name in entry["patterns"][0])
    return {name: taken[name] / max(1, taken.total()) for name in PATTERN_COLOURS}
