# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Online softmax on Hopper GPUs that looks for a maximum only where weights have grown large.

Weights of a row are relative to a reference, its largest score when that was last looked for. A tile's weights are
computed and summed first; only if a sum shows that they have grown beyond LIMIT is the maximum of its scores looked
for, and all of it done again. So what comes out is exact for any scores, and a tile whose scores are no larger than
those before costs no maximum, no wait for it, and no rescaling.

Where the lengths of queries and keys tell that no score can be so far above a row's first reference (`score_bound`),
not even sums are looked at.

In assembly, as a warp can jump on its own and a program in Triton cannot. A thread has the scores of two rows, in pairs
of columns: (row, row, row + 8, row + 8) again and again.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rainfusion_compile.kernels.gpu.hopper.loads import ROWS, THREADS

LIMIT = "0f44800000"  # 1024, of a thread's sum; what float16 holds is 64 times as large
LOWEST = gl.constexpr(-3.4028234e38)  # the reference of a row that has seen no key: any score is beyond LIMIT
STATE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))  # of [64, 8]: a pair for a thread's row


@gluon.constexpr_function
def _exponentials(n, dtype, chains, scores, unit):
    """Weights of n scores, from operand `scores` on, and what each row's add up to: a0 and a1."""
    kind = "f16x2" if dtype == gl.float16 else "bf16x2"
    lines = []
    for pair in range(n // 2):
        row = pair % 2
        for i, x in ((2 * pair, "x"), (2 * pair + 1, "y")):
            lines.append(f"fma.rn.ftz.f32 {x}, ${scores + i}, ${unit}, n{row}; ex2.approx.ftz.f32 {x}, {x};")
            total = ("a", "b")[i % chains] + str(row)
            begins = pair < 2 and i % 2 < chains
            lines.append(f"mov.f32 {total}, {x};" if begins else f"add.ftz.f32 {total}, {total}, {x};")
        if dtype == gl.float32:
            lines.append(f"mov.f32 ${2 * pair}, x; mov.f32 ${2 * pair + 1}, y;")
        else:
            lines.append(f"cvt.rn.{kind}.f32 ${pair}, y, x;")
    lines += [f"add.ftz.f32 a{row}, a{row}, b{row};" for row in (0, 1) if chains == 2]
    return " ".join(lines)


@gluon.constexpr_function
def _operands(n, dtype):
    """The first operand of the state that a step leaves, its change, scores, the state before, unit, more."""
    pairs = n if dtype == gl.float32 else n // 2
    return tuple(pairs + i * n for i in range(6))


@gluon.constexpr_function
def _begin(before, more):
    """Assembly: each row's reference now, t, and its negative, n."""
    lines = "{ .reg .f32 x, y, limit, a0, a1, b0, b1, n0, n1, t0, t1, f0, f1; .reg .pred p; .reg .b32 redone; "
    rows = (0, 1)
    lines += " ".join(f"add.ftz.f32 t{i}, ${before + 2 * i + 1}, ${more}; neg.ftz.f32 n{i}, t{i};" for i in rows)
    return lines + " " + " ".join(f"mov.f32 f{i}, 0f3F800000;" for i in rows)


@gluon.constexpr_function
def _end(n, state, change, before):
    """Assembly: the sums with those before, times f, and what the step leaves."""
    lines = [f"fma.rn.ftz.f32 a{row}, ${before + 2 * row}, f{row}, a{row};" for row in (0, 1)]
    for i in range(n):
        row, odd = i // 2 % 2, i % 2
        lines.append(f"mov.f32 ${state + i}, {'t' if odd else 'a'}{row};")
        lines.append(f"mov.b32 ${change + i}, redone;" if odd else f"mov.f32 ${change + i}, f{row};")
    return " ".join(lines) + " }"


@gluon.constexpr_function
def _weigh(n, dtype, chains, first):
    """Assembly of a step. Operands, n of each: weights, state, change; scores, state before, unit, more."""
    state, change, scores, before, unit, more = _operands(n, dtype)
    lines = [
        _begin(before, more),
        f"mov.f32 limit, {LIMIT}; mov.b32 redone, 0;",
        "bra.uni MAXIMA;" if first else "",
        "WEIGHTS:",
        _exponentials(n, dtype, chains, scores, unit),
        "setp.gt.ftz.f32 p, a0, limit; setp.gt.ftz.or.f32 p, a1, limit, p;",
        "vote.sync.any.pred p, p, 0xffffffff; @!p bra.uni DONE;",
        "MAXIMA: mov.b32 redone, 0x3F800000; mov.f32 limit, 0f7F800000;",  # once: no sum is larger than infinity
    ]
    for row in (0, 1):
        first_score, *others = (f"${scores + i}" for i in range(n) if i // 2 % 2 == row)
        lines.append(f"mov.f32 x, {first_score};")
        lines += [f"max.ftz.f32 x, x, {score};" for score in others]
        for lane in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 y, x, {lane}, 31, 0xffffffff; max.ftz.f32 x, x, y;")
        lines.append(f"mul.ftz.f32 x, x, ${unit}; max.ftz.f32 x, x, t{row}; sub.ftz.f32 f{row}, t{row}, x;")
        lines.append(f"ex2.approx.ftz.f32 f{row}, f{row}; mov.f32 t{row}, x; neg.ftz.f32 n{row}, x;")
    lines += ["bra.uni WEIGHTS; DONE:", _end(n, state, change, before)]
    return " ".join(lines)


@gluon.constexpr_function
def _weigh_bounded(n, dtype, chains, barrier):
    """The same for scores that are known not to grow too large. barrier: a branch, never taken, that keeps ptxas from
    what it does at some head dims without one: products wait for each other, or the softmax for products."""
    state, change, scores, before, unit, more = _operands(n, dtype)
    lines = [_begin(before, more), "mov.b32 redone, 0;", _exponentials(n, dtype, chains, scores, unit)]
    if barrier:
        lines.append(f"setp.lt.ftz.f32 p, ${unit}, 0f00000000; @!p bra.uni DONE; trap; DONE:")
    return " ".join([*lines, _end(n, state, change, before)])


@gluon.constexpr_function
def _step(n, dtype, head_dim, first, bounded):
    chains = 2 if head_dim > 96 else 1  # in how many parts sums are made
    return _weigh_bounded(n, dtype, chains, head_dim > 64) if bounded else _weigh(n, dtype, chains, first)


@gluon.constexpr_function
def _weigh_operands(n, dtype):
    weights = ["=f"] * n if dtype == gl.float32 else ["=r"] * (n // 2)
    return ",".join(weights + ["=f"] * (2 * n) + ["f"] * (4 * n))


@gluon.constexpr_function
def _weigh_types(dtype):
    return (dtype, gl.float32, gl.float32)


@gluon.constexpr_function
def _columns(width):
    """The layout of a warp group's [64, width] product as [64, width / 8, 8]."""
    tiles = [[0, 1 << i, 0] for i in range((width // 8).bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    shape = [ROWS.value, width // 8, 8]
    return gl.DistributedLinearLayout([[0, 0, 1], [8, 0, 0], *tiles], lanes, [[16, 0, 0], [32, 0, 0]], [], shape)


@gluon.jit
def _spread(x, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """A thread's pair for each of its rows, [64, 8], for every pair of columns: [64, WIDTH]. No instruction."""
    COLUMNS: gl.constexpr = _columns(WIDTH)
    x = gl.convert_layout(x, gl.SliceLayout(1, COLUMNS), assert_trivial=True).expand_dims(1)
    x, _ = gl.broadcast(x, gl.full([ROWS, WIDTH // 8, 8], 0.0, gl.float32, layout=COLUMNS))
    return gl.convert_layout(x.reshape([ROWS, WIDTH]), LAYOUT, assert_trivial=True)


@gluon.jit
def _left(one, other):
    return one


@gluon.jit
def _gathered(x, WIDTH: gl.constexpr):
    """Its inverse."""
    COLUMNS: gl.constexpr = _columns(WIDTH)
    x = gl.convert_layout(x.reshape([ROWS, WIDTH // 8, 8]), COLUMNS, assert_trivial=True)
    return gl.convert_layout(gl.reduce(x, 1, _left), STATE, assert_trivial=True)


@gluon.jit
def _is_sum():
    """Which columns of a state are sums; the others are references."""
    return (gl.arange(0, 8, layout=gl.SliceLayout(0, STATE)) % 2 == 0)[None, :]


@gluon.jit
def no_keys():
    """The state of rows that have seen no key."""
    return gl.where(_is_sum(), 0.0, gl.full([ROWS, 8], LOWEST, gl.float32, layout=STATE))


@gluon.jit
def sums_of(state, LAYOUT: gl.constexpr):
    """What each row's weights add up to: [64]."""
    return gl.convert_layout(gl.sum(gl.where(_is_sum(), state, 0.0), 1), LAYOUT)


@gluon.jit
def weigh(
    s, state, unit, more, dtype: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr, HEAD_DIM: gl.constexpr,
    FIRST: gl.constexpr, BOUNDED: gl.constexpr,
):  # fmt: skip
    """A step of online softmax on scores [64, WIDTH] times `unit`, above 0: weights in this dtype, state, change.

    The state is, for each thread and row, a pair: the sum of its weights, and the reference, to which `more` is added
    before. A change is a pair: the factor for earlier sums, and not 0 if a row of the warp has one that is not 1.
    FIRST: nothing was summed before, so the maximum is looked for at once. BOUNDED: it is known that none need be.
    """
    N: gl.constexpr = WIDTH * ROWS // THREADS  # registers of a thread
    TYPES: gl.constexpr = _weigh_types(dtype)
    p, state, change = gl.inline_asm_elementwise(
        _step(N, dtype, HEAD_DIM, FIRST, BOUNDED), _weigh_operands(N, dtype),
        [s, _spread(state, WIDTH, LAYOUT), unit, more], TYPES, True, N,
    )  # fmt: skip
    return p, _gathered(state, WIDTH), _gathered(change, WIDTH)


@gluon.jit
def references_of(state, LAYOUT: gl.constexpr):
    """What each row's weights are relative to, in base-2 units: [64]."""
    return gl.convert_layout(gl.min(gl.where(_is_sum(), float("inf"), state), 1), LAYOUT)


@gluon.constexpr_function
def _scale_if(n):
    """Assembly that multiplies n registers by their rows' factors if a warp has something to rescale."""
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i // 2 * 2};" for i in range(n))
    return f"{{ .reg .pred none; setp.eq.f32 none, ${2 * n + 1}, 0f00000000; @none bra.uni DONE; {products} DONE: }}"


@gluon.constexpr_function
def _scale_if_operands(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def _faded(acc, change, WIDTH: gl.constexpr):
    """An accumulator [64, WIDTH] times each row's factor, if any row of the warp has one that is not 1."""
    LAYOUT: gl.constexpr = acc.type.layout
    N: gl.constexpr = ROWS * WIDTH // THREADS
    factors = _spread(change, WIDTH, LAYOUT)
    return gl.inline_asm_elementwise(_scale_if(N), _scale_if_operands(N), [acc, factors], gl.float32, True, N)


@gluon.jit
def rescaled(acc0, acc1, change, D0: gl.constexpr, D1: gl.constexpr):
    """The accumulators times each row's factor."""
    acc0 = _faded(acc0, change, D0)
    if D1 > 0:
        acc1 = _faded(acc1, change, D1)
    return acc0, acc1
