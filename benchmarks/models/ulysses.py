# SPDX-License-Identifier: Apache-2.0
"""One forward on several GPUs of one host, sequence parallel by Ulysses: sparse against dense, and against one GPU.

    python -m benchmarks.models.ulysses [--gpus 1 2] [--layers 4] [--sparsity 0.8]
    python -m benchmarks.models.ulysses --shrink --device cpu --gpus 1 2 --out smoke.json  # tests this script

Wan 2.1 14B's unmodified class at 720p with a few of its layers, random weights, bfloat16, split over the GPUs by
diffusers' `enable_parallelism`. As in `whole_model`, every head takes a pattern (``arm="recall"``, ``min_recall=0``):
speed is measured, and nothing about quality. Dense attention is by the fastest kernel at the shape that a rank has.
A forward takes as long as the slowest rank: medians of that. ``communication_share`` and the attention's time by rank
are from one more forward under the profiler; a collective's kernel also waits for ranks that are late.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import rainfusion_compile
from benchmarks.attention import flash_attention_3
from benchmarks.measure import needs_gpu, relative_error, result_path, write_result
from benchmarks.models import whole_model
from benchmarks.models.real_models import MODELS, build, making

MODEL = MODELS["wan-14b"]
REPEATS = 5


def forwards(model: Any, inputs: dict[str, Any], device: str, **compile_args: Any) -> tuple[torch.Tensor, Any, Any]:
    """The output, times (the slowest rank's, in ms) with the profile of one forward, and what the report says."""
    whole_model.clear(device)
    compiled = torch.compile(model, **compile_args)

    def run() -> torch.Tensor:
        return compiled(**inputs, return_dict=False)[0]

    def together() -> float:
        dist.barrier()
        ms = torch.tensor(whole_model.run_ms(run, device), device=device)
        dist.all_reduce(ms, dist.ReduceOp.MAX)
        return float(ms)

    with torch.no_grad():
        with rainfusion_compile.observe() as report:
            out = run()
        times = [together() for _ in range(REPEATS + 1)][1:]
        dist.barrier()
        kernels = whole_model.kernel_times(run, device)
    if not bool(torch.isfinite(out).all()):
        raise RuntimeError("the output is not finite")
    return out, (times, kernels), report.to_dict()["attentions"]


def work(rank: int, world: int, args: argparse.Namespace, folder: str) -> None:
    """What each rank does; the first one writes the row."""
    device = "cpu" if args.device == "cpu" else f"cuda:{rank}"
    if device != "cpu":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        torch.accelerator.device_count = lambda: 1  # diffusers counts no CPUs
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl", init_method=f"file://{folder}/{world}", rank=rank, world_size=world,
        device_id=None if device == "cpu" else torch.device(device),
    )  # fmt: skip
    config, latent = MODEL.sized(args.layers, args.shrink)
    heads, tokens = config["num_attention_heads"] // world, latent[0] * (latent[1] // 2) * (latent[2] // 2)
    torch.manual_seed(0)
    model: Any = build(MODEL.cls, config, device)
    with making(device):
        inputs = MODEL.inputs(config, latent)
    kernels = {} if device == "cpu" else whole_model.dense_ms(heads, config["attention_head_dim"], tokens, None)
    if world > 1:
        from diffusers import ContextParallelConfig

        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    with whole_model.fastest_first(kernels, tokens):
        dense, dense_run, _ = forwards(model, inputs, device, backend="inductor")
    options: dict[str, Any] = {"sparsity": args.sparsity, "arm": "recall", "min_recall": 0.0}
    if args.shrink:
        options["min_tokens"] = 0
    without_fa3 = {name: ms for name, ms in kernels.items() if name in whole_model.SDPA}
    with whole_model.fastest_first(without_fa3, tokens):
        ours, our_run, attentions = forwards(model, inputs, device, backend="rainfusion", options=options)
    sparse = [entry for entry in attentions if entry["status"] == "sparse"]
    own = {
        "attentions_rewritten": sum(entry["calls"] for entry in sparse),
        "attentions_left": dict(Counter(str(entry["reason"]) for entry in attentions if entry["status"] == "dense")),
        "density": statistics.mean(entry["mean_density"] for entry in sparse) if sparse else None,
        "attention_ms": sum(ms for name, ms in our_run[1] if whole_model.SPARSE.search(name)),
        "communication_share": [
            sum(ms for name, ms in run[1] if "nccl" in name.lower()) / sum(ms for _, ms in run[1])
            for run in (dense_run, our_run)
        ],
    }
    ranks: list[Any] = [None] * world
    dist.all_gather_object(ranks, own)
    if rank == 0:
        torch.save({"dense": dense.cpu(), "ours": ours.cpu()}, f"{folder}/outputs{world}")
        dense_ms, sparse_ms = (statistics.median(run[0]) for run in (dense_run, our_run))
        row = {
            "model": MODEL.name,
            "layers": args.layers,
            "gpus": world,
            "tokens": tokens,
            "sparsity": args.sparsity,
            "shrunk": args.shrink,
            "dense_kernel": next(iter(kernels), "CPU"),
            "dense_ms": dense_ms,
            "sparse_ms": sparse_ms,
            "speedup": dense_ms / sparse_ms,
            "dense_all_ms": dense_run[0],
            "sparse_all_ms": our_run[0],
            "ranks": ranks,
            "sparse_top_kernels_ms": dict(our_run[1][:6]),
        }
        Path(folder, f"row{world}").write_text(json.dumps(row))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2], help="how many, each a run of its own")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shrink", action="store_true", help="a tiny model, to test this script")
    parser.add_argument("--out", type=Path, help="default: results/ulysses_<gpu>.json")
    args = parser.parse_args()
    needs_gpu()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in args.gpus:
            torch.multiprocessing.spawn(work, (world, args, folder), nprocs=world)
            row = json.loads(Path(folder, f"row{world}").read_text())
            first, this = (torch.load(f"{folder}/outputs{n}") for n in (args.gpus[0], world))
            row["difference"] = {name: relative_error(this[name], first[name]) for name in this}
            if rows:
                row["of_first_speedup"] = row["speedup"] / rows[0]["speedup"]
            rows.append(row)
            print({name: row[name] for name in ("gpus", "dense_ms", "sparse_ms", "speedup", "difference")}, flush=True)
            write_result(args.out or result_path("ulysses"), {
                "dtype": "bfloat16", "flash_attention_3": flash_attention_3.version(), "note": whole_model.NOTE,
                "rows": rows,
            })  # fmt: skip


if __name__ == "__main__":
    main()
