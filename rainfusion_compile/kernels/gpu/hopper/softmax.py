# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Online softmax on Hopper GPUs that rescales seldom, and sums only where a warp has something to rescale."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from rainfusion_compile.kernels.gpu.hopper.loads import ROWS, THREADS

SLACK = gl.constexpr(8.0)  # powers of two that weights may grow over 1 before sums are rescaled


@gluon.jit
def softmax(s, top, total, unit, MASK_KIND: gl.constexpr):
    """A step of online softmax on scores times `unit`: weights, factor for earlier sums, new maximum, new sum.

    A maximum that grew by no more than SLACK stays: weights up to 2**SLACK lose nothing, and nothing is rescaled.
    """
    new_top = gl.max(s, 1) * unit
    new_top = gl.where(new_top - top > SLACK, new_top, top)  # so, as `top + SLACK` would be rounded
    shift = new_top
    if MASK_KIND != 0:
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)  # no visible key yet
    fade = gl.exp2(top - shift)
    p = gl.exp2(s * unit - shift[:, None])
    return p, fade, new_top, total * fade + gl.sum(p, 1)


# Assembly, as a warp can jump on its own and a program in Triton cannot.
ANY_FADES = gl.constexpr(
    "{ .reg .pred a, b; setp.neu.f32 a, $2, 0f3F800000; setp.neu.f32 b, $3, 0f3F800000; or.pred a, a, b;"
    " vote.sync.any.pred a, a, 0xffffffff; selp.b32 $0, 1, 0, a; mov.b32 $1, $0; }"
)


@gluon.constexpr_function
def _scale_if(n):
    """Assembly that multiplies n registers by n others if a warp has something to rescale."""
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    return f"{{ .reg .pred none; setp.eq.s32 none, ${3 * n}, 0; @none bra.uni DONE; {products} DONE: }}"


@gluon.constexpr_function
def _scale_if_operands(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n + ["r"] * n)


@gluon.jit
def _faded(acc, fade, fades, WIDTH: gl.constexpr):
    """An accumulator [64, WIDTH] times each row's factor, if any row of the warp has one that is not 1."""
    L: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    factor, needed = gl.convert_layout(fade, L)[:, None], gl.convert_layout(fades, L)[:, None]
    N: gl.constexpr = ROWS * WIDTH // THREADS  # registers of a thread
    return gl.inline_asm_elementwise(_scale_if(N), _scale_if_operands(N), [acc, factor, needed], gl.float32, True, N)


@gluon.jit
def rescaled(acc0, acc1, fade, D0: gl.constexpr, D1: gl.constexpr):
    """The accumulators, once all products are done, times each row's factor."""
    fades = gl.inline_asm_elementwise(ANY_FADES, "=r,=r,f,f", [fade], gl.int32, True, 2)
    acc0 = _faded(warpgroup_mma_wait(0, deps=[acc0]), fade, fades, D0)
    if D1 > 0:
        acc1 = _faded(warpgroup_mma_wait(0, deps=[acc1]), fade, fades, D1)
    return acc0, acc1
