# SPDX-License-Identifier: Apache-2.0
"""Train the demo model from scratch on procedural video, with flow matching.

    python examples/train_demo_model.py --minutes 8.5 --out examples/weights      # one GPU
    python examples/train_demo_model.py --steps 40 --scale tiny --out /tmp/tiny   # a look at it on a CPU

Clips are made on the fly, so no clip is seen twice. Training begins on small, short clips, which cost a
fraction of the full ones, and then moves to the size of the demo; shapes move at the same speed in both.
Written into --out, now and then and at the end: the weights (an exponential moving average, float16),
config.json and training_log.json.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import platform
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import demo_model
import diffusers
import torch
import torch.nn.functional as F
from demo_model import FRAMES, HEIGHT, SHIFT, WIDTH, ValidationSet, Velocity, flow_matching_loss, shifted
from diffusers import WanTransformer3DModel
from procedural_video import Clips, make_clips
from torch import Tensor
from tqdm import tqdm

CAPTION_DROP = 0.1  # share of the clips trained without caption, for classifier-free guidance
EMA_DECAY = 0.9985
WEIGHT_DECAY = 0.01
LEVEL_SPREAD = 1.2  # standard deviation of the logit-normal noise level, before the shift


@dataclass(frozen=True)
class Stage:
    """A part of the training: from which share of the whole on, and on which clips."""

    start: float
    frames: int
    height: int
    width: int
    batch: int


# name -> overrides of the model configuration, stages, validation clips
SCALES: dict[str, tuple[dict[str, Any], tuple[Stage, ...], int]] = {
    "demo": ({}, (Stage(0.0, 7, 32, 40, 64), Stage(0.35, FRAMES, HEIGHT, WIDTH, 16)), 32),
    "tiny": (
        {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2},
        (Stage(0.0, 3, 12, 16, 8), Stage(0.5, 5, 16, 20, 8)),
        8,
    ),
}


class Training:
    """Model, averaged weights, optimiser and random numbers; `step` does one update.

    What is the demo's own can be overridden for other models: `shift`, `draw` and `velocity`.
    """

    shift = SHIFT

    def __init__(
        self,
        model: WanTransformer3DModel,
        device: torch.device,
        *,
        lr: float,
        warmup: int,
        seed: int,
        compile_blocks: bool = False,
    ) -> None:
        self.device, self.lr, self.warmup = device, lr, warmup
        self.model = model.to(device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)  # stays eager
        decayed = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim != 2]
        self.optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.98),
            fused=device.type == "cuda",
        )
        self.generator = torch.Generator(device).manual_seed(seed)
        self.steps = self.clips = 0
        self.begun = 0  # the steps that were done before this run
        if compile_blocks:  # one block is compiled, once per clip size, and serves all layers
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def step(self, stage: Stage, progress: float) -> tuple[Tensor, Tensor]:
        """One update at `progress` (0 to 1) of the schedule: (loss, gradient norm), scalars on the device."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(progress)
        clips = self.draw(stage)
        rand = torch.rand(stage.batch, 3, generator=self.generator, device=self.device)
        caption = clips.caption * (rand[:, :1, None] >= CAPTION_DROP)
        noise = torch.randn(clips.video.shape, generator=self.generator, device=self.device)
        # Noise levels are stratified over the batch: less noise in the gradient at no cost.
        uniform = (torch.arange(stage.batch, device=self.device) + rand[:, 1]) / stage.batch
        normal = torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4))
        level = shifted(torch.sigmoid(LEVEL_SPREAD * normal), self.shift)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = flow_matching_loss(self.velocity(self.model), clips.video, caption, level, noise)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.steps += 1
        self.clips += stage.batch
        decay = min(EMA_DECAY, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.detach(), norm.detach()

    def learning_rate(self, progress: float) -> float:
        """Linear warm-up in steps, then a cosine over the progress down to 2 % of the peak."""
        warm = min(1.0, (self.steps - self.begun + 1) / max(1, self.warmup))
        return self.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def validate(self, data: ValidationSet) -> float:
        """Loss of the averaged weights on the held-out clips."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            return demo_model.validation_loss(self.velocity(self.average), data, self.device)

    def draw(self, stage: Stage) -> Clips:
        """New clips to train on."""
        return make_clips(stage.batch, stage.frames, stage.height, stage.width, generator=self.generator)

    def velocity(self, model: Any) -> Velocity:
        """A model as the loss calls it."""
        velocity: Velocity = model
        return velocity


def choose_attention(stage: Stage, config: dict[str, Any]) -> dict[str, float]:
    """Keep the fastest attention that this GPU has (forward and backward): it is most of the training time.

    Returns the milliseconds per layer of each that runs; switches the slower ones off.
    """
    backends = torch.backends.cuda
    tokens = stage.frames * stage.height * stage.width // math.prod(config["patch_size"])
    shape = (stage.batch, config["num_attention_heads"], tokens, config["attention_head_dim"])
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(q)
    switches = {"flash": backends.enable_flash_sdp, "cudnn": backends.enable_cudnn_sdp}
    times: dict[str, float] = {}
    backends.enable_mem_efficient_sdp(False)
    backends.enable_math_sdp(False)
    for name in switches:
        for other, switch in switches.items():
            switch(other == name)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        try:
            for repeat in range(8):
                if repeat == 3:
                    begin.record()
                F.scaled_dot_product_attention(q, q, q).backward(gradient)
            end.record()
            end.synchronize()
        except RuntimeError as error:  # this GPU or this build has no such kernel
            print(f"attention by {name} does not run here: {error}", file=sys.stderr)
            continue
        times[name] = begin.elapsed_time(end) / 5
    best = min(times, key=lambda name: times[name]) if times else None
    for name, switch in switches.items():
        switch(name == best)
    backends.enable_mem_efficient_sdp(True)  # for shapes that the fastest one does not take
    backends.enable_math_sdp(True)
    print(f"attention, ms per layer forward + backward: {times}; using {best or 'PyTorch default'}")
    return times


def write_outputs(training: Training, out: Path, log: dict[str, Any]) -> None:
    """Write the averaged weights, config.json and training_log.json."""
    out.mkdir(parents=True, exist_ok=True)
    demo_model.save_model(training.average, out)
    write_log(log, out / "training_log.json")


def write_log(log: dict[str, Any], path: Path) -> None:
    """Write a log as JSON that a person can read."""
    text = json.dumps(log, indent=1)
    # One line per entry of the curves, not one per number.
    text = re.sub(
        r"\[\s*(-?[\d.e-]+(?:,\s*-?[\d.e-]+)*)\s*\]", lambda found: "[" + " ".join(found[1].split()) + "]", text
    )
    path.write_text(text + "\n")


def write_preview(training: Training, out: Path, data: ValidationSet, steps: int = 24) -> None:
    """preview.png: a row per held-out caption; the true clip's frames, then sampled frames."""
    count = min(8, len(data.video))
    caption, noise = data.caption[:count].to(training.device), data.noise[:count].to(training.device)
    with torch.autocast("cuda", torch.bfloat16, enabled=training.device.type == "cuda"):
        made = demo_model.sample_video(training.average, noise, caption, steps=steps)
    write_sheet(data.video[:count], made.cpu(), out / "preview.png", zoom=2)


def write_sheet(true: Tensor, made: Tensor, path: Path, zoom: int = 1) -> None:
    """A picture of five frames of each true clip, [B, 3, T, H, W] in [-1, 1], and beside them of each sampled one."""
    from PIL import Image

    frames = torch.linspace(0, made.shape[2] - 1, 5).long()
    both = torch.cat([true[:, :, frames], made[:, :, frames]], dim=2)  # [B, 3, 10, H, W]
    sheet = F.pad(both, (1, 1, 1, 1), value=1.0).permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)
    picture = Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy())
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


