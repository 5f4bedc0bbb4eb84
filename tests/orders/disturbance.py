# SPDX-License-Identifier: Apache-2.0
"""A judge of claimed grids that knows nothing of axes: it disturbs the input and looks which tokens change.

The model runs in float64 with every attention replaced by its queries. Each frame, row, column and sample of each input
is disturbed in turn. The queries, keys and values that change tell which places of which input a token comes from. A
token that is claimed to stand at ``(t, h, w)`` must come from places that lie after those of ``t - 1``, ``h - 1`` and
``w - 1``, and nothing else than ``t`` may move its frame, ``h`` its row, ``w`` its column; and queries, keys and values
must come from the same places of the same samples of the same videos.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from models import capture
from torch import Tensor, fx, nn

from rainfusion_compile.passes.match.find import find_attentions
from rainfusion_compile.sparsity.layout import VideoLayout

PLACES = ("frame", "row", "col")
SMALL = 0.02
"""What moves a token by less than this share of the largest does not count: neighbours that convolutions mix in."""


@dataclass
class Source:
    """An input of a model. `dims` names and sizes the dims of a view of it; those named in `PLACES` are a video's."""

    dims: tuple[tuple[str, int], ...]

    @property
    def video(self) -> bool:
        return any(name in PLACES for name, _ in self.dims)


@dataclass
class Claim:
    """What the package says of one attention: a layout of its keys, and how many of them have no query; or a reason."""

    layout: VideoLayout | None
    left_out: tuple[int, int] = (0, 0)
    reason: str | None = None


def claims(graph: fx.GraphModule) -> list[Claim]:
    """What the package finds in a Dynamo graph: the only place here that asks it."""
    return [
        Claim(found.layout, found.partial_queries) if found.reason is None else Claim(None, reason=found.reason)
        for found in find_attentions(graph, min_tokens=1)
    ]


@dataclass
class Origins:
    """From where tokens come: for each input and named dim of it the first and the last index, ``[B, heads, tokens]``.

    Nowhere is 0 to -1.
    """

    first: dict[tuple[int, str], Tensor]
    last: dict[tuple[int, str], Tensor]

    def narrow(self, start: int, length: int) -> Origins:
        cut = [{key: item.narrow(-1, start, length) for key, item in part.items()} for part in (self.first, self.last)]
        return Origins(*cut)


@dataclass
class Verdict:
    """One attention, judged."""

    claim: Claim
    truth: VideoLayout | None
    """the layout that was measured, where it is one video in raster order and text"""
    wrong: str | None = None


@dataclass
class Recorder:
    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((query.detach(), key.detach(), value.detach()))
        return query.clone()


