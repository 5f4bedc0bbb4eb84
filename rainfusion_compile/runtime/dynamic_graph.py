# SPDX-License-Identifier: Apache-2.0
"""Run time of dynamic graphs: each call brings the layouts of its attentions along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from rainfusion_compile.options import Options
from rainfusion_compile.passes.match.partial_queries import density
from rainfusion_compile.passes.provenance.known_tokens import NOTHING, Told
from rainfusion_compile.passes.rewrite.dynamic import EXTRA_OUTPUTS, DynamicAnalysis, Found
from rainfusion_compile.report import GraphReport, Observed, Realised
from rainfusion_compile.runtime.carry import attach, carried_by
from rainfusion_compile.runtime.compiled_graphs import open_report
from rainfusion_compile.runtime.outside_knowledge import Listener
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout_codec import decode

MAX_RESOLUTIONS = 64
"""How many sizes of inputs a graph remembers the layouts of; one more makes it forget the least recently used."""


class DynamicGraph:
    """A compiled graph for all resolutions: its last input are layouts, its last outputs what each attention did.

    Layouts are looked up by the sizes of the inputs themselves, so 45x80 and 80x45 are two entries though they have as
    many tokens; and, with `listener`, by what it hears of a call's tokens. What was not seen before costs one analysis,
    and its first attention builds its tables; nothing is compiled again.
    """

    def __init__(
        self,
        compiled: Callable[..., Sequence[Any]],
        report: GraphReport,
        analysis: DynamicAnalysis,
        listener: Listener | None = None,
    ) -> None:
        self.compiled = compiled
        self.report = report
        self.sizes = analysis.sizes
        self.options = analysis.options
        self.extra = EXTRA_OUTPUTS * len(analysis.chosen)
        self.listener = listener
        self.at: Callable[[tuple[int, ...], Told], Found] = lru_cache(MAX_RESOLUTIONS)(analysis.at)

    def __call__(self, *args: Any) -> Sequence[Any]:
        found = self.at(self.sizes.of(args), NOTHING if self.listener is None else self.listener.hear(args))
        if self.listener is None and any(found.carried):
            carried_by(args)
        outputs = self.compiled(*args, found.layouts)
        if any(found.carried):
            attach(outputs, found.carried, args)
        split = len(outputs) - self.extra
        report = open_report()
        if report is not None:
            report.add(
                self.report, list(map(self._observed, *_columns(outputs[split:]), found.reasons, found.left_out))
            )
        return outputs[:split]

    def _observed(self, choice: Tensor, recall: Tensor, row: Tensor, reason: str | None, left_out: int) -> Observed:
        return Observed(choice.clone(), recall.clone(), realised(row, self.options, reason, left_out))


def realised(row: Tensor, options: Options, reason: str | None, left_out: int) -> Realised:
    """What a row, with its rest filled in, came to, if so many of its tokens have no query."""
    layout = decode(row.tolist())
    if layout is None:
        return Realised(reason=reason)
    tables = block_tables(layout, sparsity=options.sparsity, patterns=options.patterns)
    queries = layout.tokens - left_out
    densities = tuple(density(of_all, queries, layout.tokens) for of_all in tables.densities)
    return Realised(layout.grid, layout.text, queries, tables.patterns, densities)


def _columns(observed: Sequence[Any]) -> list[Sequence[Any]]:
    return [observed[number::EXTRA_OUTPUTS] for number in range(EXTRA_OUTPUTS)]
