# SPDX-License-Identifier: Apache-2.0
"""Find the fastest launch configurations on this machine's GPU, and keep them.

Worth half a minute on a GPU that the defaults were not measured on (they were on H100 and H200).
"""

from __future__ import annotations

import argparse
from functools import partial

from rainfusion_compile.commands.arguments import WrongArgument

GRID, TEXT = (13, 30, 45), (226, 0)
HEADS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")


def run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise WrongArgument("no GPU here: there is nothing to tune")
    from rainfusion_compile.kernels.gpu.attention import block_sparse_attention
    from rainfusion_compile.kernels.gpu.configs import LaunchConfig
    from rainfusion_compile.kernels.gpu.tuning import cache_file, median_ms, tune
    from rainfusion_compile.options import Options
    from rainfusion_compile.sparsity.layout import VideoLayout

    layout = VideoLayout(GRID, TEXT)
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, args.dtype)
    t = Options(sparsity=0.64).tables(layout, device)
    choice = (torch.arange(HEADS, device=device, dtype=torch.int32) % len(t.patterns))[None]
    for head_dim in args.head_dim:
        q, k, v = torch.randn(3, 1, layout.tokens, HEADS, head_dim, device=device, dtype=dtype).transpose(2, 3)
        attend = partial(block_sparse_attention, q, k, v, choice, None, t.attention_arguments, head_dim**-0.5)

        def time_ms(config: LaunchConfig) -> float:
            return median_ms(partial(attend, config=config))  # noqa: B023

        times = tune(head_dim, dtype, device, time_ms)
        for config, ms in sorted(times.items(), key=lambda item: item[1]):
            print(f"head_dim {head_dim}: {ms:8.3f} ms  {config}")
    print(f"kept in {cache_file()}")
    return 0
