# SPDX-License-Identifier: Apache-2.0
"""What was done to a graph, and why not more: for the report and for the log."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from rainfusion_compile.options import Options
from rainfusion_compile.passes.attention_match import AttentionMatch
from rainfusion_compile.passes.match.partial_queries import density
from rainfusion_compile.report import AttentionReport, GraphReport, Realised
from rainfusion_compile.sparsity.layout import VideoLayout

if TYPE_CHECKING:
    from rainfusion_compile.passes.rewrite.analysis import Plan

logger = logging.getLogger("rainfusion_compile")


def summarize(plan: Plan) -> GraphReport:
    """A report on every attention of a graph, without layout and densities where these depend on the call."""
    report = GraphReport()
    for match in plan.matches:
        status: Literal["sparse", "dense"] = "sparse" if match.reason is None else "dense"
        entry = AttentionReport(match.name, status, match.reason, heads=match.heads, head_dim=match.head_dim)
        if match.reason is not None or not plan.any_size:
            entry.grid, entry.text, entry.tokens = match.grid, match.text, match.tokens
            if match.reason is None and match.layout is not None:
                known = realised(match.layout, plan.options, sum(match.partial_queries))
                entry.patterns, entry.sparsities, entry.densities = known.patterns, known.sparsities, known.densities
        report.attentions.append(entry)
    return report


def realised(layout: VideoLayout, options: Options, partial_queries: int) -> Realised:
    """What the patterns come to over a layout, if so many of its tokens have no query."""
    tables = options.tables(layout)
    queries = layout.tokens - partial_queries
    densities = tuple(density(of_all, queries, layout.tokens) for of_all in tables.densities)
    return Realised(layout, queries, tables.patterns, tables.sparsities, densities)


def log_result(plan: Plan) -> None:
    """Say what was done; and, once, why attentions that a user would expect to be sparse are not."""
    if not plan.matches:
        return
    logger.info("%d of %d attentions made sparse", len(plan.sparse), len(plan.matches))
    for match in plan.matches:
        logger.debug("%s: %s", match.name, match.reason or f"sparse, grid {match.grid}, text {match.text}")
    unexpected = defaultdict[str, list[int]](list)
    for match in plan.matches:
        tokens = match.tokens or 0
        if match.reason is not None and tokens >= max(plan.options.min_tokens, 1) and not match.reason.kind.expected:
            unexpected[match.reason.advice].append(tokens)
    for advice, which in unexpected.items():
        warn_once(f"attention over {max(which)} tokens stays dense ({len(which)} in this graph): {advice}")
    if not plan.any_size:
        check_density(plan.sparse, plan.options)


def check_density(sparse: Iterable[AttentionMatch], options: Options) -> None:
    """Say once where a layout does not let the patterns become as sparse as they should be."""
    for layout in {match.layout: None for match in sparse}:
        assert layout is not None
        tables = options.tables(layout)
        if (told := tables.out_of_reach(options.ladder)) is not None:
            warn_once(
                f"{told}, for text, first frames and whole blocks are kept; expect no less than "
                f"{min(tables.densities):.0%} of the work, or leave it dense by a larger min_tokens"
            )


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)
