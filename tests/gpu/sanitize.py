# SPDX-License-Identifier: Apache-2.0
"""Every kernel once, on small shapes, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py portable hopper
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py portable hopper

Neither should find anything. compute-sanitizer must be 2026.1 or later (`pip install nvidia-cuda-sanitizer-api` brings
it, under nvidia/cu13/): racecheck of 2025.3 reports a word that Triton's own `warp_specialize` guards with a barrier.
"""

import sys

import torch

import rainfusion_compile

GRID, TEXT = (3, 9, 11), (0, 7)
TOKENS = 3 * 9 * 11 + 7
HEAD_DIMS = {"hopper": (128, 96, 72, 64), "portable": (32, 40, 160, 256)}


def attend(head_dim: int) -> None:
    hidden = torch.zeros(1, 1, TOKENS, device="cuda", dtype=torch.bool)
    hidden[..., -5:] = True
    bias = torch.zeros_like(hidden, dtype=torch.bfloat16).masked_fill(hidden, -3)
    for mask in (None, ~hidden, bias):
        wide = torch.randn(3, 1, TOKENS, 4, head_dim, device="cuda", dtype=torch.bfloat16)
        q, k, v = wide.permute(0, 1, 3, 2, 4)
        for patterns in (("spatial",), ("temporal", "textural")):  # keys in runs, keys gathered
            out = rainfusion_compile.attention(
                q,
                k[:, :2],
                v[:, :2],
                grid=GRID,
                text=TEXT,
                sparsity=0.6,
                min_recall=0.0,
                patterns=patterns,
                key_mask=mask,
            )
            assert out.isfinite().all(), (head_dim, mask, patterns)


def main() -> None:
    torch.manual_seed(0)
    for name in sys.argv[1:]:
        for head_dim in HEAD_DIMS[name]:
            attend(head_dim)
        torch.cuda.synchronize()
        print("ran", name)


if __name__ == "__main__":
    main()
