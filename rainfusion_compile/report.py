# SPDX-License-Identifier: Apache-2.0
"""What was found, what was rewritten, and what each head did: a report that prints as a table and becomes a dict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rainfusion_compile.sparsity.layout import Grids, VideoLayout
from rainfusion_compile.sparsity.patterns import DENSE


@dataclass
class AttentionReport:
    """One attention of a compiled graph.

    Attributes:
        name: where it stands in the model, such as ``blocks.0.attn1``.
        status: "sparse" if it was rewritten, else "dense".
        reason: why it was left dense; None if it is sparse.
        grid, text: ``(T, H, W)`` and ``(before, after)`` in tokens; None where there is no video. Where there are
            several, a tuple of grids, and one number of text tokens more.
        heads, head_dim, tokens: of the query. Fewer tokens than grid and text have, where text has keys only.
        patterns, densities: names and realised densities of the patterns heads choose from, sparsest first.
    """

    name: str
    status: Literal["sparse", "dense"]
    reason: str | None = None
    grid: Grids | None = None
    text: tuple[int, ...] | None = None
    heads: int | None = None
    head_dim: int | None = None
    tokens: int | None = None
    patterns: tuple[str, ...] = ()
    densities: tuple[float, ...] = ()


@dataclass
class GraphReport:
    """All attentions of one compiled graph, in the order they run."""

    attentions: list[AttentionReport] = field(default_factory=list)

    @property
    def sparse(self) -> list[AttentionReport]:
        return [attention for attention in self.attentions if attention.status == "sparse"]


@dataclass(frozen=True)
class Realised:
    """The layout that an attention of a graph for many resolutions had in one call, and what its patterns came to.

    All None and empty where it was dense in this call, for a reason.
    """

    layout: VideoLayout | None = None
    tokens: int | None = None
    patterns: tuple[str, ...] = ()
    densities: tuple[float, ...] = ()
    reason: str | None = None


@dataclass
class Observed:
    """What one attention's heads chose in one call: ``choice`` int32 ``[B, H]``, ``recall`` float32 ``[B, H, P]``.

    ``realised`` where grid and densities depend on the call; else they are the attention's own.
    """

    choice: Tensor
    recall: Tensor
    realised: Realised | None = None

    def densities(self, attention: AttentionReport) -> Tensor:
        """The density of what each head took, float64 ``[B, H]``."""
        known = attention if self.realised is None else self.realised
        choice = self.choice.cpu().long()
        dense = torch.ones(self.recall.shape[-1] + 1, dtype=torch.float64)
        dense[: len(known.densities)] = torch.tensor(known.densities, dtype=torch.float64)
        return dense[choice]


class Report:
    """What ran while the report was open; see :func:`rainfusion_compile.observe`. Reads devices only when asked."""

    def __init__(self) -> None:
        self._graphs: list[GraphReport] = []
        self._calls: dict[int, list[list[Observed]]] = {}

    def add(self, graph: GraphReport, outputs: list[Observed]) -> None:
        """Record one call of a compiled graph: one entry for each of its sparse attentions."""
        if id(graph) not in self._calls:
            self._graphs.append(graph)
            self._calls[id(graph)] = []
        self._calls[id(graph)].append(outputs)

    def to_dict(self) -> dict[str, Any]:
        """``{"attentions": [...], "graphs": ..., "torch": ...}``, plain Python values.

        Each attention has ``calls``. A sparse one has ``patterns``, ``recall`` and ``density`` per batch element and
        head, ``[B][H]``, of its latest call; and ``mean_density``, over all calls, samples and heads. ``recall`` is
        that of the pattern the head took; of its best pattern where it stayed dense. In a graph for many resolutions,
        status, reason, grid, text and tokens are also those of the latest call.
        """
        attentions = []
        for graph in self._graphs:
            calls = self._calls[id(graph)]
            sparse = 0
            for attention in graph.attentions:
                entry = _static_entry(attention) | {"calls": len(calls)}
                if attention.status == "sparse":
                    entry |= _observed_entry(attention, [call[sparse] for call in calls])
                    sparse += 1
                attentions.append(entry)
        return {"attentions": attentions, "graphs": len(self._graphs), "torch": torch.__version__}

    def __str__(self) -> str:
        return format_report(self.to_dict())

    __repr__ = __str__


def _static_entry(attention: AttentionReport) -> dict[str, Any]:
    return {
        "name": attention.name,
        "status": attention.status,
        "reason": attention.reason and str(attention.reason),
        "grid": None if attention.grid is None else _listed(attention.grid),
        "text": None if attention.text is None else list(attention.text),
        "heads": attention.heads,
        "head_dim": attention.head_dim,
        "tokens": attention.tokens,
        "patterns": None,
        "recall": None,
        "density": None,
    }


def _listed(grid: Grids) -> list[Any]:
    return [list(item) if isinstance(item, tuple) else item for item in grid]


def _each(grid: list[Any]) -> list[list[int]]:
    """The grids of an entry: of one video or several."""
    return grid if isinstance(grid[0], list) else [grid]


def _observed_entry(attention: AttentionReport, calls: list[Observed]) -> dict[str, Any]:
    latest = calls[-1]
    names = (*(attention if latest.realised is None else latest.realised).patterns, DENSE)
    patterns = len(names) - 1 or latest.recall.shape[-1]
    choice, recall = latest.choice.cpu().long(), latest.recall.cpu()[..., :patterns]
    taken = recall.gather(-1, choice.clamp_max(patterns - 1)[..., None])[..., 0]
    taken = torch.where(choice == patterns, recall.amax(-1), taken)
    entry = {
        "patterns": [[names[min(number, len(names) - 1)] for number in sample] for sample in choice.tolist()],
        "recall": taken.tolist(),
        "density": latest.densities(attention).tolist(),
        "mean_density": float(torch.cat([call.densities(attention).flatten() for call in calls]).mean()),
    }
    return entry if latest.realised is None else entry | _realised_entry(latest.realised)


def _realised_entry(realised: Realised) -> dict[str, Any]:
    layout = realised.layout
    if layout is None:
        return {"status": "dense", "reason": realised.reason and str(realised.reason)}
    return {"grid": _listed(layout.grid), "text": list(layout.text), "tokens": realised.tokens}


def format_report(report: dict[str, Any]) -> str:
    """The table of ``Report.to_dict()``: a line for each sparse attention, then the dense ones by their reasons."""
    sparse = [entry for entry in report["attentions"] if entry["status"] == "sparse"]
    dense = Counter(entry["reason"] for entry in report["attentions"] if entry["status"] == "dense")
    lines = [f"rainfusion: {len(sparse)} of {len(report['attentions'])} attentions sparse"]
    if sparse:
        header = ("attention", "grid", "text", "heads", "patterns", "recall", "density")
        lines += _columns([header, *map(_row, sparse)])
        density = sum(entry["mean_density"] for entry in sparse) / len(sparse)
        lines.append(f"mean realised density over all calls: {density:.3f}")
    lines += [f"{count} left dense: {reason}" for reason, count in dense.most_common()]
    return "\n".join(lines)


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    flat = {key: [x for sample in entry[key] for x in sample] for key in ("patterns", "recall", "density")}
    count = len(flat["patterns"])
    return (
        entry["name"],
        " and ".join("x".join(map(str, grid)) for grid in _each(entry["grid"])),
        "+".join(map(str, entry["text"])),
        f"{entry['heads']}x{entry['head_dim']}",
        ", ".join(f"{name} {n}" for name, n in Counter(flat["patterns"]).most_common()),
        f"{sum(flat['recall']) / count:.3f}",
        f"{sum(flat['density']) / count:.3f}",
    )


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