def new_log(args: argparse.Namespace, stages: Iterable[Stage], model: WanTransformer3DModel) -> dict[str, Any]:
    cuda = args.device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(args.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "arguments": {"minutes": args.minutes, "steps": args.steps, "lr": args.lr, "seed": args.seed},
        "continued": args.init_from is not None,
        "stages": [asdict(stage) for stage in stages],
        "curve": [],  # step, seconds, loss (mean since the last entry), gradient norm, learning rate
        "validation": [],  # step, seconds, loss of the averaged weights on held-out clips
    }


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train as the command line says; returns the log that is also written.

    Raises:
        FloatingPointError: the loss or the gradient is not finite. The files written last stay as they are.
    """
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    cuda = args.device.type == "cuda"
    overrides, stages, held_out = SCALES[args.scale]
    stages = tuple(replace(stage, batch=max(1, round(stage.batch * args.batch_scale))) for stage in stages)
    if args.init_from:
        model = demo_model.load_model(args.init_from)
        stages = (replace(stages[-1], start=0.0),)  # the small clips are behind it
    else:
        model = demo_model.build_model(**overrides)
    last = stages[-1]
    data = demo_model.validation_set(held_out, last.frames, last.height, last.width)
    log = new_log(args, stages, model)
    if cuda:
        log["attention_ms"] = choose_attention(last, dict(model.config))
    training = Training(
        model, args.device, lr=args.lr, warmup=args.warmup, seed=args.seed, compile_blocks=cuda and args.compile
    )

    start = time.perf_counter()
    losses: list[Tensor] = []
    validated = checkpointed = progress = 0.0
    quiet = {} if sys.stderr.isatty() else {"mininterval": 15.0}
    with tqdm(total=1.0, bar_format="{l_bar}{bar}| {elapsed}{postfix}", **quiet) as bar:
        while progress < 1:
            stage = [stage for stage in stages if stage.start <= progress][-1]
            loss, norm = training.step(stage, progress)
            losses.append(loss)
            elapsed = time.perf_counter() - start
            progress = training.steps / args.steps if args.steps else elapsed / (60 * args.minutes)
            if len(losses) < args.log_every and progress < 1:
                continue

            mean, norm_now = float(torch.stack(losses).mean()), float(norm)  # waits for the device
            losses.clear()
            elapsed = round(time.perf_counter() - start, 1)
            if not math.isfinite(mean) or not math.isfinite(norm_now):
                raise FloatingPointError(f"loss {mean}, gradient norm {norm_now} after {training.steps} steps")
            rate = training.learning_rate(progress)
            log["curve"].append([training.steps, elapsed, round(mean, 5), round(norm_now, 4), round(rate, 7)])
            now = f"step {training.steps}, {stage.frames}x{stage.height}x{stage.width}, loss {mean:.4f}"
            bar.set_postfix_str(now, refresh=False)
            bar.update(min(1.0, progress) - bar.n)
            if progress >= 1 or elapsed - validated >= args.validate_seconds:
                held = training.validate(data)
                log["validation"].append([training.steps, elapsed, round(held, 5)])
                tqdm.write(f"{elapsed:6.0f} s, {training.clips} clips, {now}, validation {held:.4f}", file=sys.stderr)
                validated = elapsed
            if progress >= 1 or elapsed - checkpointed >= args.checkpoint_seconds:
                log.update(steps=training.steps, clips=training.clips, seconds=elapsed)
                if cuda:
                    log["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                write_outputs(training, args.out, log)
                checkpointed = elapsed
    if args.preview:
        write_preview(training, args.out, data)
    return log


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model from scratch on procedural video.")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train this long, compilation included")
    length.add_argument("--steps", type=int, help="train for this many updates")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and log; nothing else is written")
    parser.add_argument("--init-from", type=Path, help="folder of weights to continue from (full-size clips only)")
    parser.add_argument("--scale", choices=list(SCALES), default="demo", help="size of model and clips")
    parser.add_argument("--device", type=torch.device, help="default: cuda if there is one, else cpu")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up")
    parser.add_argument("--batch-scale", type=float, default=1.0, help="multiplies the batch of every stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=20, help="steps")
    parser.add_argument("--validate-seconds", type=float, default=45)
    parser.add_argument("--checkpoint-seconds", type=float, default=90)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train eagerly on CUDA too")
    parser.add_argument("--preview", action="store_true", help="also write preview.png: true and sampled frames")
    args = parser.parse_args(argv)
    for name in ("minutes", "steps", "lr", "batch_scale", "log_every"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return args


if __name__ == "__main__":
    train(parse())
