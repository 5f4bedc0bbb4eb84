# SPDX-License-Identifier: Apache-2.0
"""What becomes of a graph: its attentions, the sparse ones among them, and what is known at the sizes of any call.

A graph whose sizes are numbers gets tables for them. One with symbolic sizes is compiled once for all resolutions, and
its sparse attentions read their layouts from rows of one more input. These come from the same analysis, with the
numbers that the inputs of a call have, never from another call or a number of tokens. What is not provably sparse at
these sizes is dense. What is part of a compiled graph must hold at all sizes: scale, mask, shape of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from rainfusion_compile.options import Options
from rainfusion_compile.passes.attention_match import AttentionMatch, DenseReason, Reason
from rainfusion_compile.passes.graph.nodes import copy_graph, example_of, is_sdpa, tensor_at
from rainfusion_compile.passes.graph.symbolic_sizes import (
    LARGE,
    SMALL,
    InputSizes,
    Sizes,
    at_sizes,
    fixed,
    hint_of,
    is_symbolic,
)
from rainfusion_compile.passes.match.find import find_attentions, too_few
from rainfusion_compile.passes.normalize import Normalized, normalize
from rainfusion_compile.passes.provenance.known_tokens import NOTHING, Carried, Told, carried_out
from rainfusion_compile.passes.provenance.trace import trace
from rainfusion_compile.passes.rewrite.notices import Notices
from rainfusion_compile.passes.rewrite.summary import check_density, refuse_dense
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.layout_codec import NO_VIDEO, encode


class CallLayouts(NamedTuple):
    """What is known of a graph in calls of some sizes: its additional `inputs`, and what its outputs carry.

    `reasons`, `partial_queries`, `shown`: of its sparse attentions, why they are dense here, how many tokens have no
    query, and their layouts.
    """

    inputs: tuple[Tensor, ...] = ()
    carried: Carried = ()
    reasons: tuple[Reason | None, ...] = ()
    partial_queries: tuple[int, ...] = ()
    shown: tuple[VideoLayout | None, ...] = ()


class _Look(NamedTuple):
    """The attentions of a graph and what its outputs carry, at some sizes: those of this call, if None."""

    sizes: Sizes | None
    matches: list[AttentionMatch]
    carried: Carried


class Plan:
    """What becomes of one graph.

    Attributes:
        gm, module: the graph as Dynamo made it; the one to compile, the same or a copy that is rewritten.
        known, first: what is known of the call that is being compiled, from outside and in all.
        any_size: whether one compiled graph serves all sizes; else it is fixed to its sizes where it is sparse.
        matches: all its attentions in the order they run, as they are at the sizes of this call.
        varies: whether some stay dense only because one graph cannot serve all sizes of them.
        tell: what tells the user, once.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        options: Options,
        normalized: Normalized,
        known: Told,
        *,
        any_size: bool = False,
        tell: Notices | None = None,
    ) -> None:
        self.gm, self.options, self.normalized, self.known, self.any_size = gm, options, normalized, known, any_size
        self.sizes, self.tell = InputSizes(gm), tell or Notices()
        self._unbacked = any_size and any(self.sizes.hide(example_of(node)) for node in gm.graph.nodes)
        copy = copy_graph(gm)
        looks = self._look(copy if any_size else gm, None, known)
        self.at_compilation, found, _ = looks[0]
        self.varies = False
        for match, *again in zip(*(look.matches for look in looks), strict=True):
            if any_size and match.reason is None:
                varies, grows = self._varies(match), fixed(example_of(match.query).shape[2]) is None
                self.varies |= varies is not None
                row = varies or self._row([match, *again], 0 if grows else options.min_tokens)
                match.reason = row if isinstance(row, Reason) else None
        self._keep_dense([match for match in found if match.reason is None])
        for match in (
            *found,
            *normalized.refused,
        ):  # a closer look would not change that these are too few, or how many they are
            match.waits &= (match.tokens or 0) >= options.min_tokens and not (any_size and self._hides(match))
        self.matches = normalized.in_order(found)
        self._operand_sizes = list(map(_operand_sizes, self.matches))
        self._chosen = {number: _facts(match) for number, match in enumerate(found) if match.reason is None}
        self.module, self._again = (copy, gm) if any_size and self._chosen else (gm, copy)
        self.first = self._layouts(looks)

    @property
    def sparse(self) -> list[AttentionMatch]:
        """The attentions that are rewritten."""
        return [match for match in self.matches if match.reason is None]

    @property
    def told_apart_by(self) -> int | None:
        """Number of an input, a parameter, that tells modules apart which share this graph, if `dense_layers` counts in
        it and all its attentions are of one module: of a block that is compiled by itself, for one."""
        if not self.options.dense_layers or any(
            part.isdigit() for match in self.matches for part in match.name.split(".")
        ):
            return None
        values = map(example_of, self.gm.graph.find_nodes(op="placeholder"))
        return next((number for number, value in enumerate(values) if isinstance(value, torch.nn.Parameter)), None)

    @property
    def breaks(self) -> bool:
        """Whether the model goes on in another graph."""
        return bool(getattr(getattr(self.gm, "compile_subgraph_reason", None), "graph_break", False))

    @property
    def waits(self) -> bool:
        """Whether an attention could become sparse if only more were known of the graph's inputs."""
        return any(match.waits and match.reason is not None for match in self.matches)

    @property
    def passes_on(self) -> bool:
        """Whether it has no attention, and its outputs run over tokens whose grid its inputs may show to others."""
        dims = (dim for carried in self.first.carried for dim in carried or ())
        return not self.matches and any(dim is not None and dim.grid is None for dim in dims)

    def at(self, numbers: tuple[int, ...], known: Told) -> CallLayouts:
        """What is known in a call whose inputs have these sizes, and of which this is known from outside."""
        if (numbers, known) == (tuple(self.sizes.hints.values()), self.known):
            return self.first
        if not self._chosen and not any(self.first.carried) and not any(known.carried):
            return CallLayouts()
        return self._layouts(self._look(self._again, numbers, known))

    def pairs(self, numbers: tuple[int, ...]) -> tuple[int | None, ...]:
        """Token pairs of each attention in a call of these sizes: batch x heads x queries x keys; None if unknown."""
        with at_sizes(Sizes(self.sizes.named(numbers))):
            sizes = [[hint_of(size) for size in operands] for operands in self._operand_sizes]
        return tuple(math.prod(each) if each and None not in each else None for each in sizes)  # type: ignore[arg-type]

    def _look(self, gm: fx.GraphModule, numbers: tuple[int, ...] | None, known: Told) -> list[_Look]:
        """At these sizes: once, or once for each choice of what only a run could tell."""
        options, looks = self.options, []
        if known.grid is not None:  # as a context says
            options = replace(options, grid=known.grid, text=known.text)
        for stand_ins in (SMALL, LARGE) if self._unbacked else (SMALL if self.any_size else None,):
            sizes = Sizes(self.sizes.named(numbers), stand_ins) if self.any_size or numbers is not None else None
            with at_sizes(sizes), torch._C._DisableAutocast():
                # sizes of calls are without end, and the process keeps what torch remembers of them
                traced = trace(gm, known.carried, remember=numbers is None)
                least = 0 if self.any_size else options.min_tokens
                matches = find_attentions(gm, grid=options.grid, text=options.text, min_tokens=least, traced=traced)
                ends, attends = (traced.outputs, traced.inputs), bool(matches or self.normalized.refused)
                carried = carried_out(*ends, known.carried, options.min_tokens, attends=attends)
                looks.append(_Look(sizes, matches, carried))
        return looks

    def _keep_dense(self, sparse: list[AttentionMatch]) -> None:
        """Keep those dense that the option `dense_layers` names."""
        count, wanted = len(sparse), self.options.dense_layers
        assert isinstance(wanted, tuple)
        if wanted and count and self.breaks:
            raise ValueError(
                f"dense_layers={wanted} counts the attentions of one graph, and this model breaks into several: leave "
                "it out, or compile with fullgraph=True to see what breaks it"
            )
        beyond = [number for number in wanted if not -count <= number < count]
        if beyond and count:
            named, first = f"dense_layers={wanted}", wanted == tuple(range(len(wanted)))
            told = f"{named} names {beyond}, and this graph has {count} video attentions, numbered from 0"
            more = (
                f"dense_layers={len(wanted)} names more attentions than the {count} of this graph; give at most {count}"
            )
            self.tell(more if first else told)
        for number in {*wanted} - {*beyond}:
            sparse[number].reason = Reason(DenseReason.ASKED, "kept dense by dense_layers")

    def _layouts(self, looks: list[_Look]) -> CallLayouts:
        carried = looks[0].carried if len(looks) == 1 else ()  # what was made up is not carried
        found = [[look.matches[number] for look in looks] for number in self._chosen]
        partial_queries = tuple(sum(alike[0].partial_queries) for alike in found)
        shown = tuple(alike[0].layout for alike in found)
        if not self.any_size or not found:
            return CallLayouts((), carried, (None,) * len(found), partial_queries, shown)
        rows = []
        for alike, facts in zip(found, self._chosen.values(), strict=True):
            row = self._row(alike, self.options.min_tokens)
            if any(_facts(match) != facts for match in alike):
                message = "its mask, scale or queries are others than those of the call that was compiled"
                row = Reason(DenseReason.ANY_SIZE, message)
            if isinstance(row, Reason) and (alike[0].tokens or 0) >= self.options.min_tokens:
                where = f"attention over {alike[0].tokens} tokens stays dense in a graph for many resolutions"
                self.tell(f"{where}: {row.advice}")
                refuse_dense([replace(alike[0], reason=row)], self.options)
            rows.append(row)
        reasons = [row if isinstance(row, Reason) else None for row in rows]
        sparse = [alike[0] for alike, reason in zip(found, reasons, strict=True) if reason is None]
        check_density(sparse, self.options, self.tell)
        numbers = [NO_VIDEO if isinstance(row, Reason) else row for row in rows]
        layouts = torch.tensor(numbers, dtype=torch.int64, device="cpu").view(-1, len(NO_VIDEO))
        return CallLayouts((layouts,), carried, tuple(reasons), partial_queries, shown)

    def _row(self, alike: Sequence[AttentionMatch], min_tokens: int) -> tuple[int, ...] | Reason:
        """The layout's numbers, or why an attention is dense; `alike` has it as often as it was looked at."""
        for match in alike:
            if (reason := match.reason or too_few(match, min_tokens)) is not None:
                return reason
        one, other = alike[0].layout, alike[-1].layout
        assert one is not None
        assert other is not None
        rest = [number for number, lengths in enumerate(zip(one.text, other.text, strict=False)) if len({*lengths}) > 1]
        if one.grid != other.grid or len(rest) != (len(alike) > 1 and self._hides(alike[0])):
            return Reason(DenseReason.ANY_SIZE, "the grid, or where it begins, is known at run time only")
        try:
            return encode(one, rest=rest[0] if rest else None)
        except ValueError as error:
            return Reason(DenseReason.ANY_SIZE, f"too many videos for a graph of many resolutions: {error}")

    def _varies(self, match: AttentionMatch) -> Reason | None:
        """Why one compiled graph cannot serve all sizes of an attention."""
        query, key, value, out = map(example_of, (match.query, match.key, match.value, match.node))
        hidden, some = self._hides(match), any(match.partial_queries)
        # of one whose layout is known from outside only, head dims are fixed by guards
        open_dims = not self.known and any(fixed(item.shape[3]) is None for item in (query, key, value))
        obstacles = {
            "head dim is not fixed": open_dims,
            "the result is not provably as long as the query": not same_sizes(query.shape[:3], out.shape[:3]),
            "a mask of queries over a number of tokens that is known at run time only": match.mask.queries and hidden,
            "queries of a part of the tokens only, whose number is known at run time only": some and hidden,
            "tokens without a query both before and after the others": all(match.partial_queries),
        }
        return next((Reason(DenseReason.ANY_SIZE, what) for what, holds in obstacles.items() if holds), None)

    def _hides(self, match: AttentionMatch) -> bool:
        """Whether the number of its tokens is known at run time only."""
        operands = map(tensor_at, (match.query, match.key)) if is_sdpa(match.node) else ()
        return any(item is not None and item.dim() == 4 and self.sizes.hide(item.shape[2]) for item in operands)