def operands(model: nn.Module, inputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of every attention of one forward."""
    recorder = Recorder()
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", recorder):
        model(*(item.clone() for item in inputs))
    return recorder.calls


def measure(model: nn.Module, inputs: Sequence[Tensor], sources: Sequence[Source]) -> list[list[Origins]]:
    """The origins of the queries, keys and values of every attention."""
    model = copy.deepcopy(model).double()
    inputs = [item.double() if item.is_floating_point() else item for item in inputs]
    plain = operands(model, inputs)
    noise = torch.Generator().manual_seed(1)
    origins = [[Origins({}, {}) for _ in range(3)] for _ in plain]
    moves: dict[tuple[int, str], list[list[Tensor]]] = {}
    for number, source in enumerate(sources):
        if not source.video:
            continue
        sizes = [size for _, size in source.dims]
        for dim, (name, size) in enumerate(source.dims):
            if not name:
                continue
            by_index = []
            for index in range(size):
                moved = inputs[number].clone()
                part = moved.view(sizes).select(dim, index)
                sign = torch.randint(2, part.shape, generator=noise) * 2 - 1  # nowhere small
                part += sign * (1 + torch.rand(part.shape, generator=noise, dtype=torch.float64))
                calls = operands(model, [*inputs[:number], moved, *inputs[number + 1 :]])
                pairs = zip(plain, calls, strict=True)
                by_index.append(
                    [(a - b).abs().amax(-1) for olds, news in pairs for a, b in zip(olds, news, strict=True)]
                )
            moves[number, name] = [list(item) for item in zip(*by_index, strict=True)]
    for call, three in enumerate(origins):
        for operand, found in enumerate(three):
            responses = {key: torch.stack(moved[3 * call + operand]) for key, moved in moves.items()}
            most = torch.stack([item.amax(0) for item in responses.values()]).amax(0)
            for key, response in responses.items():
                # against the most that this input does, if that is much at all
                own = torch.stack([item.amax(0) for (source, _), item in responses.items() if source == key[0]]).amax(0)
                strong = (response > SMALL * response.amax(0)) & (own > SMALL * most) & (own > 1e-9)
                places = torch.arange(len(strong))[:, None, None, None]
                found.first[key] = torch.where(strong, places, len(strong)).amin(0) * strong.any(0)
                found.last[key] = torch.where(strong, places, -1).amax(0)
    return origins


def _raster(origins: Origins, number: int, grid: tuple[int, int, int]) -> str | None:
    """Why tokens are not the raster of a grid over one sample of input `number`; None if they are."""
    for part in (origins.first, origins.last):
        if (part[number, "sample"].amax(-1) != part[number, "sample"].amin(-1)).any():
            return "tokens of the grid come from several samples"
    for place, name in enumerate(PLACES):
        if (number, name) not in origins.first:
            if grid[place] > 1:
                return f"the input has no {name}, the grid has {grid[place]}"
            continue
        first, last = (part[number, name].unflatten(-1, grid) for part in (origins.first, origins.last))
        if (last < first).any():
            return f"tokens of the grid come from no {name}"
        others = [dim - 3 for dim in range(3) if dim != place]
        if any((part.amax(others) != part.amin(others)).any() for part in (first, last)):
            return f"tokens of one {name} of the grid come from several {name}s"
        first, last = first.amax(others), last.amax(others)
        if not (last[..., :-1] < first[..., 1:]).all():
            return f"{name}s are not in order: {first[0, 0].tolist()}"
    return None


def _used(origins: Origins, sources: Sequence[Source]) -> list[int]:
    """Which videos the tokens come from."""
    return [
        number
        for number, source in enumerate(sources)
        if source.video and any((last >= 0).any() for (whose, _), last in origins.last.items() if whose == number)
    ]


def _equal(a: Origins, b: Origins) -> bool:
    def heads(x: Tensor, y: Tensor) -> Tensor:
        return x.repeat_interleave(y.shape[1] // x.shape[1], 1) if y.shape[1] > x.shape[1] else x

    pairs = [(a.first[key], b.first[key]) for key in a.first] + [(a.last[key], b.last[key]) for key in a.last]
    return all(torch.equal(heads(x, y), heads(y, x)) for x, y in pairs)


def _check(three: Sequence[Origins], claim: Claim, sources: Sequence[Source]) -> str | None:
    assert claim.layout is not None
    query, key, value = three
    before = claim.left_out[0]
    for span in claim.layout.spans:
        size = span.stop - span.start
        if span.stop > key.first[next(iter(key.first))].shape[-1]:
            return f"the layout has more tokens ({span.stop}) than there are keys"
        parts = query.narrow(span.start - before, size), key.narrow(span.start, size), value.narrow(span.start, size)
        for name, part in zip(("queries", "keys", "values"), parts, strict=True):
            used = _used(part, sources)
            if not used:
                return f"{name} of the grid come from no video"
            for number in used:
                why = _raster(part, number, span.grid)
                if why is not None:
                    return f"{name}: {why}"
        if not _equal(parts[0], parts[1]) or not _equal(parts[1], parts[2]):
            return "queries, keys and values are not the same tokens"
    return None


def truth(three: Sequence[Origins], sources: Sequence[Source]) -> VideoLayout | None:
    """The layout, if the tokens are text, one video in raster order, text; and alike in queries, keys and values."""
    key = three[1]
    used = _used(key, sources)
    tokens = key.first[next(iter(key.first))].shape[-1]
    if len(used) != 1 or any(len(item.first[next(iter(item.first))][0, 0]) != tokens for item in three):
        return None
    names = [name for name in PLACES if (used[0], name) in key.first]
    video = (key.last[used[0], names[0]][0, 0] >= 0).nonzero()[:, 0]
    start, stop = int(video[0]), int(video[-1]) + 1
    if len(video) != stop - start:
        return None
    grid = tuple(len(key.first[used[0], name][0, 0, start:stop].unique()) if name in names else 1 for name in PLACES)
    if grid[0] * grid[1] * grid[2] != len(video):
        return None
    layout = VideoLayout(grid, (start, tokens - stop))  # type: ignore[arg-type]
    return layout if _check(three, Claim(layout), sources) is None else None


def judge(
    model: Callable[..., Any], inputs: Sequence[Tensor], sources: Sequence[Source], graph: fx.GraphModule | None = None
) -> list[Verdict]:
    """What the package says of every attention of a model, and whether it is so."""
    assert isinstance(model, nn.Module)
    if graph is None:
        (graph,) = capture(model, *(item.clone() for item in inputs))
    said = claims(graph)
    measured = measure(model, inputs, sources)
    verdicts = []
    for claim, three in zip(said, measured, strict=True):
        verdict = Verdict(claim, truth(three, sources))
        if claim.layout is not None:
            verdict.wrong = _check(three, claim, sources)
            if verdict.wrong is None and verdict.truth is not None and verdict.truth != claim.layout:
                verdict.wrong = f"measured {verdict.truth}"
        verdicts.append(verdict)
    return verdicts
