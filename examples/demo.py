# SPDX-License-Identifier: Apache-2.0
"""Sample one video dense and sparse from the same noise, and tell how fast, how sparse and how alike.

    python examples/demo.py                    # a GPU if there is one, else the CPU (a few minutes)
    python examples/demo.py --error 0.05 --seed 3 --random-scene

The model is diffusers' Wan transformer, unmodified. Both runs are compiled; all that differs is one word:
`torch.compile(model, backend="inductor")` and `torch.compile(model, backend="rainfusion")`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from demo_model import FRAMES, HEIGHT, WIDTH, Velocity, load_model, sample_steps
from demo_pictures import PATTERN_COLOURS, save_gif, save_head_map
from procedural_video import caption_tokens, describe, labels_from, random_labels
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from similarity import psnr
from torch import Tensor

import rainfusion_compile

SCENE = {
    "shape 1": "circle",
    "texture 1": "striped",
    "colour 1": "red",
    "motion 1": "clockwise",
    "shape 2": "square",
    "texture 2": "checkered",
    "colour 2": "cyan",
    "motion 2": "left",
    "background": "dotted",
    "background colour": "navy",
    "pan": "right",
}
HERE = Path(__file__).parent


@dataclass
class Run:
    """One sampling: `first_call` (compilation included) and `steps`, in seconds."""

    first_call: float
    video: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.steps)


class Demo:
    """The model, the scene and the noise that both runs share."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console = args, console
        self.model = load_model(args.weights, args.dtype).to(args.device)
        generator = torch.Generator().manual_seed(args.seed)  # on the CPU: the same noise on every device
        labels = random_labels(1, generator) if args.random_scene else labels_from(SCENE)
        self.scene = describe(labels[0])
        self.caption = caption_tokens(labels, self.model.config.text_dim).to(args.device)
        self.noise = torch.randn(1, 3, FRAMES, HEIGHT, WIDTH, generator=generator).to(args.device)

    def seconds(self) -> float:
        """The time, once the device has done all it was given."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)
        return time.perf_counter()

    def sampling(self, model_at: Callable[[int], Velocity]) -> Iterator[Tensor]:
        """The video after every step."""
        args = self.args
        settings = {"steps": args.steps, "guidance": args.guidance, "dtype": args.dtype}
        return sample_steps(model_at, self.noise, self.caption, **settings)

    def first_call(self, title: str, model: Velocity) -> float:
        """Compile by running one step whose result is not used; seconds."""
        with self.console.status(f"{title}: compiling"):
            start = self.seconds()
            next(self.sampling(lambda step: model))
            seconds = self.seconds() - start
        self.console.print(f"{title}: compiled and called once in {seconds:.1f} s")
        return seconds

    def run(self, runs: dict[str, tuple[Run, Callable[[int], Velocity]]]) -> None:
        """Sample every run's video, step by step in turn, so that a busy machine slows all of them alike."""
        columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(SpinnerColumn(), *columns, TextColumn("{task.fields[pace]}"), console=self.console) as progress:
            tasks = {title: progress.add_task(title, total=self.args.steps, pace="") for title in runs}
            samplings = {title: self.sampling(model_at) for title, (_, model_at) in runs.items()}
            for _ in range(self.args.steps):
                for title, (run, _) in runs.items():
                    start = self.seconds()
                    run.video = next(samplings[title])
                    run.steps.append(self.seconds() - start)
                    progress.update(tasks[title], advance=1, pace=f"{run.steps[-1]:.3f} s a step")


def head_table(calls: list[list[dict[str, Any]]]) -> Table:
    """How many heads took which pattern, over all sparse steps, layers and samples."""
    taken = [
        item
        for call in calls
        for entry in call
        if entry["status"] == "sparse"
        for sample in zip(entry["patterns"], entry["error"], entry["density"], strict=True)
        for item in zip(*sample, strict=True)
    ]
    count = Counter(name for name, _, _ in taken)
    table = Table("pattern", title="What the heads did (sparse steps)")
    for heading in ("share of heads", "mean error", "realised density"):
        table.add_column(heading, justify="right")
    for name in [*PATTERN_COLOURS, "all"]:
        rows = [item for item in taken if name in ("all", item[0])]
        if rows:
            share = len(rows) / count.total()
            error, density = mean(item[1] for item in rows), mean(item[2] for item in rows)
            table.add_row(name, f"{share:.0%}", f"{error:.1%}", f"{density:.1%}", end_section=name == "dense")
    return table


