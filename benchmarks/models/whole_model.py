# SPDX-License-Identifier: Apache-2.0
"""One forward of whole video transformers: ``backend="rainfusion"`` against plain Inductor with the best dense SDPA.

    python -m benchmarks.models.whole_model [--models wan-1.3b ...] [--sparsity 0.8] [--presets balanced] [--blocks]
    python -m benchmarks.models.whole_model --shrink --device cpu --out smoke.json  # tests this script

diffusers' unmodified classes at their published configurations, bfloat16, batch 1. The weights are random and have no
pattern to find, so with a sparsity ``min_recall`` is 0 and every head takes a pattern. With a preset, heads are chosen
by error, as of trained weights, but of what random weights attend to. Speed is measured, and nothing about quality.
Both sides compile without max-autotune and into one graph, by default from empty caches (``--caches warm``: an earlier
run's are used, and compile times mean nothing); times are medians of whole forwards between CUDA events, after one that
compiles. With ``--blocks`` both sides compile each block by itself, as diffusers' ``compile_repeated_blocks`` does, and
nobody says what the grid is. The dense side's self-attention over the video is by the fastest kernel at the model's own
attention shape and mask, measured first: FlashAttention-3 where it can be imported and takes it, else SDPA's fastest.

Attention's share is from one more forward of each side under the profiler. Ours has kernels of known names. Dense video
self-attention is as many kernels as ours rewrote attentions: the longest ones with a fused dense kernel's name. The
next longest, recorded beside them, belongs to text attention and must be far shorter. HunyuanVideo passes a mask over
padded text to every attention, which may slow dense attention down; what a dense model without that mask would take is
recorded as an estimate. Rows go to the JSON file after each model and replace rows of the same model and settings.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._inductor.utils import fresh_cache
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import rainfusion_compile
from benchmarks.attention import flash_attention_3
from benchmarks.attention.baselines import FA3, SDPA, dense_kernels
from benchmarks.measure import machine, needs_gpu, result_path, write_result
from benchmarks.models.real_models import MODELS, REAL_TEXT, Model, build, making
from rainfusion_compile.options import PRESETS

BLOCKS = ", block by block"
NOTE = (
    "random weights: with a sparsity, arm='recall' and min_recall=0, so that every head takes a pattern; with a "
    "preset, heads are chosen by error, of what random weights attend to; speed only, nothing about quality"
)
# On CPU, operators instead of kernels. Inductor names its own kernels, "triton_...", after the operators around them.
DENSE = re.compile(r"^(?!triton_).*(sdpa|fmha|flash_fwd|flash_fprop|FlashAttnFwd|scaled_dot_product)", re.IGNORECASE)
PROBE = re.compile(r"^(?!triton_).*((probe|thresholds|measure|add_up|choose)_kernel|::arm_probe)")
SPARSE = re.compile(r"^(?!triton_).*((attention|select)_kernel|::block_sparse_attention)")
MEANS = re.compile("^means_kernel")  # of blocks, where heads select them: one of three by the ARM
MASKS = re.compile("^_touched_keys_kernel")  # once by the ARM, once by attention


def dense_ms(heads: int, head_dim: int, tokens: int, mask: torch.Tensor | None) -> dict[str, float]:
    """Time of one video self-attention by each dense kernel that takes it, fastest first."""
    q, k, v = (
        torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)
    )
    times = {}
    for name, kernel in dense_kernels().items():
        try:
            times[name] = min(run_ms(lambda: kernel(q, k, v, mask), "cuda") for _ in range(3))  # noqa: B023
        except RuntimeError as error:
            print(f"  {name}{' with mask' if mask is not None else ''}: {str(error).splitlines()[0]}")
    return dict(sorted(times.items(), key=lambda item: item[1]))


@contextmanager
def fastest_first(times: dict[str, float], tokens: int) -> Iterator[None]:
    """SDPA's backends in the order of their speed; where FlashAttention-3 was faster than all, it takes every
    self-attention over `tokens`."""
    names = [*(name for name in times if name in SDPA), *(name for name in SDPA if name not in times)]
    usual = F.scaled_dot_product_attention

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if attn_mask is None and query.shape[2] == key.shape[2] == tokens:
            return flash_attention_3.operator(query, key, value)
        return usual(query, key, value, attn_mask, *args, **kwargs)

    with sdpa_kernel([*(SDPA[name] for name in names), SDPBackend.MATH], set_priority=True):
        if next(iter(times), None) == FA3:
            with mock.patch.object(F, "scaled_dot_product_attention", attend):
                yield
        else:
            yield


def run_ms(run: Callable[[], object], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def kernel_times(run: Callable[[], object], device: str) -> list[tuple[str, float]]:
    """Name and milliseconds of every kernel of a call (operators on CPU), longest first."""
    activities = [ProfilerActivity.CPU] if device == "cpu" else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        run_ms(run, device)
    kind = DeviceType.CPU if device == "cpu" else DeviceType.CUDA
    events = [e for e in profiler.events() if e.device_type == kind and not e.is_user_annotation]
    return sorted(((e.name, e.time_range.elapsed_us() / 1e3) for e in events), key=lambda item: -item[1])


@dataclass
class Side:
    """What one compilation of a model did; attentions are those of the backend's report."""

    ms: float
    all_ms: list[float]
    compile_s: float
    peak_gib: float | None
    kernels: list[tuple[str, float]]
    graphs: int
    attentions: list[dict[str, Any]]

    def top_kernels(self) -> dict[str, float]:
        """The names that took most time, to see by what the rest of a forward is spent."""
        total: dict[str, float] = {}
        for name, ms in self.kernels:
            total[name[:100]] = total.get(name[:100], 0.0) + ms
        return dict(sorted(total.items(), key=lambda item: -item[1])[:8])


