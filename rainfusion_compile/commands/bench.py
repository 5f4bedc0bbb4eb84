# SPDX-License-Identifier: Apache-2.0
"""One attention call on this machine: dense by the fastest kernel that is here, and sparse at a few sparsities.

Random queries, keys and values, medians. Heads take the spatial, temporal and textural pattern in turn, and the probe
that chooses patterns (the ARM) runs in every sparse call. On a GPU the dense kernels are those of PyTorch, and
FlashAttention-3 where it can be imported. Time says nothing of quality: the benchmarks in the repository do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rainfusion_compile.commands.arguments import WrongArgument, checked, grid, positive, progress, text_around

if TYPE_CHECKING:
    from torch import Tensor

    from rainfusion_compile.sparsity.layout import VideoLayout

REPEATS = 5  # of a call on a CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape = parser.add_argument_group("the call, by default that of a small video")
    shape.add_argument("--grid", type=grid, default=(13, 30, 45), metavar="TxHxW", help="tokens of the video")
    shape.add_argument("--text", type=text_around, default=(0, 0), metavar="BEFORE+AFTER", help="tokens of the text")
    shape.add_argument("--heads", type=positive, default=6)
    shape.add_argument("--head-dim", type=positive, default=128)
    shape.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.64, 0.8], metavar="SHARE")
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--json", action="store_true", help="print an object instead of a table")


def run(args: argparse.Namespace) -> int:
    import torch

    from rainfusion_compile.options import Options
    from rainfusion_compile.sparsity.layout import VideoLayout
    from rainfusion_compile.sparsity.patterns import PATTERNS

    device = checked_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    layout = VideoLayout(args.grid, args.text)
    ladder = [checked(partial(Options, sparsity=sparsity, patterns=PATTERNS)) for sparsity in args.sparsity]
    shape = (3, 1, layout.tokens, args.heads, args.head_dim)  # as models lay them out
    q, k, v = torch.randn(shape, device=device, dtype=getattr(torch, args.dtype)).transpose(2, 3)
    checked(partial(import_module("rainfusion_compile.kernels.checks").check_operands, q, k, v, None))
    with torch.no_grad():
        dense = dense_times(q, k, v)
        rows = [sparse_row(options, layout, q, k, v, min(dense.values())) for options in ladder]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    facts = {"device": name, "torch": torch.__version__, "grid": args.grid, "text": args.text, "tokens": layout.tokens}
    facts |= {"heads": args.heads, "head_dim": args.head_dim, "dtype": args.dtype, "dense_ms": dense}
    if args.json:
        print(json.dumps({**facts, "rows": rows}, indent=2))
    else:
        print("\n".join(table_of_times(facts, rows)))
    return 0


def checked_device(name: str) -> Any:
    """The device of a name. Raises WrongArgument if it is not here."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WrongArgument(f"--device must be one that is here, such as cpu; got {name!r}: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise WrongArgument(f"--device must be cpu or cuda; got {name!r}")
    return device


def dense_kernels(q: Tensor) -> dict[str, Callable[..., Any]]:
    """Dense attention over ``[B, H, S, D]`` by name."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if q.device.type == "cpu":
        return {"SDPA": F.scaled_dot_product_attention}

    def by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v)

    names = {
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "Flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    kernels: dict[str, Callable[..., Any]] = {name: partial(by, backend) for name, backend in names.items()}
    try:
        flash_3 = import_module("flash_attn_interface").flash_attn_func
        kernels["FA3"] = lambda q, k, v: flash_3(*(x.transpose(1, 2) for x in (q, k, v)))
    except (ImportError, OSError, AttributeError):
        progress("FlashAttention-3 is not here: it is the fastest on Hopper, so gains over it are smaller")
    return kernels


def dense_times(q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Milliseconds of each dense kernel that takes these tensors."""
    times = {}
    for name, kernel in dense_kernels(q).items():
        progress(f"dense, {name}")
        try:
            times[name] = _median_ms(q, partial(kernel, q, k, v))
        except RuntimeError as error:  # it does not take them
            progress(f"  {name} does not run: {str(error).splitlines()[0]:.150}")
    if not times:
        raise WrongArgument(
            f"no dense kernel takes {list(q.shape)} in {q.dtype} here: there is nothing to compare with"
        )
    return times


def sparse_row(options: Any, layout: VideoLayout, q: Tensor, k: Tensor, v: Tensor, dense_ms: float) -> dict[str, Any]:
    """What one sparsity comes to: density, milliseconds with the probe, speed-up, the probe's share of dense time."""
    import torch

    from rainfusion_compile.kernels import operators

    (sparsity,) = options.ladder
    progress(f"sparsity {sparsity:g}: tables")
    tables, scale = options.tables(layout, q.device), q.shape[-1] ** -0.5
    choice = (torch.arange(q.shape[1], device=q.device, dtype=torch.int32) % len(tables.patterns))[None]
    rule = options.rule(q.device)

    def probe() -> None:
        operators.arm_probe(q, k, v, None, *tables.probe_arguments, scale, *rule)

    def whole() -> None:
        probe()
        operators.block_sparse_attention(q, k, v, choice, None, *tables.attention_arguments, scale)

    progress(f"sparsity {sparsity:g}: attention")
    sparse_ms, probe_ms = _median_ms(q, whole), _median_ms(q, probe)
    density = statistics.mean(tables.densities[number] for number in choice[0].tolist())
    row = {"sparsity": sparsity, "density": density, "sparse_ms": sparse_ms, "probe_ms": probe_ms}
    return row | {"speedup": dense_ms / sparse_ms, "probe_share_of_dense": probe_ms / dense_ms}


def _median_ms(q: Tensor, call: Callable[[], object]) -> float:
    """The median time of a call on the device of `q`, in ms, after one that compiles."""
    call()
    if q.is_cuda:
        return float(import_module("rainfusion_compile.kernels.gpu.tuning").median_ms(call))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def table_of_times(facts: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    size = "x".join(map(str, facts["grid"])) + f" and text {'+'.join(map(str, facts['text']))}"
    heads = f"{facts['heads']} heads of {facts['head_dim']}, {facts['dtype']}"
    dense = ", ".join(f"{name} {ms:.4g} ms" for name, ms in facts["dense_ms"].items())
    best = min(facts["dense_ms"], key=facts["dense_ms"].__getitem__)
    result = [f"{facts['device']}, torch {facts['torch']}: {size}, {facts['tokens']} tokens, {heads}"]
    result += [f"dense: {dense}", f"sparsity  density  time, ms  over {best:9}  ARM / dense"]
    for row in rows:
        result.append(
            f"{row['sparsity']:8g}  {row['density']:7.3f}  {row['sparse_ms']:8.4g}  {row['speedup']:13.2f}x"
            f"  {row['probe_share_of_dense']:11.1%}"
        )
    return result
