# SPDX-License-Identifier: Apache-2.0
"""Train the scene model from scratch, in as many pieces as it takes, with flow matching.

    python -m benchmarks.quality.train_scenes --minutes 8 --out FOLDER                               # one GPU
    python -m benchmarks.quality.train_scenes --minutes 20 --out MORE --resume FOLDER --lr 6e-4      # goes on
    python -m benchmarks.quality.train_scenes --steps 12 --scale tiny --out FOLDER                   # a look on a CPU

Clips are made on the fly, so none is seen twice: small, short ones first, which cost a hundredth of the attention, then
full ones. --minutes is all the time that the command takes, compilation and the last files included. Written now and
then and at the end: what ships (config.json, weights-<number>.safetensors, training_log.json), what --resume needs
besides (checkpoint-<number>.safetensors) and, at the end, sheet.png: held-out clips beside sampled ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks import measure

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))
from demo_model import ValidationSet, Velocity, sample_steps, validation_loss  # noqa: E402
from procedural_video import Clips  # noqa: E402
from train_demo_model import Stage, Training, choose_attention, write_log, write_sheet  # noqa: E402

from benchmarks.quality.scenes.clips import make_scenes  # noqa: E402
from benchmarks.quality.scenes.model import (  # noqa: E402
    FRAMES,
    HEIGHT,
    SHIFT,
    WIDTH,
    build_model,
    validation_set,
    velocity_of,
)
from benchmarks.quality.scenes.weights import load_checkpoint, load_model, save_checkpoint, save_model  # noqa: E402

LAST_SECONDS = 20.0  # for the last validation, sheet and files
PROBED = 5  # steps that are timed when clips change their size

# name -> overrides of the model configuration, small and full clips (frames, height, width, batch), validation clips.
# Small and full batches have about as many tokens, so that one learning rate suits both.
Size = tuple[int, int, int, int]
SCALES: dict[str, tuple[dict[str, Any], Size, Size, int]] = {
    "scenes": ({}, (8, 64, 64, 48), (FRAMES, HEIGHT, WIDTH, 4), 16),
    "tiny": (
        {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "num_single_layers": 1,
         "mlp_ratio": 2.0, "rope_axes_dim": (8, 12, 12)},
        (2, 16, 16, 4), (4, 16, 24, 2), 4,
    ),
}  # fmt: skip


class SceneTraining(Training):
    """The demo's training, of the scene model on scenes."""

    shift = SHIFT

    def draw(self, stage: Stage) -> Clips:
        return make_scenes(stage.batch, stage.frames, stage.height, stage.width, generator=self.generator)

    def velocity(self, model: Any) -> Velocity:
        return velocity_of(model)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train as the command line says; returns the log that is also written.

    Raises:
        FileNotFoundError: there is nothing to resume in the folder named.
        FloatingPointError: the loss or the gradient is not finite. The files written last stay as they are.
    """
    begin = time.perf_counter()
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    training, log, stages = start(args)
    data = validation_set(SCALES[args.scale][3], *SCALES[args.scale][2][:3])
    session: dict[str, Any] = log["sessions"][-1]
    limit = 60 * args.minutes - LAST_SECONDS if args.minutes else math.inf
    earlier: float = log["seconds"]  # of earlier pieces

    def seconds() -> float:
        return time.perf_counter() - begin

    def record(what: str, *numbers: float) -> None:
        short = (float(f"{number:.5g}") for number in numbers)
        log[what].append([training.steps, round(earlier + seconds(), 1), *short])

    def validate() -> None:
        record("validation", training.validate(data))
        print(f"{seconds():6.0f} s  validation {log['validation'][-1][2]:.4f}", flush=True)

    def save() -> None:
        log.update(steps=training.steps, clips=training.clips, seconds=round(earlier + seconds(), 1))
        save_model(training.average, args.out)
        save_checkpoint(training.model, args.out)
        write_log(log, args.out / "training_log.json")

    losses: list[Tensor] = []
    norm = torch.zeros(())

    def step(stage: Stage) -> None:
        nonlocal norm
        loss, norm = training.step(stage, progress)
        losses.append(loss)

    print(f"{seconds():6.0f} s  {log['parameters']:,} parameters, ready", flush=True)
    progress, stage, logged = 0.0, None, (0, seconds())
    validated = saved = seconds()
    while progress < 1:
        now = [stage for stage in stages if stage.start <= progress][-1]
        if now is not stage:
            stage = now
            session["stages"].append(probe(args, training, stage, step, seconds))
            logged = (training.steps, seconds())
        step(stage)
        progress = (training.steps - training.begun) / args.steps if args.steps else seconds() / limit
        if len(losses) < args.log_every and progress < 1:
            continue

        mean, norm_now = float(torch.stack(losses).mean()), float(norm)  # waits for the device
        losses.clear()
        if not math.isfinite(mean) or not math.isfinite(norm_now):
            raise FloatingPointError(f"loss {mean}, gradient norm {norm_now} after {training.steps} steps")
        progress = progress if args.steps else seconds() / limit
        record("curve", mean, norm_now, training.learning_rate(progress))
        ms = 1e3 * (seconds() - logged[1]) / max(1, training.steps - logged[0])
        print(
            f"{seconds():6.0f} s  step {training.steps}, {stage.frames}x{stage.height}x{stage.width}, loss {mean:.4f}, "
            f"gradient {norm_now:.2f}, {ms:.0f} ms per step, {1e3 * stage.batch / ms:.0f} clips/s",
            flush=True,
        )
        if progress < 1 and seconds() - validated >= args.validate_seconds:
            validate()
            validated = seconds()
        if progress < 1 and seconds() - saved >= args.save_seconds:
            save()
            saved = seconds()
        logged = (training.steps, seconds())

    validate()
    save()
    log["validation_of_files"] = finish(args, data)
    if args.device.type == "cuda":
        session["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    log["seconds"] = round(earlier + seconds(), 1)
    write_log(log, args.out / "training_log.json")
    print(f"{seconds():6.0f} s  validation of the files {log['validation_of_files']:.4f}; done", flush=True)
    return log


def start(args: argparse.Namespace) -> tuple[SceneTraining, dict[str, Any], list[Stage]]:
    """The training, new or resumed, the log and the stages of this piece."""
    overrides, small, full, _ = SCALES[args.scale]
    share = args.small_share if args.small_share is not None else 0.0 if args.resume else 0.55
    stages = [Stage(share, *full)]
    if share > 0:
        stages.insert(0, Stage(0.0, *small))
    torch.manual_seed(args.seed)
    model = build_model(**overrides)
    log: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": 0,
        "clips": 0,
        "seconds": 0.0,
        "sessions": [],
        "curve": [],  # step, seconds, loss (mean since the last entry), gradient norm, learning rate
        "validation": [],  # step, seconds, loss of the averaged weights on held-out full clips
    }
    if args.resume:
        model.load_state_dict(load_checkpoint(args.resume))
        log = json.loads((args.resume / "training_log.json").read_text())
    # A seed of its own for each piece: no clip is seen twice.
    training = SceneTraining(model, args.device, lr=args.lr, warmup=args.warmup, seed=args.seed + log["steps"])
    training.steps = training.begun = log["steps"]
    training.clips = log["clips"]
    if args.resume:
        training.average.load_state_dict(model.state_dict())  # a piece ends at a low rate: both are alike by then
    session = {**measure.machine(), "diffusers": diffusers.__version__, "stages": []}
    session["arguments"] = {name: getattr(args, name) for name in ("minutes", "steps", "lr", "warmup", "seed", "scale")}
    log["sessions"].append(session)
    if args.device.type == "cuda":
        attention = {name: model.config[name] for name in ("num_attention_heads", "attention_head_dim")}
        size = model.config["patch_size"]
        session["attention_ms"] = choose_attention(stages[-1], attention | {"patch_size": (1, size, size)})
        torch.backends.cudnn.benchmark = True  # for the patch embedding, a 3D convolution
        if args.compile:
            for block in (*model.transformer_blocks, *model.single_transformer_blocks):
                block.forward = compiled(block)
    return training, log, stages


def compiled(block: torch.nn.Module) -> Callable[..., Any]:
    """The forward pass of a block, compiled. Memory of one form lets all blocks of a kind share one graph."""
    forward = torch.compile(block.forward, fullgraph=True, dynamic=False)

    def forward_contiguous(video: Tensor, text: Tensor, *rest: Any) -> Any:
        return forward(video.contiguous(), text.contiguous(), *rest)

    return forward_contiguous


def probe(
    args: argparse.Namespace,
    training: SceneTraining,
    stage: Stage,
    step: Callable[[Stage], None],
    seconds: Callable[[], float],
) -> dict[str, Any]:
    """The first steps of a stage, timed: how long compilation, drawing of clips and whole steps take."""

    def ms(function: Callable[[], object], times: int = 1) -> tuple[float, float]:
        """Of each call: until all were launched, until all were done."""
        before = seconds()
        for _ in range(times):
            function()
        launched = seconds()
        if training.device.type == "cuda":
            torch.cuda.synchronize()
        return tuple(round(1e3 * (after - before) / times, 1) for after in (launched, seconds()))  # type: ignore[return-value]

    first = ms(lambda: step(stage))[1]
    ms(lambda: step(stage), 2)
    draw = ms(lambda: training.draw(stage), 3)
    launched, whole = ms(lambda: step(stage), PROBED)
    if args.profile:
        with torch.profiler.profile() as profile:
            ms(lambda: step(stage), 2)
        order = "self_cuda_time_total" if training.device.type == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=70))
    print(
        f"{seconds():6.0f} s  {stage.frames}x{stage.height}x{stage.width}, batch {stage.batch}: first step {first:.0f} "
        f"ms, then {whole:.0f} ms (launches {launched:.0f}); drawing clips {draw[1]:.0f} ms (launches {draw[0]:.0f})",
        flush=True,
    )
    facts = {name: getattr(stage, name) for name in ("start", "frames", "height", "width", "batch")}
    return facts | {"first_step_ms": first, "step_ms": whole, "launch_ms": launched, "draw_ms": draw[1]}


def finish(args: argparse.Namespace, data: ValidationSet) -> float:
    """Validation loss of the model as its files have it; writes sheet.png: true clips, and what it samples."""
    cuda = args.device.type == "cuda"
    model = velocity_of(load_model(args.out).to(args.device))
    with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
        loss = validation_loss(model, data, args.device)
        shown = slice(0, 4)
        noise, caption = data.noise[shown].to(args.device), data.caption[shown].to(args.device)
        *_, made = sample_steps(lambda step: model, noise, caption, steps=args.sheet_steps, shift=SHIFT)
    write_sheet(data.video[shown], made.cpu(), args.out / "sheet.png")
    return loss


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="of the whole command")
    length.add_argument("--steps", type=int, help="train for this many updates more; some are timed, so at least 8")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--resume", type=Path, help="the --out of an earlier piece")
    parser.add_argument("--scale", choices=list(SCALES), default="scenes", help="size of model and clips")
    parser.add_argument("--device", type=torch.device, help="default: cuda if there is one, else cpu")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up")
    parser.add_argument("--small-share", type=float, help="of the time for small clips: 0.55, or 0 when resumed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--validate-seconds", type=float, default=45)
    parser.add_argument("--save-seconds", type=float, default=100)
    parser.add_argument("--sheet-steps", type=int, default=24, help="denoising steps of the sheet")
    parser.add_argument("--profile", action="store_true", help="also print what kernels take how long")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train eagerly on CUDA too")
    args = parser.parse_args(argv)
    for name in ("steps", "lr", "log_every", "sheet_steps"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive; got {getattr(args, name)}")
    if args.minutes is not None and 60 * args.minutes <= LAST_SECONDS:
        parser.error(f"--minutes must be more than {LAST_SECONDS / 60:.2f}; got {args.minutes}")
    if args.small_share is not None and not 0 <= args.small_share < 1:
        parser.error(f"--small-share must be in [0, 1); got {args.small_share}")
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


if __name__ == "__main__":
    train(parse())
