# SPDX-License-Identifier: Apache-2.0
"""What heads of a trained model attend to, and what their patterns read of it, as a picture on the video's grid.

    python -m benchmarks.quality.head_pictures demo

Of each pattern the head that takes it most sparsely, at one step of a dense run and within the layer's `--error`. Two
strips for each, of all frames side by side: the attention of one query in the middle of the video, and the keys that
are read for it. Writes ``docs/images/head_masks_<model>.png``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.attention_quality import Look, probabilities, reads
from benchmarks.quality.subjects import SUBJECTS, Subject
from rainfusion_compile.kernels.cpu import choose_by_error
from rainfusion_compile.kernels.reference import arm_errors
from rainfusion_compile.kernels.selection import rank_blocks
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.block_tables import BlockTables

IMAGES = Path(__file__).parents[2] / "docs" / "images"
FAINTEST = 1e-6  # of a query's attention that is told from none


@dataclass(frozen=True)
class Head:
    """One head, what it took, and the query's attention and share of keys that are read, ``[T, H, W]``."""

    layer: int
    head: int
    pattern: str
    density: float
    mass: Tensor
    read: Tensor


class Sparsest:
    """Looks at one layer's attention after the other, and keeps of each pattern the head that took it most sparsely."""

    def __init__(self, tables: BlockTables, error: float) -> None:
        self.tables, self.error, self.layer, self.layout = tables, error, 0, tables.layout
        self.found: dict[str, Head] = {}

    def look(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """At one sample's attention, ``[H, S, D]`` each."""
        q, k, v = (one.cpu() for one in (q, k, v))
        tables, scale = self.tables, q.shape[-1] ** -0.5
        errors, _ = arm_errors(q[None], k[None], v[None], None, tables.probe_arguments, scale)
        for head, candidate in enumerate(choose_by_error(errors.float(), tables.density, self.error)[0].tolist()):
            if candidate == len(tables.patterns):
                continue  # dense
            pattern, density = tables.patterns[candidate], tables.densities[candidate]
            if pattern not in self.found or density < self.found[pattern].density:
                shown = self.shown(q[head], k[head], v[head], candidate)
                self.found[pattern] = Head(self.layer, head, pattern, density, *shown)
        self.layer += 1

    def shown(self, q: Tensor, k: Tensor, v: Tensor, candidate: int) -> tuple[Tensor, Tensor]:
        """Of the query in the middle of the grid: its attention to each key, and how much of each key is read."""
        layout, tables = self.layout, self.tables
        (grid,) = layout.grids
        query = layout.text[0] + ((grid[0] // 2) * grid[1] + grid[1] // 2) * grid[2] + grid[2] // 2
        place = tables.order.long().argsort()
        block = place[query] // tables.block_q
        of_block = reads(tables, block[None])
        rank = rank_blocks(q, k, None, tables, 1.0)[block, place // tables.block_k]
        whole = of_block.kept[candidate, 0] | (rank < of_block.selected[candidate])
        excess = float(of_block.excess[candidate, 0])
        read = torch.where(whole, 1.0, 0.0 if excess < 0 else 1 / (excess + 1))
        mass = probabilities(q[None, [query]], k[None], v[None])[0][0, 0]
        video = slice(layout.text[0], layout.tokens - layout.text[1])
        return mass[video].view(grid), read[video].view(grid)


def strip(x: Tensor) -> Tensor:
    """``[T, H, W]`` as frames side by side, with a column of nothing between them."""
    frames = F.pad(x, (0, 1), value=float("nan"))
    return frames.permute(1, 0, 2).flatten(1)[:, :-1]


def draw(heads: list[Head], title: str, path: Path) -> None:
    """Two strips for each head, the attention in logarithms."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.75 * len(heads) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(2 * len(heads), 1, squeeze=False)[:, 0]
    for head, (above, below) in zip(heads, axes.reshape(-1, 2), strict=True):
        colours = colormaps["magma"].with_extremes(bad="white")
        above.imshow(strip(head.mass.clamp_min(FAINTEST).log10()), cmap=colours, aspect="auto", interpolation="nearest")
        above.set_title(
            f"layer {head.layer}, head {head.head}: {head.pattern}, density {head.density:.2f}", fontsize=9, loc="left"
        )
        above.set_ylabel("attention", fontsize=8)
        colours = colormaps["Greys_r"].with_extremes(bad="white")
        below.imshow(strip(head.read), cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        below.set_ylabel("read", fontsize=8)
        for one in (above, below):
            one.set_xticks([])
            one.set_yticks([])
    figure.savefig(path, dpi=110)


def look_at(subject: Subject, *, step: int, steps: int, error: float) -> list[Head]:
    """The heads, in the order of the patterns' names."""
    sparsest = Sparsest(Options().tables(subject.layout), error)
    look = Look(sparsest)

    def before(now: int) -> None:
        look.on = now == step

    with look:
        subject.sample(before, steps)
    return [sparsest.found[pattern] for pattern in sorted(sparsest.found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(SUBJECTS))
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--step", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--error", type=float, default=0.1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    subject = SUBJECTS[args.model](1, args.device, None, None)
    heads = look_at(subject, step=args.step, steps=args.steps, error=args.error)
    title = (
        f"step {args.step + 1} of {args.steps}, error {args.error:g}: a query in the middle of the video, all frames"
    )
    out = args.out or IMAGES / f"head_masks_{args.model}.png"
    draw(heads, title, out)
    print(out)


if __name__ == "__main__":
    with torch.no_grad():
        main()
