# SPDX-License-Identifier: Apache-2.0
"""Run a diffusers video pipeline dense and sparse from the same noise, and tell how alike and how fast.

    python examples/compare_pipeline.py Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts "A cat walks on the grass."
    python examples/compare_pipeline.py some/folder --prompts-file prompts.txt --error 0.1 --option dense_layers=2

MODEL is a hub id or a folder, whatever `DiffusionPipeline.from_pretrained` loads. Every denoiser of the pipeline
(Wan 2.2 has two) is compiled twice, `backend="inductor"` and `backend="rainfusion"`; all else stays as it is. Into
--out go the videos, what every attention did, `table.md` and `result.json`. Where no attention becomes sparse, it says
why and fails.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import diffusers
import torch
from demo_pictures import save_gif
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video
from pipeline_denoisers import Denoisers, find_denoisers
from similarity import flicker, psnr, ssim
from torch import Tensor

import rainfusion_compile
from rainfusion_compile.commands.arguments import add_options, named_options, once, pair

# option of this script -> what pipelines call it
SIZES = {
    "steps": ("num_inference_steps",),
    "height": ("height",),
    "width": ("width",),
    "frames": ("num_frames", "video_length", "frames"),
    "guidance": ("guidance_scale",),
}
STEP_END = "callback_on_step_end"
OWN = ("prompt", "generator", "output_type", "return_dict", STEP_END)  # what the script itself gives a pipeline
Row = dict[str, Any]


def call_arguments(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What every call of the pipeline is given besides the prompt. Raises ValueError on what it does not take."""
    takes = [name for name in inspect.signature(type(pipe).__call__).parameters if name != "self"]
    given = dict(args.call)
    for option, names in SIZES.items():
        if getattr(args, option) is not None:
            name = next((name for name in names if name in takes), None)
            if name is None:
                raise ValueError(f"--{option}: {type(pipe).__name__} takes no {' or '.join(names)}")
            if name in given:
                raise ValueError(f"--{option} and --call {name}=... are the same; give one of them")
            given[name] = getattr(args, option)
    for name in given:
        if name in OWN or name not in takes:
            accepted = ", ".join(name for name in takes if name not in OWN)
            raise ValueError(f"--call: {type(pipe).__name__} is not to be given {name!r} here; it takes {accepted}")
    return given


