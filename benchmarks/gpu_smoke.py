# SPDX-License-Identifier: Apache-2.0
"""First run on a GPU: are the Triton kernels right there, and how fast in which launch configuration?

    PYTHONPATH=. python benchmarks/gpu_smoke.py --json smoke.json

Checks both kernels against a chunked float32 reference, then times them against the fastest dense attention that
PyTorch has here. Efficiency is dense time * density / sparse time: 1 would be dense speed on the kept part alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rainfusion_compile.grid import VideoLayout
from rainfusion_compile.kernels.configs import LaunchConfig, attention_config, probe_config
from rainfusion_compile.kernels.triton_attention import block_sparse_attention
from rainfusion_compile.kernels.triton_probe import arm_probe
from rainfusion_compile.tables import block_tables

DEVICE = torch.device("cuda")
BLOCK_Q, BLOCK_K = 128, 64
NAMES = ("spatial", "temporal", "textural")

# Tiles, warps and stages to compare, by head_dim.
CONFIGS = {
    64: [
        LaunchConfig(128, 64, 4, 2),
        LaunchConfig(128, 64, 4, 3),
        LaunchConfig(128, 64, 4, 4),
        LaunchConfig(128, 64, 8, 3),
        LaunchConfig(128, 64, 8, 3, maxnreg=128),
        LaunchConfig(128, 64, 8, 2, chunk=32),
        LaunchConfig(128, 128, 4, 2),
        LaunchConfig(128, 128, 8, 2),
        LaunchConfig(128, 128, 8, 3),
        LaunchConfig(64, 64, 4, 3),
    ],
    128: [
        LaunchConfig(128, 64, 8, 2),
        LaunchConfig(128, 64, 8, 3),
        LaunchConfig(128, 64, 8, 4),
        LaunchConfig(128, 128, 8, 2),
        LaunchConfig(128, 128, 8, 3),
        LaunchConfig(128, 128, 8, 2, chunk=64),
        LaunchConfig(128, 64, 8, 2, maxnreg=128, chunk=64),
        LaunchConfig(128, 32, 8, 3, maxnreg=128, chunk=64),
        LaunchConfig(128, 64, 4, 2),
        LaunchConfig(64, 64, 4, 2),
        LaunchConfig(64, 64, 4, 3),
    ],
}


@dataclass
class Tables:
    order: Tensor
    key_order: Tensor
    rows: Tensor
    row_ptr: Tensor
    indices: Tensor
    samples: Tensor
    sample_keep: Tensor
    key_keep: Tensor
    densities: list[float]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, choice: Tensor, mask: Tensor | None, config: Any = None
    ) -> Tensor:
        tables = (self.order, self.key_order, self.rows, self.row_ptr, self.indices, BLOCK_Q, BLOCK_K)
        return block_sparse_attention(q, k, v, choice, mask, *tables, q.shape[-1] ** -0.5, config=config)

    def probe(self, q: Tensor, k: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        tables = (self.order, self.samples, self.sample_keep, self.key_keep, len(self.densities), BLOCK_K)
        return arm_probe(q, k, mask, *tables, q.shape[-1] ** -0.5, 0.95, 0.2, **options)


def random_tables(tokens: int, density: float) -> Tables:
    """One pattern of random key blocks: each query block keeps its own."""
    gen = torch.Generator().manual_seed(tokens)
    n_q, n_k = triton.cdiv(tokens, BLOCK_Q), triton.cdiv(tokens, BLOCK_K)
    count = max(1, round(density * n_k))
    picked = torch.rand(n_q, n_k, generator=gen).argsort(1)[:, :count].sort(1).values
    row_ptr = torch.cat([torch.arange(n_q + 1) * count, torch.tensor([n_q * count + n_k])])
    order = torch.randperm(tokens, generator=gen)
    places = torch.randperm(tokens, generator=gen)[:128]
    keep = torch.zeros(len(places), n_k, dtype=torch.uint8).scatter_(1, picked[places // BLOCK_Q], 1)
    key_keep = (torch.rand(tokens, generator=gen) < 0.1).to(torch.uint8)
    made = Tables(
        order=order.int(),
        key_order=order.int(),
        rows=torch.stack([torch.arange(n_q), torch.full((n_q,), n_q)]).int(),
        row_ptr=row_ptr.int(),
        indices=torch.cat([picked.flatten(), torch.arange(n_k)]).int(),
        samples=order[places].int(),
        sample_keep=keep,
        key_keep=key_keep,
        densities=[count / n_k],
    )
    return on_device(made)


def video_tables(layout: VideoLayout, density: float) -> Tables:
    """The package's own tables for a video."""
    made = block_tables(layout, sparsity=1 - density, patterns=NAMES, block_q=BLOCK_Q, block_k=BLOCK_K)
    return on_device(Tables(**made.tensors, densities=list(made.densities)))