def clear(device: str) -> None:
    """Forget compiled models and give their memory back."""
    torch._dynamo.reset()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def measure_side(
    model: Any, inputs: dict[str, Any], device: str, caches: str, blocks: bool, **compile_args: Any
) -> Side:
    """Compile (from empty caches if they are "cold"), whole or block by block, time and profile."""
    clear(device)
    with torch.no_grad(), fresh_cache() if caches == "cold" else nullcontext():
        compiled = model if blocks else torch.compile(model, fullgraph=True, **compile_args)
        if blocks:
            model.compile_repeated_blocks(fullgraph=True, **compile_args)

        def run() -> torch.Tensor:
            return compiled(**inputs, return_dict=False)[0]

        start = time.perf_counter()
        with rainfusion_compile.observe() as report:
            finite = bool(torch.isfinite(run()).all())  # waits for the device
        first = 1e3 * (time.perf_counter() - start)
        if not finite:
            raise RuntimeError("the output is not finite")
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        times = [run_ms(run, device)]
        repeats = 3 if times[0] >= 1e3 else min(20, math.ceil(5e3 / times[0]))
        times += [run_ms(run, device) for _ in range(repeats - 1)]
        peak = None if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30
        kernels = kernel_times(run, device)
    ms, seen = statistics.median(times), report.to_dict()
    return Side(ms, times, (first - ms) / 1e3, peak, kernels, seen["graphs"], seen["attentions"])


