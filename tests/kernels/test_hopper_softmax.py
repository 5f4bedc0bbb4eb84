# SPDX-License-Identifier: Apache-2.0
"""The assembly of the Hopper kernel's softmax, run instruction by instruction: exact whatever scores do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

from triton.experimental.gluon import language as gl

from rainfusion_compile.kernels.gpu.hopper import score_bound, softmax

LANES = 32
Values = dict[str, np.ndarray]


def _number(text: str, at: Values) -> np.ndarray:
    if text.startswith("0f"):
        return np.full(LANES, np.uint32(int(text[2:], 16)).view(np.float32))
    if text.startswith("0x"):
        return np.full(LANES, np.uint32(int(text, 16)).view(np.float32))
    return at[text] if text in at else np.full(LANES, np.float32(int(text)))


FLOAT = {
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": np.fmax,
    "neg": lambda a: -a,
    "ex2": np.exp2,
    "mov": lambda a: a,
}


def run(assembly: str, at: Values) -> Values:
    """The values of all names once a warp has run this, if their values were `at`; a pair of weights is two values."""
    lines = [line.strip() for line in assembly.strip("{} ").split(";")]
    labels: dict[str, int] = {}
    for i, line in enumerate(lines):
        while ":" in line:
            name, line = (part.strip() for part in line.split(":", 1))
            labels[name] = i
        lines[i] = line
    i, steps = 0, 0
    while i < len(lines):
        words = lines[i].replace(",", " ").split()
        i, steps = i + 1, steps + 1
        assert steps < 10_000, "it does not end"
        if not words or words[0].startswith(".reg"):
            continue
        if words[0].startswith("@"):
            taken = at[words[0].strip("@!")].astype(bool)
            assert taken.all() or not taken.any(), "a branch that not all lanes take"
            if taken[0] == words[0].startswith("@!"):
                continue
            words = words[1:]
        name, *kinds = words[0].split(".")
        if name == "bra":
            i = labels[words[1]]
            continue
        target, *operands = words[1:] or [""]
        if name == "shfl":
            at[target] = _number(operands[0], at)[np.arange(LANES) ^ int(operands[1])]
        elif name == "vote":
            at[target] = np.full(LANES, at[operands[0]].any())
        elif name == "setp":
            more = at[operands[2]] if "or" in kinds else np.zeros(LANES, bool)
            one, other = (_number(operand, at) for operand in operands[:2])
            at[target] = (one > other if "gt" in kinds else one < other) | more
        elif name == "cvt":
            at[target] = np.stack([_number(operands[1], at), _number(operands[0], at)])
        elif name == "trap":
            raise AssertionError("it stops the GPU")
        else:
            at[target] = FLOAT[name](*(_number(operand, at) for operand in operands))
    return at


class Softmax:
    """What the kernel does with a warp's 16 rows, tile by tile: `sums` and `values`, of one column, up to now."""

    def __init__(self, dtype: object, head_dim: int, columns: int) -> None:
        self.dtype, self.head_dim, self.n = dtype, head_dim, columns // 2
        lane, i = np.arange(LANES)[:, None], np.arange(self.n)[None]
        self.row, self.column = lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2
        self.state = np.where(np.arange(4) % 2 == 1, np.float32(softmax.LOWEST.value), np.float32(0))[None] + np.zeros(
            (LANES, 4), np.float32
        )
        self.values, self.first = np.zeros(16), True
        self.redone: list[bool] = []

    def step(self, scores: np.ndarray, values: np.ndarray, unit: float, more: float, *, bounded: bool = False) -> None:
        n = self.n
        pairs = n if self.dtype == gl.float32 else n // 2
        at = {f"${pairs + 2 * n + i}": scores[self.row[:, i], self.column[:, i]] for i in range(n)}
        at |= {f"${pairs + 3 * n + i}": self.state[:, i % 4] for i in range(n)}
        at |= {f"${pairs + 4 * n + i}": np.full(LANES, np.float32(unit)) for i in range(n)}
        at |= {f"${pairs + 5 * n + i}": np.full(LANES, np.float32(more)) for i in range(n)}
        with np.errstate(all="ignore"):
            at = run(softmax._step(n, self.dtype, self.head_dim, self.first, bounded), at)
        each = [at[f"${i}"] if pairs == n else at[f"${i // 2}"][i % 2] for i in range(n)]
        state = [at[f"${pairs + i}"] for i in range(n)]
        change = [at[f"${pairs + n + i}"] for i in range(n)]
        for found in (state, change):  # the same for all columns: the kernel takes those of the first
            assert all(np.array_equal(found[i], found[i % 4], equal_nan=True) for i in range(n))
        self.state = np.stack(state[:4], 1)
        redone = change[1] != 0
        assert redone.all() == redone.any() == (change[3] != 0).all()
        self.redone.append(bool(redone[0]))
        factors = np.stack([change[0], change[2]], 1)
        assert redone[0] or (factors == 1).all()
        if not self.first:
            self.values *= factors[np.arange(16) % 8 * 4, np.arange(16) // 8]
        for i, weights in enumerate(each):
            np.add.at(self.values, self.row[:, i], weights.astype(np.float64) * values[self.column[:, i]])
        self.first = False

    def result(self) -> np.ndarray:
        """Of rows that saw no key, 0."""
        sums = np.zeros(16)
        for i in (0, 1):
            np.add.at(sums, np.arange(LANES) // 4 + 8 * i, self.state[:, 2 * i].astype(np.float64))
        return self.values / np.where(sums == 0, 1, sums)


def exact(tiles: list[np.ndarray], values: list[np.ndarray], unit: float, more: list[float]) -> np.ndarray:
    """The softmax of all scores times `unit`, of which all before a tile are raised by its `more`."""
    raised = [sum(more[i + 1 :]) for i in range(len(tiles))]
    scores = np.concatenate([tile.astype(np.float64) * unit + by for tile, by in zip(tiles, raised, strict=True)], 1)
    top = scores.max(1, keepdims=True)
    weights = np.exp2(scores - np.where(np.isinf(top), 0, top))
    sums = weights.sum(1)
    return (weights @ np.concatenate(values)) / np.where(sums == 0, 1, sums)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    growth=st.sampled_from([0.0, 3.0, 12.0, 100.0, 3e4]),
    hidden=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    kind=st.sampled_from([(gl.bfloat16, 96), (gl.float16, 96), (gl.bfloat16, 128), (gl.float32, 64)]),
    unit=st.sampled_from([1.0, 0.1275, 1e-30]),
)
def test_it_is_the_softmax_of_all_scores(
    seed: int, growth: float, hidden: float, kind: tuple[object, int], unit: float
) -> None:
    rng, warp = np.random.default_rng(seed), Softmax(*kind, 16)
    tiles, values, more = [], [], []
    for number in range(6):
        level = rng.choice([-1, 0, 1], 16)[:, None] * growth * number
        scores = (rng.standard_normal((16, 16)) * rng.choice([0.1, 3.0]) + level) / max(unit, 1e-3)
        tiles.append(np.where(rng.random((16, 16)) < hidden, -np.inf, scores).astype(np.float32))
        values.append(rng.standard_normal(16))
        more.append(float(rng.choice([0.0, 0.0, 3.17])) if number else 0.0)
        warp.step(tiles[-1], values[-1], unit, more[-1])
    want = exact(tiles, values, float(np.float32(unit)), more)
    np.testing.assert_allclose(warp.result(), want, atol=2e-3 if growth > 1e3 else 2e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    growth=st.sampled_from([0.0, 0.3, 1.0]),
    hidden=st.sampled_from([0.0, 0.3, 0.95]),
    kind=st.sampled_from([(gl.bfloat16, 64), (gl.bfloat16, 96), (gl.float16, 64), (gl.float16, 96)]),
)
def test_it_is_so_without_a_look_at_weights_up_to_the_bound(
    seed: int, growth: float, hidden: float, kind: tuple[object, int]
) -> None:
    """Scores that rise, or fall, by as much as `score_bound` allows above the first tile's."""
    rng, warp, most = np.random.default_rng(seed), Softmax(*kind, 16), score_bound.most(kind[0])
    tiles, values, more = [], [], []
    for number in range(6):
        level = rng.choice([-1, 0, 1], 16)[:, None] * growth * most * min(number, 1)
        scores = rng.uniform(-2, 0, (16, 16)) + level
        hides = rng.random((16, 16)) < (hidden if number else 0)
        tiles.append(np.where(hides, -np.inf, scores).astype(np.float32))
        values.append(rng.standard_normal(16))
        more.append(float(rng.choice([0.0, 0.0, 3.17])) if number else 0.0)
        reference = warp.state[:, [1, 3]] if number else None
        warp.step(tiles[-1], values[-1], 1.0, more[-1], bounded=number > 0)
        assert number == 0 or np.array_equal(warp.state[:, [1, 3]], reference + np.float32(more[-1]))
    assert warp.redone == [True] + [False] * 5
    np.testing.assert_allclose(warp.result(), exact(tiles, values, 1.0, more), atol=2e-5)


@pytest.mark.parametrize("dtype", [gl.bfloat16, gl.float16])
def test_weights_at_the_bound_are_in_range_and_beyond_it_need_not_be(dtype: object) -> None:
    largest = np.exp2(score_bound.most(dtype) + 0.5)  # half a bit for what rounding does to lengths and scores
    assert largest < (65504 if dtype == gl.float16 else 2.0**66)
    keys, value = 2**20, 2.0**40  # of far more keys, and of values far beyond those of any model
    assert largest * keys * (65504.0 if dtype == gl.float16 else value) < np.finfo(np.float32).max


@pytest.mark.parametrize("dtype", [gl.bfloat16, gl.float16, gl.float32])
def test_maxima_are_looked_for_where_scores_have_grown(dtype: object) -> None:
    """At first, where a weight could become too large for its type, and nowhere else."""
    warp, rng = Softmax(dtype, 64, 16), np.random.default_rng(0)
    for level in (0.0, 0.0, -50.0, 9.0, 9.0, 200.0, 200.0, -1e30):
        warp.step((rng.uniform(-1, 0, (16, 16)) + level).astype(np.float32), rng.standard_normal(16), 1.0, 0.0)
    assert warp.redone == [True, False, False, True, False, True, False, False]


def test_the_score_of_one_lane_is_enough() -> None:
    warp = Softmax(gl.bfloat16, 128, 16)
    scores, values = np.zeros((16, 16), np.float32), np.arange(16.0)
    warp.step(scores, values, 1.0, 0.0)
    scores[11, 6] = 500.0
    warp.step(scores, values, 1.0, 0.0)
    assert warp.redone == [True, True]
    assert warp.result()[11] == 6.0
    np.testing.assert_allclose(np.delete(warp.result(), 11), 7.5)


def test_what_is_not_a_number_stays_so() -> None:
    warp = Softmax(gl.bfloat16, 64, 16)
    scores = np.zeros((16, 16), np.float32)
    scores[3, 0], scores[5, 1] = np.nan, np.inf
    for _ in range(2):
        warp.step(scores, np.ones(16), 1.0, 0.0)
    wrong = np.isnan(warp.result())
    assert wrong.tolist() == [row in (3, 5) for row in range(16)]