def on_device(t: Tables) -> Tables:
    return replace(t, **{name: x.to(DEVICE) for name, x in vars(t).items() if isinstance(x, Tensor)})


def make_qkv(batch: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Random data (constant data flatters the clocks), as permuted views of [B, S, H, D]."""
    gen = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(batch, tokens, n, dim) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=gen, device=DEVICE, dtype=dtype).permute(0, 2, 1, 3) for s in shapes]


def bias_of(mask: Tensor | None, b: int, h: int, tokens: int) -> Tensor:
    if mask is None:
        return torch.zeros(tokens, device=DEVICE)
    one = mask[b % mask.shape[0], h % mask.shape[1]]
    return torch.where(one, 0.0, float("-inf")) if one.dtype == torch.bool else one.float()


def attention_error(t: Tables, qkv: list[Tensor], choice: Tensor, mask: Tensor | None, heads: list[int]) -> float:
    """Largest error over some heads of every sample, relative to the largest output."""
    q, k, v = qkv
    out = t.attend(q, k, v, choice, mask)
    group = q.shape[1] // k.shape[1]
    key_blocks = t.key_order.long().split(BLOCK_K)
    row_ptr, indices, rows = t.row_ptr.tolist(), t.indices.tolist(), t.rows.tolist()
    worst = torch.zeros((), device=DEVICE)
    for b in range(q.shape[0]):
        for h in heads:
            key, value = k[b, h // group].float(), v[b, h // group].float()
            bias = bias_of(mask, b, h, q.shape[2])
            for block, tokens in enumerate(t.order.long().split(BLOCK_Q)):
                row = rows[int(choice[b, h])][block]
                kept = torch.cat([key_blocks[j] for j in indices[row_ptr[row] : row_ptr[row + 1]]])
                s = q[b, h, tokens].float() @ key[kept].T * q.shape[-1] ** -0.5 + bias[kept]
                expected = torch.nan_to_num(s.softmax(-1)) @ value[kept]
                error = (out[b, h, tokens].float() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
                worst = torch.maximum(worst, torch.nan_to_num(error, nan=float("inf")))
    return worst.item()


def probe_error(t: Tables, q: Tensor, k: Tensor, mask: Tensor | None, heads: list[int]) -> float:
    _, recall = t.probe(q, k, mask)
    place = t.order.long().argsort()
    kept = t.sample_keep[:, place // BLOCK_K] | t.key_keep[place]
    group, worst = q.shape[1] // k.shape[1], 0.0
    for b in range(q.shape[0]):
        for h in heads:
            bias = bias_of(mask, b, h, q.shape[2])
            used = torch.isfinite(bias[t.samples.long()]) | (mask is None or mask.dtype != torch.bool)
            s = q[b, h, t.samples.long()].float() @ k[b, h // group].float().T * q.shape[-1] ** -0.5 + bias
            mass = torch.nan_to_num(s.softmax(-1))[used]
            for p in range(len(t.densities)):
                expected = (mass * ((kept[used] >> p) & 1)).sum(1).mean()
                worst = max(worst, (recall[b, h, p] - expected).abs().item())
    return worst


def check_all(large: bool) -> list[dict[str, Any]]:
    """Every case: error of the attention output (relative) and of the recall (absolute)."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    text = VideoLayout((5, 13, 22), (0, 77))
    cases: list[tuple[str, Tables, tuple[int, int, int, int], torch.dtype, str]] = []
    for dim in (32, 40, 64, 72, 80, 96, 120, 128, 256):
        cases.append((f"D{dim}", random_tables(1000, 0.4), (1, 3, 3, dim), bf16, ""))
    for dtype in (fp16, fp32):
        cases.append((f"{dtype}", random_tables(1000, 0.4), (1, 2, 2, 128), dtype, ""))
    for kind in ("", "bool", "bias", "hidden"):
        cases.append(
            (f"video, grouped, batch 2, {kind or 'no'} mask", video_tables(text, 0.4), (2, 6, 2, 64), bf16, kind)
        )
    cases.append(("video D96 bias", video_tables(text, 0.4), (2, 4, 4, 96), bf16, "bias"))
    cases.append(("short", random_tables(50, 0.5), (1, 2, 2, 64), bf16, ""))
    if large:
        cases.append(("S=32760 H=12 D=128", random_tables(32760, 0.36), (1, 12, 12, 128), bf16, ""))
        cases.append(("S=17776 H=48 D=64", random_tables(17776, 0.36), (1, 48, 48, 64), bf16, ""))
        cases.append(("wan video", video_tables(VideoLayout((21, 30, 52)), 0.36), (1, 12, 12, 128), bf16, ""))
    found = []
    for name, t, (batch, heads, kv_heads, dim), dtype, kind in cases:
        tokens, patterns = t.order.shape[0], len(t.densities)
        qkv = make_qkv(batch, heads, kv_heads, tokens, dim, dtype)
        choice = (torch.arange(batch * heads, device=DEVICE) % (patterns + 1)).int().view(batch, heads)
        mask = None if not kind else make_mask(kind, batch, tokens)
        some = list(range(heads)) if tokens < 5000 else list(range(patterns + 1))
        error = attention_error(t, qkv, choice, mask, some)
        recall_error = probe_error(t, qkv[0], qkv[1], mask, some)
        limit = {fp32: 1e-4, fp16: 4e-3, bf16: 2e-2}[dtype]
        good = error < limit and recall_error < 1e-4
        found.append({"case": name, "error": error, "recall_error": recall_error, "good": good})
        print(f"{'ok  ' if good else 'FAIL'} {name:44s} attention {error:.1e}  recall {recall_error:.1e}", flush=True)
    return found


def make_mask(kind: str, batch: int, tokens: int) -> Tensor:
    gen = torch.Generator(DEVICE).manual_seed(1)
    if kind == "bias":
        return torch.randn(batch, 1, tokens, generator=gen, device=DEVICE)
    mask = torch.ones(batch, 1, tokens, dtype=torch.bool, device=DEVICE)
    mask[0, :, tokens - 40 :] = False  # padding at the end
    if kind == "hidden":
        mask[-1] = False  # a sample that sees nothing
    return mask


def check_graph_capture() -> bool:
    """Both kernels inside a CUDA graph: nothing waits for the host, and replay follows new data."""
    t = video_tables(VideoLayout((5, 13, 22), (0, 77)), 0.4)
    q, k, v = make_qkv(1, 4, 4, t.order.shape[0], 64, torch.bfloat16)
    mask = make_mask("bool", 1, t.order.shape[0])

    def step() -> tuple[Tensor, Tensor]:
        choice, _ = t.probe(q, k, mask)
        return t.attend(q, k, v, choice, mask), choice

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, choice = step()
    q.copy_(q.flip(2))
    graph.replay()
    expected, expected_choice = step()
    good = torch.equal(out, expected) and torch.equal(choice, expected_choice)
    print(f"{'ok  ' if good else 'FAIL'} CUDA graph", flush=True)
    return good


def median_ms(run: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median"))


def dense_times(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    times = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel([backend]):
                times[backend.name] = median_ms(lambda: scaled_dot_product_attention(q, k, v))
        except RuntimeError as error:  # this build or GPU lacks it
            print(f"{backend.name}: {error}", flush=True)
    return times


def time_shape(name: str, heads: int, dim: int, t: Tables, sweep: bool) -> list[dict[str, Any]]:
    tokens, dense_pattern = t.order.shape[0], len(t.densities)
    q, k, v = make_qkv(1, heads, heads, tokens, dim, torch.bfloat16)
    dense = dense_times(q, k, v)
    dense_ms = min(dense.values())
    print(f"\n{name}: S={tokens} H={heads} D={dim}, dense {dense}", flush=True)
    default = attention_config(dim, q.dtype, torch.cuda.get_device_capability())
    found = []

    def measure(what: str, config: LaunchConfig, choice: Tensor, density: float) -> None:
        row: dict[str, Any] = {"shape": name, "what": what, "dense_ms": dense_ms, "density": density} | asdict(config)
        start = time.time()
        try:
            t.attend(q, k, v, choice, None, config)
            torch.cuda.synchronize()
            row["first_call_s"] = time.time() - start
            ms = median_ms(lambda: t.attend(q, k, v, choice, None, config))
        except triton.runtime.errors.OutOfResources as error:  # worth knowing, not worth stopping for
            row["failed"] = str(error)
        else:
            row |= {"ms": ms, "tflops": 4e-9 * heads * tokens**2 * dim * density / ms}
            row["efficiency"] = dense_ms * density / ms
        found.append(row)
        print(line(row), flush=True)

    for pattern, density in enumerate(t.densities):
        choice = torch.full((1, heads), pattern, dtype=torch.int32, device=DEVICE)
        measure(f"pattern {pattern}", default, choice, density)
    choice = torch.zeros(1, heads, dtype=torch.int32, device=DEVICE)
    if sweep:
        for config in CONFIGS[dim]:
            measure("sweep", config, choice, t.densities[0])
    everything = torch.full_like(choice, dense_pattern)
    measure("all kept", default, everything, 1.0)
    mixed = choice.clone()
    mixed[0, -1] = dense_pattern
    density = (t.densities[0] * (heads - 1) + 1) / heads
    for first in (True, False):
        measure(f"last head dense, dense_first={first}", replace(default, dense_first=first), mixed, density)
    for samples in (len(t.samples), 64):
        few = replace(t, samples=t.samples[:samples], sample_keep=t.sample_keep[:samples])
        for splits in (None, 8, 16, 32):
            config = probe_config(dim, q.dtype, samples)
            ms = median_ms(
                lambda few=few, splits=splits, config=config: few.probe(q, k, None, splits=splits, config=config)
            )
            row = {"shape": name, "what": f"probe {samples} samples, splits {splits}", "ms": ms, "dense_ms": dense_ms}
            found.append(row)
            print(line(row), flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    start = f"{row['shape']:18s} {row['what']:36s}"
    if "failed" in row:
        return f"{start} {row['tile_q']}x{row['tile_k']} w{row['num_warps']} s{row['num_stages']}: {row['failed'][:70]}"
    if "efficiency" not in row:
        return f"{start} {row['ms']:.4f} ms = {row['ms'] / row['dense_ms']:.2%} of dense"
    config = (
        f"{row['tile_q']}x{row['tile_k']} w{row['num_warps']} s{row['num_stages']} r{row['maxnreg']} c{row['chunk']}"
    )
    speed = f"{row['ms']:8.3f} ms {row['tflops']:6.0f} TFLOP/s kept, efficiency {row['efficiency']:.3f}"
    return f"{start} {config:26s} density {row['density']:.3f} {speed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write all results to this file")
    parser.add_argument("--only", choices=["check", "time"], help="leave out the other half")
    parser.add_argument("--no-sweep", action="store_true", help="time the default configurations alone")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_smoke.py needs a CUDA GPU")
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(result, flush=True)
    if args.only != "time":
        result["checks"] = check_all(large=True)
        result["graph"] = check_graph_capture()
        save(args.json, result)
    if args.only != "check":
        result["times"] = []
        sweep = not args.no_sweep
        for name, heads, dim, t, swept in (
            ("random 32760", 12, 128, random_tables(32760, 0.36), sweep),
            ("random 17776", 48, 64, random_tables(17776, 0.36), sweep),
            ("wan 480p", 12, 128, video_tables(VideoLayout((21, 30, 52)), 0.36), False),
            ("cogvideox", 48, 64, video_tables(VideoLayout((13, 30, 45), (226, 0)), 0.36), False),
        ):
            result["times"] += time_shape(name, heads, dim, t, swept)
            save(args.json, result)
        print("\nSummary", *(line(row) for row in result["times"]), sep="\n")
    if not all(check["good"] for check in result.get("checks", [])) or result.get("graph") is False:
        sys.exit("some checks failed")


def save(path: str | None, result: dict[str, Any]) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
