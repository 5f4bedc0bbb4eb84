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
from rainfusion_compile.kernels.hopper_attention import barrier

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
def _sum(x, y, rows, start):
    """Row sums of x, (rows, 512), less `start`."""
    offsets = gl.arange(0, 512, layout=gl.BlockedLayout([4], [32], [4], [0]))
    for row in range(rows):
        gl.store(y + row, gl.sum(gl.load(x + row * 512 + offsets), 0) - start)


@gluon.jit
def control_kernel(x, y, sizes):
    """Two groups of warps, which share nothing, each sum the same rows. What they are told is read and summed first."""
    rows = gl.load(sizes + gl.program_id(0))
    lane = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    start = gl.sum(gl.load(sizes + lane % 4), 0).to(gl.float32)
    y += gl.program_id(0) * 16
    barrier()  # without it Triton 3.6 overwrites `start` while slower warps still read it
    gl.warp_specialize([(_sum, (x, y, rows, start)), (_sum, (x, y + 8, rows, start))], [4], [224])


def main() -> None:
    torch.manual_seed(0)
    for name in sys.argv[1:]:
        for head_dim in HEAD_DIMS.get(name, ()):
            attend(head_dim)
        if name == "control":
            x, y = torch.randn(8, 512, device="cuda"), torch.zeros(4, 2, 8, device="cuda")
            sizes = torch.tensor([3, 4, 5, 2], device="cuda", dtype=torch.int32)
            control_kernel[(4,)](x, y, sizes, num_warps=4)
            for rows, got in zip(sizes.tolist(), y, strict=True):
                torch.testing.assert_close(got[:, :rows], (x.sum(1) - 32 * 14)[:rows].expand(2, rows))
                assert not got[:, rows:].any()
        torch.cuda.synchronize()
        print("ran", name)


if __name__ == "__main__":
    main()
