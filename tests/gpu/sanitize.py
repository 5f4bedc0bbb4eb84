# SPDX-License-Identifier: Apache-2.0
"""Every kernel once, on small shapes, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py portable hopper
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py portable
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py hopper
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py control

memcheck and the portable kernels under racecheck are clean. racecheck does not see how Triton's `warp_specialize` hands
arguments to its warps (a barrier that the two sides reach from different code): it reports that hand-over, and nothing
else, in the Hopper kernel as in the control, a kernel that does nothing but specialise.
"""

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import rainfusion_compile

GRID, TEXT = (3, 9, 11), (0, 7)
TOKENS = 3 * 9 * 11 + 7
# head_dim, and by how many elements rows are out of step with 16 bytes, which the Hopper kernel leaves to the other.
CASES = {"hopper": ((128, 0), (96, 0), (72, 0), (64, 0)), "portable": ((128, 2), (96, 2), (72, 2), (64, 2), (32, 0))}


def attend(head_dim: int, offset: int) -> None:
    hidden = torch.zeros(1, 1, TOKENS, device="cuda", dtype=torch.bool)
    hidden[..., -5:] = True
    bias = torch.zeros_like(hidden, dtype=torch.bfloat16).masked_fill(hidden, -3)
    for mask in (None, ~hidden, bias):
        wide = torch.randn(3, 1, TOKENS, 4, head_dim + offset, device="cuda", dtype=torch.bfloat16)
        q, k, v = wide[..., offset:].permute(0, 1, 3, 2, 4)
        out = rainfusion_compile.attention(
            q, k[:, :2], v[:, :2], grid=GRID, text=TEXT, sparsity=0.6, min_recall=0.0, key_mask=mask
        )
        assert out.isfinite().all(), (head_dim, mask)


@gluon.jit
def _add_one(x):
    offsets = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(x + offsets, gl.load(x + offsets) + 1)


@gluon.jit
def control_kernel(x, y):
    gl.warp_specialize([(_add_one, (x,)), (_add_one, (y,))], [4], [24])


def main() -> None:
    torch.manual_seed(0)
    for name in sys.argv[1:]:
        for head_dim, offset in CASES.get(name, ()):
            attend(head_dim, offset)
        if name == "control":
            x = torch.zeros(2, 128, device="cuda")
            control_kernel[(4,)](x[0], x[1], num_warps=4)
        torch.cuda.synchronize()
        print("ran", name)


if __name__ == "__main__":
    main()