def measure(
    model: Model, settings: list[dict[str, Any]], layers: int | None, shrink: bool, device: str, caches: str,
    blocks: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each of the settings, sparsities or presets; the dense side is the same for all."""
    config, latent = model.sized(layers, shrink)
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    grid = (latent[0], latent[1] // 2, latent[2] // 2)
    tokens = math.prod(grid) + model.text
    backends: dict[str, float] = {}
    unmasked: dict[str, float] = {}
    if device != "cpu":
        real = tokens - model.text + REAL_TEXT
        mask = (torch.arange(tokens, device=device) < real)[None, None, None] if model.masked else None
        backends = dense_ms(heads, head_dim, tokens, mask)
        unmasked = dense_ms(heads, head_dim, tokens, None) if model.masked else {}
    transformer = build(model.cls, config, device)
    with making(device):
        inputs = model.inputs(config, latent)
    with fastest_first(backends, tokens):
        dense = measure_side(transformer, inputs, device, caches, blocks)
    print(f"  dense {dense.ms:.1f} ms, compiled in {dense.compile_s:.0f} s", flush=True)
    without = {name: ms for name, ms in backends.items() if name in SDPA}
    expected = config["num_layers"] + config.get("num_single_layers", 0)
    for setting in settings:
        options: dict[str, Any] = setting if "preset" in setting else setting | {"arm": "recall", "min_recall": 0.0}
        options = options | ({"min_tokens": 0} if shrink else {})
        with fastest_first(without, tokens):
            ours = measure_side(transformer, inputs, device, caches, blocks, backend="rainfusion", options=options)
            print(f"  {setting}: {ours.ms:.1f} ms, compiled in {ours.compile_s:.0f} s", flush=True)
        sparse = [entry for entry in ours.attentions if entry["status"] == "sparse"]
        rewritten = sum(entry["calls"] for entry in sparse)
        chosen = Counter(name for entry in sparse for sample in entry["patterns"] for name in sample)
        if rewritten != expected or (ours.graphs != 1 and not blocks):
            print(f"  EXPECTED {expected} attentions in one graph: {rewritten} in {ours.graphs}")
        yield {
            "model": f"{model.name}{BLOCKS}" if blocks else model.name,
            "class": model.cls,
            "parameters": sum(parameter.numel() for parameter in transformer.parameters()),
            "grid": grid,
            "text": model.text,
            "tokens": tokens,
            "sparsity": setting.get("sparsity"),
            "preset": setting.get("preset"),
            "shrunk": shrink,
            "attentions_rewritten": rewritten,
            "attentions_expected": expected,
            "attentions_left": dict(Counter(e["reason"] for e in ours.attentions if e["status"] == "dense")),
            "graphs": ours.graphs,
            "density": statistics.mean(entry["mean_density"] for entry in sparse) if sparse else None,
            "chosen": dict(chosen),
            "dense_ms": dense.ms,
            "sparse_ms": ours.ms,
            "speedup": dense.ms / ours.ms,
            **attention_figures(dense, ours, rewritten, min(unmasked.values(), default=None)),
            "attention_ms": backends,
            "attention_without_mask_ms": unmasked,
            "dense_all_ms": dense.all_ms,
            "sparse_all_ms": ours.all_ms,
            "caches": caches,
            "dense_compile_s": dense.compile_s,
            "sparse_compile_s": ours.compile_s,
            "dense_peak_gib": dense.peak_gib,
            "sparse_peak_gib": ours.peak_gib,
            "dense_top_kernels_ms": dense.top_kernels(),
            "sparse_top_kernels_ms": ours.top_kernels(),
        }


def attention_figures(dense: Side, ours: Side, count: int, unmasked_ms: float | None) -> dict[str, Any]:
    """What video self-attention takes of both forwards, and what that lets the whole forward gain."""
    candidates = [(name, ms) for name, ms in dense.kernels if DENSE.search(name)]
    video, rest = candidates[:count], candidates[count:]
    probe = [ms for name, ms in ours.kernels if PROBE.search(name)]
    attend = [ms for name, ms in ours.kernels if SPARSE.search(name)]
    masks = sum(ms for name, ms in ours.kernels if MASKS.search(name))
    means = sum(ms for name, ms in ours.kernels if MEANS.search(name))
    if not count or len(video) < count or len(probe) < count or len(attend) < count:
        print(f"  attention's kernels not found: {len(video)} dense, {len(probe)} probe, {len(attend)} sparse")
        return {"attention_dense_ms": None}
    before, after = sum(ms for _, ms in video), sum(probe) + sum(attend) + masks + means
    limit = dense.ms / (dense.ms - before + after)
    figures = {
        "attention_dense_ms": before,
        "attention_sparse_ms": after,
        "attention_share": before / dense.ms,
        "attention_speedup": before / after,
        "arm_share": (sum(probe) + masks / 2 + means / 3) / before,
        "amdahl_limit": limit,
        "of_amdahl": dense.ms / ours.ms / limit,
        "dense_kernels": dict(Counter(name for name, _ in video)),
        "shortest_counted_ms": video[-1][1],
        "longest_not_counted_ms": rest[0][1] if rest else 0.0,
    }
    if unmasked_ms is not None:
        without_mask = dense.ms - before + count * unmasked_ms
        figures |= {
            "dense_without_mask_estimate_ms": without_mask,
            "speedup_over_dense_without_mask_estimate": without_mask / ours.ms,
        }
    return figures


def save(out: Path, row: dict[str, Any]) -> None:
    """Put a row into the file, for an earlier one of the same model and settings; rows have the order of MODELS."""
    names = [f"{model.name}{way}" for way in ("", BLOCKS) for model in MODELS.values()]
    order = {name: number for number, name in enumerate(names)}

    def key(row: dict[str, Any]) -> str:
        names = ("model", "sparsity", "preset", "shrunk", "attentions_expected")
        return json.dumps([row.get(name) for name in names])

    import diffusers

    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    rows = [*(old for old in rows if key(old) != key(row)), row | {"date": machine()["date"]}]
    result = {
        "diffusers": diffusers.__version__,
        "dtype": "bfloat16",
        "flash_attention_3": flash_attention_3.version(),
        "note": NOTE,
        "rows": sorted(rows, key=lambda row: order.get(row["model"], len(order))),  # last: models no longer in MODELS
    }
    write_result(out, result)


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'model':38s} {'options':14s} tokens density  dense ms  sparse ms  speed-up", end="")
    print("  attention: share  speed-up  of Amdahl")
    for row in rows:
        options = f"sparsity {row['sparsity']}" if row["preset"] is None else row["preset"]
        line = f"{row['model']:38s} {options:14s} {row['tokens']:6d} {row['density'] or 1:7.3f} {row['dense_ms']:9.1f}"
        line += f" {row['sparse_ms']:10.1f} {row['speedup']:9.2f}"
        if row["attention_dense_ms"] is not None:
            line += f" {row['attention_share']:17.1%} {row['attention_speedup']:9.2f} {row['of_amdahl']:10.1%}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.8])
    parser.add_argument("--presets", nargs="*", choices=list(PRESETS), default=["balanced"])
    parser.add_argument("--layers", type=int, help="video attentions in each model, instead of all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--caches", choices=["cold", "warm"], default="cold", help="compile from empty caches, or from Inductor's own"
    )
    parser.add_argument("--blocks", action="store_true", help="compile each block by itself instead of the model")
    parser.add_argument("--shrink", action="store_true", help="tiny models, to test this script")
    parser.add_argument("--out", type=Path, help="default: results/whole_model_<gpu>.json")
    args = parser.parse_args()
    if args.device != "cpu":
        needs_gpu()
    elif not (args.shrink and args.out):
        parser.error("--device cpu is for --shrink, into a file of its own: --out")
    out = args.out or result_path("whole_model")
    settings: list[dict[str, Any]] = [{"sparsity": sparsity} for sparsity in args.sparsity]
    settings += [{"preset": preset} for preset in args.presets]
    rows, failed = [], []
    for name in args.models:
        print(f"{MODELS[name].name}", flush=True)
        torch.manual_seed(0)
        try:
            how = (args.layers, args.shrink, args.device, args.caches, args.blocks)
            for row in measure(MODELS[name], settings, *how):
                rows.append(row)
                save(out, row)
        except Exception:  # the other models still run
            traceback.print_exc()
            failed.append(name)
        clear(args.device)
    print_table(rows)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