def speed_table(dense: Run, sparse: Run, dense_steps: int) -> tuple[Table, dict[str, float]]:
    """Times of both runs, and their ratios. The steps compared are those that are sparse in the sparse run."""
    slow, fast = median(dense.steps[dense_steps:]), median(sparse.steps[dense_steps:])
    figures = {
        "dense_step_s": slow,
        "sparse_step_s": fast,
        "dense_total_s": dense.total,
        "sparse_total_s": sparse.total,
        "step_speedup": slow / fast,
        "total_speedup": dense.total / sparse.total,
    }
    table = Table("", title="Speed (compilation apart)")
    for heading in ("dense, Inductor", "rainfusion", "speed-up"):
        table.add_column(heading, justify="right")
    table.add_row("a sparse step (median)", f"{slow:.3f} s", f"{fast:.3f} s", f"{slow / fast:.2f}x")
    table.add_row("all steps", f"{dense.total:.2f} s", f"{sparse.total:.2f} s", f"{dense.total / sparse.total:.2f}x")
    table.add_row("first call, compilation included", f"{dense.first_call:.1f} s", f"{sparse.first_call:.1f} s", "")
    return table, figures


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the demo; returns the figures that are also written to result.json."""
    args = parse(argv)
    console = Console()
    where = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    demo = Demo(args, console)
    console.print(f"[bold]Scene:[/] {demo.scene}")
    console.print(f"{FRAMES} frames of {HEIGHT} x {WIDTH}, {args.steps} steps on {where} in {args.dtype}\n")

    options = {"error": args.error}
    dense_model = torch.compile(demo.model, backend="inductor")
    sparse_model = torch.compile(demo.model, backend="rainfusion", options={**options, "min_tokens": 0})
    reports: list[rainfusion_compile.Report] = []

    def observed(*inputs: Any, **settings: Any) -> Any:
        with rainfusion_compile.observe() as report:
            output = sparse_model(*inputs, **settings)
        reports.append(report)
        return output

    dense = Run(demo.first_call("dense", dense_model))
    sparse = Run(demo.first_call("rainfusion", observed))
    reports.clear()

    def mostly_sparse(step: int) -> Velocity:
        return dense_model if step < args.dense_steps else observed

    demo.run({"dense": (dense, lambda step: dense_model), "rainfusion": (sparse, mostly_sparse)})
    calls = [report.to_dict()["attentions"] for report in reports]
    if not any(entry["status"] == "sparse" for call in calls for entry in call):
        raise SystemExit(f"no attention became sparse:\n{reports[0] if reports else 'no sparse step ran'}")

    likeness = psnr(dense.video, sparse.video)
    density = mean(
        value
        for call in calls
        for entry in call
        if entry["status"] == "sparse"
        for sample in entry["density"]
        for value in sample
    )
    table, figures = speed_table(dense, sparse, args.dense_steps)
    console.print(f"\n{reports[-1]}\n", markup=False, highlight=False)
    console.print(head_table(calls))
    console.print(table)

    args.out.mkdir(parents=True, exist_ok=True)
    files = [args.out / name for name in ("videos.gif", "heads.png", "result.json")]
    difference = ((sparse.video - dense.video).abs() * 4 - 1).clamp(-1, 1)
    title = f"rainfusion, {density:.0%} density"
    save_gif({"dense": dense.video[0], title: sparse.video[0], "4 x difference": difference[0]}, files[0])
    save_head_map(
        calls,
        files[1],
        f"mean realised density {density:.1%}, {figures['step_speedup']:.2f}x per sparse step on {where}",
        steps=range(args.dense_steps, args.steps),
    )
    result = {
        "scene": demo.scene,
        "device": where,
        "dtype": str(args.dtype),
        "torch": torch.__version__,
        "steps": args.steps,
        "dense_steps": args.dense_steps,
        **options,
        "realised_density": density,
        "psnr_db": likeness if math.isfinite(likeness) else None,  # JSON has no infinity
        **figures,
    }
    files[2].write_text(json.dumps(result, indent=2) + "\n")

    console.print(
        f"\n[bold]In short:[/] {density:.1%} of the attention was computed in the sparse steps; they ran "
        f"{figures['step_speedup']:.2f}x as fast as dense, the whole video {figures['total_speedup']:.2f}x; "
        f"PSNR between the two videos {likeness:.1f} dB."
    )
    for path, meaning in zip(files, ("the videos side by side", "what each head did", "all figures"), strict=True):
        console.print(f"  {path}  [dim]{meaning}[/]", highlight=False)
    return result


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample one video dense and sparse from the same noise.")
    parser.add_argument("--weights", type=Path, default=HERE / "weights", help="folder of the model")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for pictures and figures")
    parser.add_argument("--steps", type=int, default=16, help="denoising steps")
    parser.add_argument("--dense-steps", type=int, default=0, help="first steps that stay dense in both runs")
    parser.add_argument("--error", type=float, default=0.1, help="what the output of each attention may err by")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 = none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random-scene", action="store_true", help="draw the scene from the seed too")
    parser.add_argument("--device", type=torch.device, help="default: cuda if there is one, else cpu")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="default: bfloat16 on CUDA, else float32")
    args = parser.parse_args(argv)
    if not 0 <= args.dense_steps < args.steps:
        parser.error("--dense-steps must be less than --steps")
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
    return args


if __name__ == "__main__":
    main()
