# SPDX-License-Identifier: Apache-2.0
"""Every kernel once, on small shapes, for compute-sanitizer:

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py
"""

import torch

import rainfusion_compile

GRID, TEXT = (3, 9, 11), (0, 7)
TOKENS = 3 * 9 * 11 + 7


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.zeros(1, 1, TOKENS, device="cuda", dtype=torch.bool)
    hidden[..., -5:] = True
    masks = {
        "none": None,
        "bool": ~hidden,
        "bias": torch.zeros_like(hidden, dtype=torch.bfloat16).masked_fill(hidden, -3),
    }
    for head_dim, offset in ((128, 0), (96, 0), (72, 0), (64, 0), (32, 0), (64, 2)):  # offset: rows not aligned
        for name, mask in masks.items():
            wide = torch.randn(3, 1, TOKENS, 4, head_dim + offset, device="cuda", dtype=torch.bfloat16)
            q, k, v = wide[..., offset:].permute(0, 1, 3, 2, 4)
            out = rainfusion_compile.attention(
                q, k[:, :2], v[:, :2], grid=GRID, text=TEXT, sparsity=0.6, min_recall=0.0, key_mask=mask
            )
            assert out.isfinite().all(), (head_dim, name)
    torch.cuda.synchronize()
    print("ran every kernel")


if __name__ == "__main__":
    main()
