# SPDX-License-Identifier: Apache-2.0
"""``python -m rainfusion_compile.tune``: find the fastest launch configurations on this machine's GPU, and keep them.

Worth half a minute on a GPU that the defaults were not measured on (they were on H100 and H200).
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from rainfusion_compile.kernels.gpu.attention import block_sparse_attention
from rainfusion_compile.kernels.gpu.configs import LaunchConfig
from rainfusion_compile.kernels.gpu.tuning import cache_file, median_ms, tune
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.layout import VideoLayout

LAYOUT = VideoLayout((13, 30, 45), (226, 0))
HEADS = 24


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rainfusion_compile.tune", description=__doc__)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here: there is nothing to tune")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, args.dtype)
    t = Options(sparsity=0.64).tables(LAYOUT, device)
    choice = (torch.arange(HEADS, device=device, dtype=torch.int32) % len(t.patterns))[None]
    for head_dim in args.head_dim:
        q, k, v = torch.randn(3, 1, LAYOUT.tokens, HEADS, head_dim, device=device, dtype=dtype).transpose(2, 3)
        attend = partial(block_sparse_attention, q, k, v, choice, None, t.attention_arguments, head_dim**-0.5)

        def time_ms(config: LaunchConfig) -> float:
            return median_ms(partial(attend, config=config))  # noqa: B023

        times = tune(head_dim, dtype, device, time_ms)
        for config, ms in sorted(times.items(), key=lambda item: item[1]):
            print(f"head_dim {head_dim}: {ms:8.3f} ms  {config}")
    print(f"kept in {cache_file()}")


if __name__ == "__main__":
    main()