def generate(pipe: Any, prompt: str, seed: int, given: Mapping[str, Any]) -> Tensor:
    """One video, float32 ``[3, T, H, W]`` in [-1, 1], from noise that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
    output = pipe(prompt=prompt, generator=generator, output_type="np", **given)
    if not hasattr(output, "frames"):
        raise SystemExit(f"{type(pipe).__name__} makes no video: its output has {', '.join(output)}, not frames")
    frames = torch.as_tensor(output.frames[0]).float()  # [T, H, W, 3] in [0, 1]
    if frames.dim() != 4 or frames.shape[-1] != 3:
        raise SystemExit(f"frames must be [T, H, W, 3]; {type(pipe).__name__} gave {list(frames.shape)}")
    if not frames.isfinite().all():
        raise SystemExit(f"the video of {prompt!r} has numbers that are not finite; try another --dtype")
    return frames.permute(3, 0, 1, 2) * 2 - 1


def load_lpips() -> Callable[[Tensor, Tensor], float] | None:
    """LPIPS (AlexNet) of two videos, if the package `lpips` is installed; it may download its weights."""
    if importlib.util.find_spec("lpips") is None:
        return None
    model = importlib.import_module("lpips").LPIPS(net="alex", verbose=False)

    def distance(one: Tensor, other: Tensor) -> float:
        with torch.no_grad():
            return fmean(float(model(one[:, [t]].transpose(0, 1), other[:, [t]].transpose(0, 1))) for t in _frames(one))

    return distance


def compare(dense: Tensor, sparse: Tensor, lpips: Callable[[Tensor, Tensor], float] | None) -> Row:
    """How alike two videos are; SSIM frame by frame, which bounds its memory."""
    row = {
        "psnr_db": psnr(dense, sparse),
        "ssim": fmean(ssim(dense[:, [t]], sparse[:, [t]]) for t in _frames(dense)),
        "dense_flicker": flicker(dense),
        "sparse_flicker": flicker(sparse),
    }
    return row | ({"lpips": lpips(dense, sparse)} if lpips else {})


def _frames(video: Tensor) -> range:
    return range(video.shape[1])


def save_videos(videos: Mapping[str, Tensor], stem: Path, fps: int) -> Path:
    """Write the videos side by side: MP4 if imageio and ffmpeg are there, else GIF."""
    if all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg")):
        path = stem.with_suffix(".mp4")
        frames = torch.cat(list(videos.values()), -1).permute(1, 2, 3, 0).add(1).div(2).clamp(0, 1)
        export_to_video(list(frames.numpy()), str(path), fps=fps, quality=9.0)
    else:
        path = stem.with_suffix(".gif")
        save_gif(dict(videos), path, zoom=1, milliseconds=round(1000 / fps))
    return path


def mean_row(rows: Sequence[Row]) -> Row:
    """The mean of every figure over the prompts that have it; the speed-up is that of the mean times."""
    means: Row = {"prompt": "mean"}
    for name in (name for name in rows[0] if name != "prompt"):
        values = [row[name] for row in rows if not math.isnan(row[name])]
        means[name] = fmean(values) if values else math.nan
    return means | {"step_speedup": means["dense_step_s"] / means["sparse_step_s"]}


def markdown(rows: Sequence[Row]) -> str:
    """The table, a line for each prompt and one for the mean. A time that no prompt had is a dash."""
    columns = {
        "prompt": ("prompt", ""),
        "psnr_db": ("PSNR, dB", ".1f"),
        "ssim": ("SSIM", ".4f"),
        "lpips": ("LPIPS", ".4f"),
        "dense_flicker": ("flicker, dense", ".4f"),
        "sparse_flicker": ("flicker, sparse", ".4f"),
        "density": ("density", ".3f"),
        "dense_step_s": ("dense, s a step", ".3f"),
        "sparse_step_s": ("sparse, s a step", ".3f"),
        "step_speedup": ("speed-up", ".2f"),
    }
    columns = {name: column for name, column in columns.items() if name in rows[0]}
    cells = [[heading for heading, _ in columns.values()]]
    for row in [*rows, mean_row(rows)]:
        figures = [format(row[name], form) for name, (_, form) in columns.items() if form]
        prompt = " ".join(row["prompt"].replace("|", "/").split())
        prompt = prompt if len(prompt) <= 40 else prompt[:37] + "..."
        cells.append([prompt, *("-" if figure == "nan" else figure for figure in figures)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(pipe: Any, denoisers: Denoisers, args: argparse.Namespace, given: Mapping[str, Any]) -> list[Row]:
    """Both videos of every prompt, their files, and a row of figures for each."""
    lpips, rows, table = load_lpips(), list[Row](), ""
    for number, prompt in enumerate(args.prompts, start=1):
        folder = args.out / f"{number:02}"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"\nprompt {number} of {len(args.prompts)}: {prompt}")
        videos: dict[str, Tensor] = {}
        for kind in ("sparse", "dense"):  # sparse first: if nothing becomes sparse, nobody waits for the rest
            pipe.set_progress_bar_config(desc=kind)
            with denoisers.running(kind), rainfusion_compile.observe() as report:
                videos[kind] = generate(pipe, prompt, args.seed, given)
            if kind == "dense":
                continue
            seen = report.to_dict()
            (folder / "report.json").write_text(json.dumps(seen, indent=2) + "\n")
            if not any(entry["status"] == "sparse" for entry in seen["attentions"]):
                raise SystemExit(f"NO ATTENTION BECAME SPARSE, so there is nothing to compare.\n{report}")
            if number == 1:
                print(report)
        steps = denoisers.steps
        dense_step, sparse_step = (median(steps[kind]) if steps[kind] else math.nan for kind in ("dense", "sparse"))
        density = seen["density"]
        row = {"prompt": prompt, **compare(videos["dense"], videos["sparse"], lpips), "density": density}
        row |= {"dense_step_s": dense_step, "sparse_step_s": sparse_step, "step_speedup": dense_step / sparse_step}
        rows.append(row)
        for titles in (("dense",), ("sparse",), ("dense", "sparse")):
            path = save_videos({title: videos[title] for title in titles}, folder / "_and_".join(titles), args.fps)
        print(f"PSNR {row['psnr_db']:.1f} dB at density {density:.3f}; {path}")
        table = write(args, pipe, denoisers, rows)  # after each, so that nothing is lost if a later one fails
    first = {kind: sum(denoisers.first[kind]) for kind in ("dense", "sparse")}
    print(f"\nFirst steps, compilation included: dense {first['dense']:.1f} s, sparse {first['sparse']:.1f} s.")
    unit = "each call of a denoiser, for the pipeline does not tell its steps" if denoisers.every_call else "a step"
    print(f"Seconds are those in the denoisers, median of {unit}, first ones apart.\n\n{table}\n\nIn {args.out}")
    return rows


def write(args: argparse.Namespace, pipe: Any, denoisers: Denoisers, rows: list[Row]) -> str:
    """Write the table and all figures; returns the table."""

    def plain(row: Row) -> Row:  # JSON has neither infinity nor nan
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}

    asked = ("model", "options", "blocks", "components", *SIZES, "call", "seed")
    cuda = args.device.type == "cuda"
    result = {
        **{name: getattr(args, name) for name in asked},
        "pipeline": type(pipe).__name__,
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.processor() or "CPU",
        "dtype": str(args.dtype),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "first_steps_s": denoisers.first,
        "prompts": [plain(row) for row in rows],
        "mean": plain(mean_row(rows)),
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    table = markdown(rows)
    (args.out / "table.md").write_text(table + "\n")
    return table


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Compare; returns the figures of each prompt, as in result.json. Exits with an error where nothing is sparse."""
    parser, args = parse(argv)
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=args.dtype)
    tells = STEP_END in inspect.signature(type(pipe).__call__).parameters  # when a step is over
    try:
        given = call_arguments(pipe, args)
        names = find_denoisers(pipe, args.components)
        modules = [getattr(pipe, name) for name in names]
        denoisers = Denoisers(modules, args.options, args.device, blocks=args.blocks, every_call=not tells)
    except ValueError as error:
        parser.error(str(error))
    print(f"{type(pipe).__name__}: {' and '.join(names)} compiled dense and sparse, {given or 'its own defaults'}")
    if args.vae_tiling:
        pipe.vae.enable_tiling()
    if args.offload:  # after the denoisers were compiled, so that what moves them stays outside the graphs
        pipe.enable_model_cpu_offload(device=args.device)
    else:
        pipe.to(args.device)
    return run(pipe, denoisers, args, {**given, **({STEP_END: denoisers.end_step} if tells else {})})


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for errors found later, and what it read; options of the backend are checked here."""
    parser = argparse.ArgumentParser(description="Run a video pipeline dense and sparse from the same noise.")
    parser.add_argument("model", help="hub id or folder of a diffusers pipeline")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", nargs="+", metavar="PROMPT")
    source.add_argument("--prompts-file", type=Path, help="one prompt a line")
    parser.add_argument("--steps", type=int, help="denoising steps; default, as for all of these: the pipeline's own")
    parser.add_argument("--height", type=int, help="of the video, pixels")
    parser.add_argument("--width", type=int, help="of the video, pixels")
    parser.add_argument("--frames", type=int, help="of the video")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance")
    help_text = "any other argument of the pipeline's call, a Python literal; may be repeated"
    parser.add_argument("--call", type=pair, action="append", default=[], metavar="NAME=VALUE", help=help_text)
    parser.add_argument("--seed", type=int, default=0, help="of the noise, the same for every prompt")
    add_options(parser)
    parser.add_argument("--components", nargs="+", help="the denoisers; default: modules named transformer...")
    parser.add_argument("--blocks", action="store_true", help="compile the repeated blocks, not whole models")
    parser.add_argument("--device", type=torch.device, help="default: cuda if there is one, else cpu")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--offload", action="store_true", help="enable_model_cpu_offload, where GPU memory is short")
    parser.add_argument("--vae-tiling", action="store_true", help="decode in tiles, where GPU memory is short")
    parser.add_argument("--fps", type=int, default=16, help="frames a second of the files")
    parser.add_argument("--out", type=Path, default=Path("pipeline_output"), help="folder for all that is written")
    args = parser.parse_args(argv)
    try:
        args.options, args.call = named_options(args), once("--call", args.call)
    except ValueError as error:
        parser.error(str(error))
    if args.prompts_file:
        args.prompts = [line.strip() for line in args.prompts_file.read_text().splitlines() if line.strip()]
        if not args.prompts:
            parser.error(f"--prompts-file: no prompt in {args.prompts_file}")
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.fps < 1:
        parser.error(f"--fps must be at least 1; got {args.fps}")
    if args.offload and args.device.type == "cpu":
        parser.error("--offload moves models off a GPU; there is none with --device cpu")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
    return parser, args


if __name__ == "__main__":
    main()
