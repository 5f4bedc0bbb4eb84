# SPDX-License-Identifier: Apache-2.0
"""What was done to a graph, and why not more: for the report and for the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from torch._dynamo.utils import counters

from rainfusion_compile.options import Options
from rainfusion_compile.passes.attention_match import AttentionMatch, DenseReason
from rainfusion_compile.passes.match.partial_queries import density
from rainfusion_compile.passes.rewrite.notices import Notices, logger
from rainfusion_compile.report import AttentionReport, Category, GraphReport, Realised
from rainfusion_compile.sparsity.layout import Grids, VideoLayout, as_grids

if TYPE_CHECKING:
    from rainfusion_compile.passes.rewrite.analysis import Plan

Given = tuple[Grids | None, tuple[int, ...] | None]
"""The grid and text that an option or a context tells."""


def summarize(plan: Plan) -> GraphReport:
    """A report on every attention of a graph, without layout and densities where these depend on the call."""
    report = GraphReport(min_tokens=plan.options.min_tokens)
    for match in plan.matches:
        status: Literal["sparse", "dense"] = "sparse" if match.reason is None else "dense"
        entry = AttentionReport(match.name, status, match.reason, heads=match.heads, head_dim=match.head_dim)
        entry.category = category(match, plan.options.min_tokens)
        if match.reason is not None:
            entry.remedy = match.reason.kind.remedy
        if match.reason is not None or not plan.any_size:
            entry.grid, entry.text, entry.tokens = match.grid, match.text, match.tokens
            if match.reason is None and match.layout is not None:
                known = realised(match.layout, plan.options, sum(match.partial_queries))
                entry.patterns, entry.sparsities, entry.densities = known.patterns, known.sparsities, known.densities
        report.attentions.append(entry)
    return report


def category(match: AttentionMatch, min_tokens: int) -> Category:
    """Attention over enough tokens is over a video unless it is known to be none; of fewer, the graph must show it."""
    if match.reason is not None and match.reason.kind is DenseReason.CROSS_ATTENTION:
        return "cross-attention"
    enough = (match.tokens or 0) >= max(min_tokens, 1)
    return "video self-attention" if match.layout is not None or enough else "other"


def realised(layout: VideoLayout, options: Options, partial_queries: int) -> Realised:
    """What the patterns come to over a layout, if so many of its tokens have no query."""
    tables = options.tables(layout)
    queries = layout.tokens - partial_queries
    densities = tuple(density(of_all, queries, layout.tokens) for of_all in tables.densities)
    return Realised(layout, queries, tables.patterns, tables.sparsities, densities)


def log_result(plan: Plan) -> None:
    """Say in one line what was done; a warning where attention that a user would expect to be sparse is not.

    Few tokens are no surprise beside attention that is sparse, but they are where nothing is. Counted among PyTorch's
    own: ``torch._dynamo.utils.counters["rainfusion"]``.
    """
    for match in plan.matches:
        logger.debug("%s: %s", match.name, match.reason or f"sparse, grid {match.grid}, text {match.text}")
    video = [m for m in plan.matches if category(m, plan.options.min_tokens) == "video self-attention"]
    counted = counters["rainfusion"]
    counted["graphs"] += 1
    for match in video:
        counted["sparse" if match.reason is None else f"dense: {match.reason.kind.name.lower()}"] += 1
    if not video:
        return
    sparse = plan.sparse
    grids = dict.fromkeys("x".join(map(str, grid)) for m in sparse if m.grid for grid in as_grids(m.grid))
    over = f" (grid {', '.join(grids)}{', any other too' if plan.any_size else ''})" if sparse else ""
    line = f"{len(sparse)} of {len(video)} video self-attentions sparse{over}"
    dense = Counter(m.reason.advice for m in video if m.reason is not None)
    several = len(dense) > 1 or bool(sparse)
    line += "".join(f"; {count} dense: {why}" if several else f": {why}" for why, count in dense.most_common())
    line += " (up to a graph break)" if plan.breaks else ""
    unexpected = {m.reason.kind for m in video if m.reason is not None and not m.reason.kind.expected}
    plan.tell(line, logging.WARNING if unexpected - ({DenseReason.SIZE} if sparse else set()) else logging.INFO)
    if not plan.any_size:
        check_density(sparse, plan.options, plan.tell)


def refuse_dense(matches: Iterable[AttentionMatch], options: Options) -> None:
    """What the option ``strict`` asks for. Raises RuntimeError if attention over enough tokens is dense unasked."""
    if options.strict and (dense := dense_unasked(matches, options.min_tokens)):
        raise RuntimeError(f"strict=True, but {dense}")


def dense_unasked(matches: Iterable[AttentionMatch], min_tokens: int) -> str:
    """Which attention over enough tokens is dense unasked, with the reason and a remedy; "" if none is."""
    enough = [match for match in matches if (match.tokens or 0) >= min_tokens]
    dense = [(m.name, m.reason.advice) for m in enough if m.reason is not None and not m.reason.kind.expected]
    if not dense:
        return ""
    (name, advice), others = dense[0], len(dense) - 1
    return f"{name} stays dense: {advice}" + (f" (and {others} more)" if others else "")


def check_given(shown: Iterable[VideoLayout | None], given: Given, tell: Notices) -> None:
    """Say once where a grid that was given is none of those that sparse attention is over."""
    grid, text = given
    layouts = dict.fromkeys(layout for layout in shown if layout is not None)
    if grid is None or not layouts or any(one.grid == grid and text in (None, one.text) for one in layouts):
        return
    found = " and ".join(f"grid={layout.grid} with text={layout.text}" for layout in layouts)
    told = f"grid={grid}" + ("" if text is None else f" with text={text}")
    what = "attention is sparse over what the graph shows"
    tell(f"the graph shows {found}, not {told}; {DenseReason.GIVEN.remedy}; {what}")


def check_density(sparse: Iterable[AttentionMatch], options: Options, tell: Notices) -> None:
    """Say once where a layout does not let the patterns become as sparse as they should be."""
    for layout in {match.layout: None for match in sparse}:
        assert layout is not None
        tables = options.tables(layout)
        if (told := tables.out_of_reach(options.ladder)) is not None:
            tell(f"{told}, or leave it dense by a larger min_tokens")
