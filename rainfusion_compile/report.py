# SPDX-License-Identifier: Apache-2.0
"""What was found, what was rewritten, and what each head did: a report that prints as a table and becomes a dict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean as mean
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from rainfusion_compile.sparsity.layout import Grids, VideoLayout
from rainfusion_compile.sparsity.patterns import DENSE


@dataclass
class AttentionReport:
    """One attention of a compiled graph.

    Attributes:
        name: where it stands in the model, such as ``blocks.0.attn1``.
        status: "sparse" if it was rewritten, else "dense".
        reason: why it was left dense; None if it is sparse.
        grid, text: ``(T, H, W)`` and ``(before, after)`` in tokens, as a :class:`VideoLayout` has them, or None.
        heads, head_dim, tokens: of the query. Fewer tokens than grid and text have, where text has keys only.
        patterns, sparsities, densities: names, wanted sparsities and realised densities of what heads choose from.
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
    sparsities: tuple[float, ...] = ()
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
    """The layout that an attention of a graph for many resolutions had in one call, and what its patterns came to; all
    None and empty where it was dense in this call, for a reason.
    """

    layout: VideoLayout | None = None
    tokens: int | None = None
    patterns: tuple[str, ...] = ()
    sparsities: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    reason: str | None = None


@dataclass
class Observed:
    """What one attention's heads chose in one call: ``choice``, ``errors`` and ``recall``, as the operator `arm_probe`
    returns them; and what is ``realised``, where grid and densities depend on the call and are not the attention's own.
    """

    choice: Tensor
    errors: Tensor
    recall: Tensor
    realised: Realised | None = None

    def densities(self, attention: AttentionReport) -> Tensor:
        """The density of what each head took, float64 ``[B, H]``."""
        known = (self.realised or attention).densities
        dense = torch.ones(self.recall.shape[-1] + 1 - len(known), dtype=torch.float64)
        return torch.cat([torch.tensor(known, dtype=torch.float64), dense])[self.choice.cpu().long()]


HIDDEN = ("sparsities", "densities")
OBSERVED = ("patterns", "sparsity", "error", "layer_error", "recall", "density")


class Report:
    """What ran while the report was open; see :func:`rainfusion_compile.observe`. Reads devices only when asked."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[GraphReport, list[list[Observed]]]] = {}  # by identity

    def add(self, graph: GraphReport, outputs: list[Observed]) -> None:
        """Record one call of a compiled graph: one entry for each of its sparse attentions."""
        self._calls.setdefault(id(graph), (graph, []))[1].append(outputs)

    def to_dict(self) -> dict[str, Any]:
        """``{"attentions": [...], "graphs": ..., "torch": ...}``, plain Python values.

        A sparse attention has ``patterns``, ``sparsity`` (the one that was taken of those wanted, 0 where a head stayed
        dense), ``density``, ``error`` (the predicted root of the head's squared output error over its output's square)
        and ``recall`` per batch element and head, ``[B][H]``, of its latest call; ``layer_error``, the same error of
        all heads together, ``[B]``; and ``mean_density``, over all calls, samples and heads. ``recall`` is that of what
        the head took; of its best candidate where it stayed dense. In a graph for many resolutions, status, reason,
        grid, text and tokens are also those of the latest call.
        """
        attentions = []
        for graph, calls in self._calls.values():
            observed = zip(*calls, strict=True)  # all calls of one sparse attention after the other
            for attention in graph.attentions:
                entry = {name: _plain(value) for name, value in vars(attention).items() if name not in HIDDEN}
                entry |= dict.fromkeys(OBSERVED) | {"calls": len(calls)}
                if attention.status == "sparse":
                    entry |= _observed_entry(attention, next(observed))
                attentions.append(entry)
        return {"attentions": attentions, "graphs": len(self._calls), "torch": torch.__version__}

    def __str__(self) -> str:
        """A table: a line for each sparse attention, then the dense ones by their reasons."""
        entries = self.to_dict()["attentions"]
        sparse = [entry for entry in entries if entry["status"] == "sparse"]
        dense = Counter(entry["reason"] for entry in entries if entry["status"] == "dense")
        lines = [f"rainfusion: {len(sparse)} of {len(entries)} attentions sparse"]
        if sparse:
            rows = [
                ("attention", "grid", "text", "heads", "patterns", "error", "recall", "density"),
                *map(_row, sparse),
            ]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
            density = sum(entry["mean_density"] for entry in sparse) / len(sparse)
            lines.append(f"mean realised density over all calls: {density:.3f}")
        return "\n".join([*lines, *(f"{count} left dense: {reason}" for reason, count in dense.most_common())])

    __repr__ = __str__


def _plain(value: Any) -> Any:
    """Lists for tuples, and strings for their subclasses."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


def _observed_entry(attention: AttentionReport, calls: Sequence[Observed]) -> dict[str, Any]:
    latest, realised = calls[-1], calls[-1].realised
    names = (*(realised or attention).patterns, DENSE)
    patterns = len(names) - 1 or latest.recall.shape[-1]
    choice, recall = latest.choice.cpu().long(), latest.recall.cpu()[..., :patterns]
    errors = latest.errors.cpu().double()[..., : patterns + 1]
    squares, energy = pad(errors[..., :-1], (0, 1)), errors[..., -1].clamp_min(torch.finfo(torch.float64).tiny)
    spent = squares.gather(-1, choice.clamp_max(patterns)[..., None])[..., 0]
    wanted = torch.tensor([*(realised or attention).sparsities, 0.0], dtype=torch.float64)
    taken = recall.gather(-1, choice.clamp_max(patterns - 1)[..., None])[..., 0]
    taken = torch.where(choice == patterns, recall.amax(-1), taken)
    entry = {
        "patterns": [[names[min(number, len(names) - 1)] for number in sample] for sample in choice.tolist()],
        "sparsity": wanted[choice.clamp_max(len(names) - 1)].tolist(),
        "error": (spent / energy).sqrt().tolist(),
        "layer_error": (spent.sum(-1) / energy.sum(-1)).sqrt().tolist(),
        "recall": taken.tolist(),
        "density": latest.densities(attention).tolist(),
        "mean_density": float(torch.cat([call.densities(attention).flatten() for call in calls]).mean()),
    }
    if realised is None:
        return entry
    if realised.layout is None:
        return entry | {"status": "dense", "reason": _plain(realised.reason)}
    grid, text = map(_plain, (realised.layout.grid, realised.layout.text))
    return entry | {"grid": grid, "text": text, "tokens": realised.tokens}


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    taken, sparsity, recall, density = (
        list(chain(*entry[key])) for key in ("patterns", "sparsity", "recall", "density")
    )
    taken = [f"{name}@{share:g}" if share else name for name, share in zip(taken, sparsity, strict=True)]
    grids = entry["grid"] if isinstance(entry["grid"][0], list) else [entry["grid"]]
    return (
        entry["name"],
        " and ".join("x".join(map(str, grid)) for grid in grids),
        "+".join(map(str, entry["text"])),
        f"{entry['heads']}x{entry['head_dim']}",
        ", ".join(f"{name} {n}" for name, n in Counter(taken).most_common()),
        f"{max(entry['layer_error']):.3f}",
        f"{mean(recall):.3f}",
        f"{mean(density):.3f}",
    )
