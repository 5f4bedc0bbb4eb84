# SPDX-License-Identifier: Apache-2.0
"""Every kernel once, on small shapes, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py portable hopper
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py portable
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py hopper
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py control

memcheck finds nothing, nor does racecheck in the portable kernels. racecheck does not follow how `warp_specialize`
hands arguments over to its warps (shared memory, and a barrier that the two sides reach from different code): in the
Hopper kernel it reports that hand-over and no access to queries, keys or values, and it does so in the control too,
which only sums.
"""

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
        out = rainfusion_compile.attention(
            q, k[:, :2], v[:, :2], grid=GRID, text=TEXT, sparsity=0.6, min_recall=0.0, key_mask=mask
        )
        assert out.isfinite().all(), (head_dim, mask)


@gluon.jit
def _sum(x, y):
    offsets = gl.arange(0, 512, layout=gl.BlockedLayout([4], [32], [4], [0]))
    gl.store(y, gl.sum(gl.load(x + offsets), 0))


@gluon.jit
def control_kernel(x, y):
    x += gl.program_id(0) * 512
    y += gl.program_id(0) * 2
    gl.warp_specialize([(_sum, (x, y)), (_sum, (x, y + 1))], [4], [24])


def main() -> None:
    torch.manual_seed(0)
    for name in sys.argv[1:]:
        for head_dim in HEAD_DIMS.get(name, ()):
            attend(head_dim)
        if name == "control":
            x, y = torch.randn(4, 512, device="cuda"), torch.empty(4, 2, device="cuda")
            control_kernel[(4,)](x, y, num_warps=4)
            torch.testing.assert_close(y, x.sum(1, keepdim=True).expand(4, 2))
        torch.cuda.synchronize()
        print("ran", name)


if __name__ == "__main__":
    main()
