# SPDX-License-Identifier: Apache-2.0
"""Graphs with symbolic sizes: one compiled graph for all resolutions.

The sparse attentions of such a graph call `video_attention`, which takes the layout of its tokens at run time. All read
their rows of one more input of the graph. The rows are found by the same analysis as ever, on the graph as Dynamo made
it, with the numbers that the inputs of this call have: no layout is ever taken from another call, or computed from a
number of tokens. An attention that is not provably sparse at these sizes gets the row without video and is dense.

What is part of the compiled graph must hold at all sizes: the scale, what the mask hides, the shape of the result.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource

from rainfusion_compile.kernels import operators  # noqa: F401  (registers torch.ops.rainfusion)
from rainfusion_compile.options import Options
from rainfusion_compile.passes.graph.symbolic_sizes import LARGE, SMALL, InputSizes, Sizes, at_sizes, fixed
from rainfusion_compile.passes.match.find import AttentionMatch
from rainfusion_compile.passes.normalize import Spelled
from rainfusion_compile.passes.provenance.known_tokens import NOTHING, Carried, Told
from rainfusion_compile.passes.provenance.trace import example_of
from rainfusion_compile.passes.rewrite.writer import (
    DENSE_BY_OPTION,
    Analysis,
    Writer,
    analyse,
    copy_graph,
    dense_layers,
    describe,
    log_result,
    warn_once,
)
from rainfusion_compile.report import GraphReport
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.layout_codec import NO_VIDEO, encode

EXTRA_OUTPUTS = 3
"""Of each sparse attention: choice, recall, and the layout with its rest filled in."""


@dataclass(frozen=True)
class Found:
    """What is known of a graph at some sizes: a row for each attention that was rewritten, what outputs carry.

    `left_out` tells how many tokens of each have no query.
    """

    layouts: Tensor
    carried: Carried
    reasons: tuple[str | None, ...]
    left_out: tuple[int, ...]


class DynamicAnalysis:
    """The analysis of one dynamic graph, at any sizes.

    Attributes:
        told: what is known from outside of the call that is being compiled.
        sizes: where a call's arguments show them.
        matches: the graph's attentions, as they are at the sizes of the call that is being compiled.
        chosen: numbers of those that are rewritten: sparse at these sizes, or if there were only more tokens.
        varies: whether some are not, only because one graph cannot serve all sizes of them.
        here: all that is known of the graph at these sizes, with the `refused` attentions: in another spelling than
            SDPA, and not understood.
    """

    def __init__(
        self, gm: fx.GraphModule, options: Options, refused: Sequence[AttentionMatch] = (), told: Told = NOTHING
    ) -> None:
        self.options = options
        self.told = told
        self.sizes = InputSizes(gm)
        self._gm = gm
        self._unbacked = any(self.sizes.hide(example_of(node)) for node in gm.graph.nodes)
        self._copy = copy_graph(gm)
        self._here, analyses = self._analyse(self._copy, self.sizes.hints, told)
        self.matches = analyses[0].matches
        possible = []
        self.varies = any(match.reason is None and self._varies(match) for match in self.matches)
        for number, match in enumerate(self.matches):
            alike = [analysis.matches[number] for analysis in analyses]
            reason = match.reason or self._varies(match) or self._row(alike, 0)[1]
            reason = reason or (None if _grows(match) else self._row(alike, options.min_tokens)[1])
            if reason is None:
                possible.append(number)
            match.reason = reason
        kept = dense_layers(options, len(possible))
        for number in kept:
            self.matches[possible[number]].reason = DENSE_BY_OPTION
        self.chosen = tuple(number for place, number in enumerate(possible) if place not in kept)
        for match in self.matches:  # a closer look would not change that these are too few, or how many they are
            match.open = match.open and (match.tokens or 0) >= options.min_tokens and not self._hides(match)
        self._refused = list(refused)
        self.here = Analysis([*self.matches, *refused], _carried(analyses), Spelled(gm))
        self._facts = [_facts(match) for match in self.matches]
        self._first = None if self.sizes.hints is None else self._found(analyses)

    def rewrite(self) -> tuple[fx.GraphModule, GraphReport, Tensor]:
        """A copy of the graph with its sparse attentions rewritten; Dynamo goes on reading its own.

        Returns:
            The copy, which has one more input at the end, a report on it, and an example of that input.
        """
        gm, report = self._copy, GraphReport()
        with at_sizes(self._here):
            writer = _DynamicWriter(gm, self.options, len(self.chosen))
            for number, match in enumerate(self.matches):
                known = describe(match, None)
                if number in self.chosen:
                    known.status, known.grid, known.text, known.tokens = "sparse", None, None, None
                    writer.write(match)
                report.attentions.append(known)
            writer.finish()
        report.attentions += [describe(match, None) for match in self._refused]
        log_result(self.here.matches, self.options)
        return gm, report, example_of(writer.layouts)

    def at(self, numbers: tuple[int, ...], told: Told = NOTHING) -> Found:
        """The layouts of a call whose inputs have these sizes, and of which this is known from outside."""
        if self._first is not None and (numbers, told) == (self.sizes.hints, self.told):
            return self._first
        return self._found(self._analyse(self._gm, numbers, told)[1])

    def _found(self, analyses: list[Analysis]) -> Found:
        rows, reasons, left_out = [], [], []
        for number in self.chosen:
            alike = [analysis.matches[number] for analysis in analyses]
            row, reason = self._row(alike, self.options.min_tokens)
            if any(_facts(match) != self._facts[number] for match in alike):
                row, reason = None, "its mask, scale or queries are others than those of the call that was compiled"
            tokens = alike[0].tokens or 0
            if row is None and tokens >= self.options.min_tokens:
                warn_once(f"attention over {tokens} tokens stays dense in a graph for many resolutions: {reason}")
            rows.append(row or NO_VIDEO)
            reasons.append(reason)
            left_out.append(sum(alike[0].left_out))
        layouts = torch.tensor(rows, dtype=torch.int64, device="cpu")
        return Found(layouts, _carried(analyses), tuple(reasons), tuple(left_out))

    def _analyse(self, gm: fx.GraphModule, numbers: tuple[int, ...] | None, told: Told) -> tuple[Sizes, list[Analysis]]:
        """At these sizes: once, or once for each choice of what only a run could tell."""
        options = told.added_to(dataclasses.replace(self.options, min_tokens=0))
        known = self.sizes.named(numbers)
        all_sizes = [Sizes(known, stand_ins) for stand_ins in ((SMALL, LARGE) if self._unbacked else (SMALL,))]
        analyses = []
        for sizes in all_sizes:
            with at_sizes(sizes), torch._C._DisableAutocast():
                analyses.append(analyse(gm, options, told.carried, Spelled(gm)))
        return all_sizes[0], analyses

    def _row(self, matches: Sequence[AttentionMatch], min_tokens: int) -> tuple[tuple[int, ...] | None, str | None]:
        for match in matches:
            if match.reason is not None:
                return None, match.reason
            if (match.tokens or 0) < min_tokens:
                return None, f"{match.tokens} tokens, fewer than min_tokens={min_tokens}"
        one, other = matches[0], matches[-1]
        assert one.grid is not None
        assert one.text is not None
        assert other.text is not None
        open_end = len(matches) > 1 and self._hides(one)
        rest = [
            number for number, lengths in enumerate(zip(one.text, other.text, strict=False)) if len(set(lengths)) > 1
        ]
        if one.grid != other.grid or len(rest) != open_end:
            return None, "the grid, or where it begins, is known at run time only"
        try:
            return encode(VideoLayout(one.grid, one.text), rest=rest[0] if rest else None), None
        except ValueError as error:
            return None, f"too many videos for a graph of many resolutions: {error}"

    def _varies(self, match: AttentionMatch) -> str | None:
        """Why one compiled graph cannot serve all sizes of an attention."""
        query, key, value, out = map(example_of, (match.query, match.key, match.value, match.node))
        if any(fixed(item.shape[3]) is None for item in (query, key, value)):
            return "head dim is not fixed"
        if _expressions(query.shape) != _expressions(out.shape):
            return "the result is not provably as long as the query"
        if match.mask_factors is not None and self._hides(match):
            return "a mask of queries over a number of tokens that is known at run time only"
        if any(match.left_out) and self._hides(match):
            return "queries of a part of the tokens only, whose number is known at run time only"
        if all(match.left_out):
            return "tokens without a query both before and after the others"
        return None

    def _hides(self, match: AttentionMatch) -> bool:
        """Whether the number of its tokens is known at run time only."""
        operands = map(example_of, (match.query, match.key))
        return any(isinstance(item, Tensor) and item.dim() == 4 and self.sizes.hide(item.shape[2]) for item in operands)


def _carried(analyses: list[Analysis]) -> Carried:
    """What the outputs of the graph carry; nothing, where the analysis made up sizes."""
    return analyses[0].carried if len(analyses) == 1 else ()


def _facts(match: AttentionMatch) -> tuple[Any, ...]:
    """What the compiled graph relies on."""
    factors = match.mask_factors
    sides = () if factors is None else (factors.keys, factors.queries)
    names = [{(factor.node.name, factor.axis) for factor in side} for side in sides]
    return (
        match.key_mask and match.key_mask.name,
        match.key_mask_kind,
        names,
        match.scale,
        tuple(map(bool, match.left_out)),
    )


def _grows(match: AttentionMatch) -> bool:
    """Whether another call may have more tokens."""
    return fixed(example_of(match.query).shape[2]) is None


def _expressions(sizes: Iterable[Any]) -> tuple[Any, ...]:
    """Sizes as expressions: to compare them makes no guards."""
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


class _DynamicWriter(Writer):
    """Writes `video_attention` into one graph, and an input with the layouts."""

    def __init__(self, gm: fx.GraphModule, options: Options, attentions: int) -> None:
        super().__init__(gm, options)
        self.layouts = _add_input(gm, "rainfusion_layouts", torch.zeros(attentions, len(NO_VIDEO), dtype=torch.int64))

    def write(self, match: AttentionMatch) -> None:
        old = match.node
        example: Tensor = old.meta["example_value"]
        with self.gm.graph.inserting_before(old):
            q, k, v = self._operands(match, example.dtype)
            q = self._fill(match, q)
            key_mask, query_mask = self._masks(match)
            row = self._emit(old, torch.ops.aten.select.int, self.layouts, 0, len(self.observed) // EXTRA_OUTPUTS)
            call = self._emit(
                old,
                torch.ops.rainfusion.video_attention.default,
                q,
                k,
                v,
                key_mask,
                row,
                float(self.options.sparsity),
                ",".join(self.options.patterns),
                match.scale,
                float(self.options.recall_target),
                float(self.options.min_recall),
            )
            new, *observed = (self._emit(old, operator.getitem, call, item) for item in range(1 + EXTRA_OUTPUTS))
            new = self._restride(old, self._where(old, query_mask, self._cut(match, new)))
        old.replace_all_uses_with(new)
        self.gm.graph.erase_node(old)
        self.observed += observed

    def _left_out(self, match: AttentionMatch) -> tuple[Any, Any]:
        """All on one side, as many as the call has."""
        keys, queries = (self._size(match.node, node, 2) for node in (match.key, match.query))
        fixed_sizes = isinstance(keys, int) and isinstance(queries, int)
        count = keys - queries if fixed_sizes else self._emit(match.node, operator.sub, keys, queries)
        before, after = (count if some else 0 for some in match.left_out)
        return before, after

    def _size(self, like: fx.Node, node: fx.Node, dim: int) -> Any:
        size = super()._size(like, node, dim)
        return size if isinstance(size, int) else self._emit(like, torch.ops.aten.sym_size.int, node, dim)

    def _plain(self, sizes: Iterable[Any]) -> tuple[Any, ...]:
        return _expressions(sizes)


def _add_input(gm: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """One more input of a Dynamo graph, its last one, given by the caller of the compiled graph."""
    inputs = gm.graph.find_nodes(op="placeholder")
    mode = next(mode for node in gm.graph.nodes if (mode := getattr(example_of(node), "fake_mode", None)) is not None)
    after = gm.graph.inserting_after(inputs[-1]) if inputs else gm.graph.inserting_before(next(iter(gm.graph.nodes)))
    with after:
        node = gm.graph.placeholder(name)
    # Dynamo does not know of it, so nothing guards it
    node._dynamo_source = ConstantSource(name)
    node.meta["example_value"] = mode.from_tensor(value, static_shapes=True)
    return node
