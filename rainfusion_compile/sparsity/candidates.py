# SPDX-License-Identifier: Apache-2.0
"""What heads choose from over a layout: each pattern at each sparsity of the ladder, as near to it as blocks allow."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from rainfusion_compile.sparsity.blocks import Blocks, Pattern
from rainfusion_compile.sparsity.patterns import BY_NAME, PatternName
from rainfusion_compile.sparsity.sampled_keys import (
    SampledRows,
    sampled_densities,
    with_samples,
    with_selection,
    without_samples,
)
from rainfusion_compile.sparsity.selected_blocks import SHARES, selections

MAX_CANDIDATES = 30  # bits of an int32, beside the sign and dense attention
_WINDOW = 0.5  # what part of the keys that some queries do not read windows take, where samples fill them up
_NEAR = 0.05  # in density: how much nearer the narrowest window must come to what is asked
_WIDE = 0.005  # of density, that twice as wide a stride has to save


class Candidate(NamedTuple):
    """A pattern with the radius and the stride that a sparsity comes to."""

    name: PatternName
    sparsity: float
    radius: tuple[Any, int]
    rows: SampledRows
    density: float


def most_candidates(sparsities: int, names: Sequence[str]) -> int:
    """How many candidates so many sparsities make at most."""
    return sparsities * sum(len(SHARES) if BY_NAME[name].selects else 1 for name in names)


def all_candidates(
    blocks: Blocks, ladder: tuple[float, ...], names: tuple[PatternName, ...], sampled: bool
) -> list[Candidate]:
    if all(frames == 1 for frames, _, _ in blocks.layout.grids):
        names = tuple(name for name in names if not BY_NAME[name].needs_frames) or names
    found: dict[tuple[PatternName, float, int], Candidate] = {}
    for pattern in (BY_NAME[name](blocks) for name in names):
        for sparsity, radius, rows in _ways(pattern, ladder, sampled):
            density = blocks.density(rows.mask, rows.beside)
            one = Candidate(pattern.name, sparsity, (radius, rows.phases), rows, density)
            found.setdefault((pattern.name, density, rows.phases), one)
    if not found:  # too few blocks to select from
        everything = without_samples(torch.ones_like(blocks.always))
        return [Candidate(names[0], min(ladder), (None, 0), everything, 1.0)]
    return sorted(found.values(), key=lambda one: one.density)


def _ways(pattern: Pattern, ladder: tuple[float, ...], sampled: bool) -> Iterator[tuple[float, Any, SampledRows]]:
    """What the sparsities come to, each once, by the first that comes to it: radius and rows."""
    blocks = pattern.blocks
    if pattern.selects:
        chosen = {one: sparsity for sparsity in reversed(ladder) for one in selections(blocks, 1.0 - sparsity)}
        for one, sparsity in chosen.items():
            yield sparsity, one.selected, with_selection(blocks, one)
        return
    reach, alone = _Reach(pattern), not sampled and not pattern.samples_only
    reaches: dict[tuple[Any, int], float] = {}
    for sparsity in ladder:
        target = 1.0 - sparsity
        reaches.setdefault((pattern.radius(target), 0) if alone else reach.nearest(target), sparsity)
    for (radius, stride), sparsity in reaches.items():
        window = pattern.cover(radius)
        rows = with_samples(blocks, window, pattern.block_order(), stride) if stride else without_samples(window)
        yield sparsity, radius, rows


class _Reach:
    """How far windows reach and how many keys a sampled one stands for, so that the density comes near to a target."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.always = pattern.blocks.density(pattern.blocks.always)
        self.densities = functools.cache(self._densities)

    def nearest(self, target: float) -> tuple[Any, int]:
        """Radius and stride (1: everything), for windows of half of what is not read anyway, or the narrowest.

        Strata that a window touches are read whole, so that on small grids the widest strides are not the sparsest; and
        where a narrower one is about as sparse, it errs less.
        """
        off, *half = self._with_window(_WINDOW, target)
        if off > _NEAR:  # else the narrowest cannot be so much nearer
            least, *narrowest = self._with_window(0.0, target)
            half = narrowest if least < off - _NEAR else half
        radius, stride = half
        return radius, stride

    def _with_window(self, share: float, target: float) -> tuple[float, Any, int]:
        """How far from the target, radius and stride, if windows take this share of what is not read anyway."""
        radius = self.pattern.radius(self.always + (target - self.always) * share, fine=False)  # strides do the rest
        found = self.densities(radius)
        stride = min(found, key=lambda one: abs(found[one] - target) + _WIDE * math.log2(one))
        return abs(found[stride] - target), radius, stride

    def _densities(self, radius: Any) -> dict[int, float]:
        return sampled_densities(self.pattern.blocks, self.pattern.cover(radius), self.pattern.block_order())