def analyse(gm: fx.GraphModule, options: Options, known: Callable[[], Told], tell: Notices | None = None) -> Plan:
    """What becomes of a Dynamo graph; `known` tells what is known of this call from outside, where that is needed."""
    normalized = normalize(gm)
    any_size = is_symbolic(gm) and not normalized.substitutes  # another spelling is understood at these sizes only
    plan = Plan(gm, options, normalized, NOTHING, any_size=any_size, tell=tell)
    if plan.waits and plan.any_size and (outside := known()):
        informed = Plan(gm, options, normalized, outside, any_size=True, tell=tell)
        if informed.sparse and not informed.waits and not informed.varies:
            return informed
    if plan.waits:
        normalized.keep_only(())
    return plan


def _operand_sizes(match: AttentionMatch) -> tuple[Any, ...]:
    """Batch, heads, queries and keys, as the graph has them; () if it does not show them all."""
    operands = [tensor_at(node) for node in (match.query, match.key)] if is_sdpa(match.node) else []
    sizes = [operand.shape for operand in operands if operand is not None and operand.dim() == 4]
    return (*sizes[0][:3], sizes[1][2]) if len(sizes) == 2 else ()


def same_sizes(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether sizes are the same expressions: to compare them as such makes no guards."""
    pairs = ([size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes] for sizes in (one, other))
    return next(pairs) == next(pairs)


def _facts(match: AttentionMatch) -> tuple[Any, ...]:
    """What a compiled graph relies on."""
    names = [{(factor.node.name, factor.axis) for factor in side} for side in (match.mask.keys, match.mask.queries)]
    return match.key_mask_kind, names, match.scale, tuple(map(bool, match.partial_queries))
