# SPDX-License-Identifier: Apache-2.0
"""The axis algebra claims nothing that is not so: its claims are checked against where elements really came from."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rainfusion_compile.passes.provenance.axes import digit, join, resolve, same, segments, take
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Source, find, size_of
from rainfusion_compile.passes.provenance.rules import dims_of, fresh_dims, set_dims
from rainfusion_compile.passes.provenance.rules_views import regroup
from rainfusion_compile.passes.provenance.trace import _Watch
from rainfusion_compile.passes.provenance.unify import unify


def axes(*sizes: int, role: bool = False) -> list[Axis]:
    return [
        Axis(size, sources=frozenset({(Source("x", 5), number)}), role=("time", "row", "col")[number] if role else None)
        for number, size in enumerate(sizes)
    ]


# --- every claim holds -----------------------------------------------------------------------------------------------


def index_of(axis: Axis, places: dict[Axis, Tensor]) -> Tensor | None:
    """The index that elements from these places have on an axis, if the axis says where it came from."""
    axis = find(axis)
    if axis in places:
        return places[axis]
    if axis.bound is not None:
        return index_in(axis.bound, places)
    if axis.settled:
        return None
    if axis.digit is not None:
        whole, stride = axis.digit
        index = index_of(whole, places)
        return None if index is None else index // stride % axis.size
    if axis.cut is not None:
        index = index_of(axis.cut.whole, places)
        return None if index is None else (index - axis.cut.start) // axis.cut.step
    return None


def index_in(dim: Dim, places: dict[Axis, Tensor]) -> Tensor | None:
    total: Tensor | None = torch.zeros((), dtype=torch.int64)
    for axis in dim:
        index = index_of(axis, places)
        total = None if total is None or index is None else total * axis.size + index
    return total


def check_claims(x: Tensor, base: list[Axis]) -> None:
    """`x` holds, for each element, its number in a tensor over the `base` axes."""
    sizes = [axis.size for axis in base]
    places = dict(zip(base, torch.unravel_index(x, sizes), strict=True))
    for number, dim in enumerate(dims_of(x)):
        assert size_of(dim) == x.shape[number]
        start = 0
        for part in segments(dim):
            stop = start + size_of(part)
            window = [slice(None)] * x.dim()
            window[number] = slice(start, stop)
            here = {axis: place[tuple(window)] for axis, place in places.items()}
            index = torch.arange(stop - start).reshape([-1 if at == number else 1 for at in range(x.dim())])
            for axis in reversed(resolve(part)):
                claimed, index = index % axis.size, index // axis.size
                really = None if axis.conflict or axis.permuted else index_of(axis, here)
                if really is not None:
                    assert torch.equal(claimed.expand_as(really), really), f"{axis} of {dim}"
            start = stop


def factorisations(n: int) -> list[tuple[int, ...]]:
    found = [(n,), (1, n), (n, 1)]
    for a in range(2, n):
        if n % a == 0:
            found += [(a, n // a), (a, 1, n // a)]
            found += [(a, b, n // a // b) for b in range(2, n // a) if n // a % b == 0]
    return found


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, list[int]]]]:
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4))
    names = [
        "view",
        "permute",
        "slice",
        "cat",
        "flip",
        "unsqueeze",
        "squeeze",
        "expand",
        "roll",
        "index",
        "pad",
        "teach",
    ]
    steps = st.tuples(st.sampled_from(names), st.lists(st.integers(0, 10_000), min_size=3, max_size=3))
    return sizes, draw(st.lists(steps, max_size=7))


def step(x: Tensor, name: str, seed: list[int]) -> Tensor:
    """One operator, on a dim and with arguments that the seed picks among those possible."""
    dim = seed[0] % x.dim()
    size = x.shape[dim]
    if name == "view":
        # merge a run of dims, then split it another way
        stop = dim + 1 + seed[1] % (x.dim() - dim)
        choices = factorisations(math.prod(x.shape[dim:stop]))
        return x.reshape(*x.shape[:dim], *choices[seed[2] % len(choices)], *x.shape[stop:])
    if name == "permute":
        orders = list(itertools.permutations(range(x.dim())))
        return x.permute(orders[seed[1] % len(orders)])
    if name == "slice":
        start = seed[1] % size
        return x[(slice(None),) * dim + (slice(start, start + 1 + seed[2] % (size - start), 1 + seed[0] // 7 % 2),)]
    if name == "cat":
        cut = seed[1] % (size + 1)
        first, second = x.narrow(dim, 0, cut), x.narrow(dim, cut, size - cut)
        return torch.cat([second, first] if seed[2] % 3 == 0 else [first, second], dim)
    if name == "flip":
        return x.flip(dim)
    if name == "roll":
        return x.roll(1, dim)
    if name == "index":
        return x.index_select(dim, torch.tensor([seed[1] % size] * (1 + seed[2] % 3)))
    if name == "unsqueeze":
        return x.unsqueeze(dim) if x.dim() < 6 else x
    if name == "squeeze":
        return x.squeeze(dim) if x.dim() > 1 else x
    if name == "expand":
        return x.expand(*x.shape[:dim], 3, *x.shape[dim + 1 :]) if size == 1 else x
    if name == "pad":
        # there and back: padding has no place in the base
        pad = [0, 0] * (x.dim() - dim - 1) + [seed[1] % 3, seed[2] % 3]
        return torch.nn.functional.pad(x, pad).narrow(dim, pad[-2], size)
    # a tensor of which nothing is known learns from a view that both have
    unknown = x.clone()
    set_dims(unknown, fresh_dims(x.shape))
    name = ("view", "slice", "permute", "cat")[seed[2] % 4]
    _ = step(x, name, seed) + step(unknown, name, seed)
    return unknown


@settings(max_examples=300, deadline=None)
@given(programs())
def test_claims_hold_after_any_views(program: tuple[list[int], list[tuple[str, list[int]]]]) -> None:
    sizes, steps = program
    base = axes(*sizes)
    x = torch.arange(math.prod(sizes)).reshape(sizes)
    set_dims(x, tuple((axis,) for axis in base))
    with _Watch():
        for name, seed in steps:
            x = step(x, name, seed)
    check_claims(x, base)


# --- views are invertible --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [(2, 105), (210,), (2, 3, 35), (2, 15, 7), (1, 2, 3, 5, 7), (6, 35), (2, 3, 7, 5), (5, 42)]
)
def test_a_view_and_back_is_the_identity(other: tuple[int, ...]) -> None:
    b, t, h, w = axes(2, 3, 5, 7)
    dims = ((b,), (t,), (h,), (w,))
    there = regroup(dims, other)
    assert regroup(there, (2, 3, 5, 7)) == dims


def test_splits_put_together_are_the_axis() -> None:
    (s,) = axes(60)
    dims = regroup(((s,),), (3, 4, 5))
    assert regroup(dims, (12, 5))[1] == dims[2]
    assert resolve(sum(dims, ())) == (s,)


def test_one_index_dims_stay_in_place() -> None:
    b, c, t, h, w = axes(1, 4, 1, 5, 7)
    (tokens,) = regroup(((b,), (c,), (t,), (h,), (w,)), (1, 4, 35))[2:]
    assert tokens == (t, h, w)
    merged = regroup(((b,), tokens, (c,)), (35, 4))
    assert regroup(merged, (1, 35, 4)) == ((b,), tokens, (c,))


def test_borders_that_do_not_fit_are_no_axes() -> None:
    t, h, w = axes(3, 45, 80)
    turned = regroup(((t,), (h,), (w,)), (3, 80, 45))
    assert all(axis.conflict for dim in turned[1:] for axis in dim)
    assert regroup(turned, (3, 45, 80)) == ((t,), (h,), (w,))


# --- slices and concatenations ---------------------------------------------------------------------------------------


def test_slices_put_together_are_the_axis() -> None:
    t, h, w = axes(3, 5, 7)
    first, rest = take((t, h, w), 0, 35), take((t, h, w), 35, 105)
    assert first is not None
    assert rest is not None
    assert join([first, rest]) == (t, h, w)
    assert len(segments(join([rest, first]))) == 2


def test_slices_on_borders_take_segments() -> None:
    t, h, w, s = axes(3, 5, 7, 9)
    both = join([(s,), (t, h, w)])
    assert take(both, 9, 114) == (t, h, w)
    assert take(both, 0, 9) == (s,)
    assert same(join([(s,), (t, h, w)]), both)
    assert not same(join([(t, h, w), (s,)]), both)


# --- learning --------------------------------------------------------------------------------------------------------


def test_an_unknown_axis_learns_its_product_before_and_after() -> None:
    t, h, w = axes(3, 5, 7, role=True)
    (s,) = axes(105)
    before = regroup(((s,), ()), (3, 35))
    unify((s,), (t, h, w))
    assert resolve((s,)) == (t, h, w)
    assert [resolve(dim) for dim in before] == [(t,), (h, w)]


def test_an_axis_learns_from_its_digits() -> None:
    t, h, w = axes(3, 5, 7, role=True)
    (s,) = axes(105)
    dims = regroup(((s,),), (3, 5, 7))
    for dim, axis in zip(dims, (t, h, w), strict=True):
        unify(dim, (axis,))
    assert resolve((s,)) == (t, h, w)


def test_an_axis_learns_from_its_slice() -> None:
    t, h, w = axes(3, 5, 7, role=True)
    s = Axis(114)
    video = take((s,), 9, 114)
    assert video is not None
    unify(video, (t, h, w))
    text, found = segments((s,))
    assert size_of(text) == 9
    assert found == (t, h, w)


def test_different_factorisations_are_in_conflict() -> None:
    one, two = axes(3, 45, 80, role=True), axes(3, 80, 45, role=True)
    unify(tuple(one), tuple(two))
    assert [axis.conflict for axis in one] == [False, True, True]


def test_different_roles_are_in_conflict() -> None:
    t, h, w = axes(3, 4, 4, role=True)
    unify((t, h, w), (t, w, h))
    assert [axis.conflict for axis in (t, h, w)] == [False, True, True]


def test_rotated_halves_leave_the_axis_alone() -> None:
    d = Axis(8)
    first, second = take((d,), 0, 4), take((d,), 4, 8)
    assert first is not None
    assert second is not None
    assert unify((d,), join([second, first])) == (d,)
    assert resolve((d,)) == (d,)


def test_a_concatenation_of_frames_is_one_video() -> None:
    """Two chunks of a video meet positions that were counted over the whole of it."""
    t1, h1, w1 = axes(2, 5, 7, role=True)
    t2, h2, w2 = axes(3, 5, 7, role=True)
    chunks = join([(t1, h1, w1), (t2, h2, w2)])
    assert len(segments(chunks)) == 2
    unify(chunks, tuple(axes(5, 5, 7)))
    (video,) = segments(chunks)
    assert [axis.size for axis in video] == [5, 5, 7]


def test_digits_of_digits() -> None:
    (s,) = axes(60)
    assert digit(digit(s, 5, 12), 4, 3) is digit(s, 20, 3)
