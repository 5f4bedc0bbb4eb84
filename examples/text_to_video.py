# SPDX-License-Identifier: Apache-2.0
"""Make a video by any text-to-video pipeline of diffusers, with sparse attention, in the ways that users run them.

    python examples/text_to_video.py Wan-AI/Wan2.1-T2V-1.3B-Diffusers "A cat walks on the grass."
    python examples/text_to_video.py MODEL PROMPT --blocks --lora some/lora --dense-first 4
    python examples/text_to_video.py MODEL PROMPT --torchao Int8WeightOnlyConfig --size 832x480 --size 480x832
    python examples/text_to_video.py MODEL PROMPT --cache FirstBlockCacheConfig --cache-option threshold=0.1
    python examples/text_to_video.py tiny "cat" --option min_tokens=0     # random weights, on a CPU

MODEL is a hub id or a folder, whatever `DiffusionPipeline.from_pretrained` loads, or the word `tiny`. One video is made
for each --size, all by the same compiled denoisers. Writes the videos, and a page of what every head did, into --out.
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from compare_pipeline import STEP_END, generate, save_videos
from diffusers import DiffusionPipeline
from pipeline_denoisers import find_denoisers
from tiny_pipeline import CALL, tiny_pipeline

import rainfusion_compile
from rainfusion_compile.commands.arguments import add_options, named_options, once, pair

TINY = "tiny"


def compile_denoiser(model: Any, options: dict[str, Any], *, blocks: bool, fullgraph: bool, dynamic: bool) -> None:
    """Compile a model in its place, whole or block by block; `dynamic` where it will see several sizes."""
    how = {"backend": "rainfusion", "options": options, "fullgraph": fullgraph, "dynamic": dynamic or None}
    if blocks:
        model.compile_repeated_blocks(**how)
    else:
        model.compile(**how)


def quantize(model: Any, config: str) -> None:
    """Quantise a model's linear layers by a configuration of torchao, named as in `torchao.quantization`."""
    quantization = import_module("torchao.quantization")
    quantization.quantize_(model, getattr(quantization, config)())


def skip_steps(model: Any, config: str, options: dict[str, Any]) -> None:
    """Let a cache skip what changes little from step to step, by a configuration of diffusers', named as there."""
    model.enable_cache(getattr(diffusers, config)(**options))


def make_videos(pipe: Any, args: argparse.Namespace) -> list[Path]:
    """One video for each size; returns the files."""
    given = {**(CALL if args.model == TINY else {}), **args.call}
    sizes = [{"width": width, "height": height} for width, height in args.size] or [{}]
    paths = []
    for size in sizes:
        stem = args.out / ("x".join(map(str, size.values())) or "video")
        start = time.perf_counter()
        steps = rainfusion_compile.dense_first_steps(args.dense_first) if args.dense_first else nullcontext()
        with rainfusion_compile.observe() as report, steps as callback:
            watch = {} if callback is None else {STEP_END: callback}
            video = generate(pipe, args.prompt, args.seed, {**given, **size, **watch})
        seconds = time.perf_counter() - start
        args.out.mkdir(parents=True, exist_ok=True)
        report.save(stem.with_suffix(".html"))
        paths.append(save_videos({"sparse": video}, stem, args.fps))
        print(f"{report}\n{paths[-1]} after {seconds:.1f} s, compilation included; {stem.with_suffix('.html')}")
        if args.strict and not any(entry["status"] == "sparse" for entry in report.to_dict()["attentions"]):
            raise SystemExit("no attention became sparse; the report says why")
    return paths


def size_in_pixels(text: str) -> tuple[int, int]:
    """``WIDTHxHEIGHT``."""
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, such as 832x480; got {text!r}")
    width, height = map(int, numbers)
    return width, height


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Make a video with sparse attention.")
    parser.add_argument("model", help=f"hub id or folder of a diffusers pipeline, or {TINY!r}, of random weights")
    parser.add_argument("prompt")
    add_options(parser)
    parser.add_argument("--blocks", action="store_true", help="compile the repeated blocks, not whole models")
    parser.add_argument("--fullgraph", action="store_true", help="fail where a model breaks into several graphs")
    parser.add_argument("--lora", metavar="PATH", help="hub id, folder or file of a LoRA, fused into the weights")
    parser.add_argument("--torchao", metavar="CONFIG", help="quantise by this configuration of torchao.quantization")
    parser.add_argument("--cache", metavar="CONFIG", help="cache between steps by this configuration of diffusers")
    help_text = "an argument of that configuration, a Python literal; may be repeated"
    parser.add_argument("--cache-option", type=pair, action="append", default=[], metavar="NAME=VALUE", help=help_text)
    parser.add_argument("--dense-first", type=int, default=0, metavar="N", help="that many dense denoising steps")
    help_text = "of the video, WIDTHxHEIGHT in pixels; several make several videos by the same graphs"
    parser.add_argument("--size", type=size_in_pixels, action="append", default=[], help=help_text)
    help_text = "any other argument of the pipeline's call, a Python literal; may be repeated"
    parser.add_argument("--call", type=pair, action="append", default=[], metavar="NAME=VALUE", help=help_text)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--strict", action="store_true", help="fail where no attention becomes sparse")
    parser.add_argument("--fps", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("pipeline_output"))
    args = parser.parse_args(argv)
    try:
        args.options, args.call = named_options(args), once("--call", args.call)
        args.cache_option = once("--cache-option", args.cache_option)
        if args.cache and not hasattr(diffusers, args.cache):
            raise ValueError(f"--cache: diffusers has no {args.cache!r}; FirstBlockCacheConfig is one")
        for option, given, package in (("--torchao", args.torchao, "torchao"), ("--lora", args.lora, "peft")):
            if given and find_spec(package) is None:
                raise ValueError(f"{option} needs {package}: pip install {package}")
        if args.torchao and not hasattr(import_module("torchao.quantization"), args.torchao):
            raise ValueError(f"--torchao: torchao.quantization has no {args.torchao!r}; Int8WeightOnlyConfig is one")
    except ValueError as error:
        parser.error(str(error))
    return parser, args


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Make the videos; returns their files."""
    parser, args = parse(argv)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    pipe = tiny_pipeline() if args.model == TINY else DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype)
    if args.dense_first and STEP_END not in inspect.signature(type(pipe).__call__).parameters:
        parser.error(f"--dense-first: {type(pipe).__name__} does not tell its steps; see --option dense_steps=...")
    if args.lora:
        pipe.load_lora_weights(args.lora)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.to(args.device)
    for name in find_denoisers(pipe):
        model = getattr(pipe, name)
        if args.torchao:
            quantize(model, args.torchao)
        if args.cache:  # before it is compiled: these are hooks
            skip_steps(model, args.cache, args.cache_option)
        how = {"blocks": args.blocks, "fullgraph": args.fullgraph, "dynamic": len(args.size) > 1}
        compile_denoiser(model, args.options, **how)
    return make_videos(pipe, args)


if __name__ == "__main__":
    main()
