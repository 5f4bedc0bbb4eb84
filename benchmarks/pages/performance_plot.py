# SPDX-License-Identifier: Apache-2.0
"""The picture of ``docs/performance.md``: speed-up against sparsity, and times against sequence length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = list[dict[str, Any]]
DENSE_COLOUR = "0.35"


def draw(path: Path, attention: dict[str, Any] | None, scaling: dict[str, Any] | None) -> None:
    """Draw a panel for each benchmark that was run, into a PNG whose bytes depend on the figures alone."""
    panels = [(_sparsity_panel, attention), (_scaling_panel, scaling)]
    measured = [(panel, result) for panel, result in panels if result is not None]
    if not measured:
        return
    figure, axes = plt.subplots(1, len(measured), figsize=(6.0 * len(measured), 4.4), squeeze=False)
    for axis, (panel, result) in zip(axes[0], measured, strict=True):
        panel(axis, result)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def groups(rows: Rows, key: str) -> dict[Any, Rows]:
    """Rows by what they have under a key, in order of first appearance."""
    found: dict[Any, Rows] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def _sparsity_panel(axis: Any, result: dict[str, Any]) -> None:
    for number, (shape, rows) in enumerate(groups(result["rows"], "shape").items()):
        colour = f"C{number}"
        sparsity = [row["sparsity"] for row in rows]
        axis.plot(sparsity, [row["speedup"] for row in rows], "o-", color=colour, markersize=4, label=shape)
        limits = [1 / row["density"] for row in rows]
        axis.plot(sparsity, limits, "_", color=colour, alpha=0.4, markersize=11, markeredgewidth=2)
    axis.plot([], [], "_", color="0.5", alpha=0.6, markersize=11, markeredgewidth=2, label="1 / realised density")
    axis.axhline(1, color=DENSE_COLOUR, linewidth=0.8)
    axis.set_xticks(sorted(groups(result["rows"], "sparsity")))
    axis.set_xlabel("sparsity asked for")
    axis.set_ylabel("speed-up over the best dense kernel")
    axis.set_ylim(bottom=0)
    axis.set_title(f"One attention call, {result['gpu']}, {result['dtype']}", fontsize=10)
    axis.legend(fontsize=7.5, frameon=False, loc="upper left")


def _scaling_panel(axis: Any, result: dict[str, Any]) -> None:
    by_sparsity = groups(result["rows"], "sparsity")
    first = next(iter(by_sparsity.values()))
    tokens = [row["tokens"] for row in first]
    baseline = " / ".join(groups(first, "baseline"))
    times = [row["dense_ms"] for row in first]
    axis.plot(tokens, times, "s-", color=DENSE_COLOUR, markersize=4, label=f"{baseline}, dense")
    for number, (sparsity, rows) in enumerate(by_sparsity.items()):
        tokens, times = [row["tokens"] for row in rows], [row["sparse_ms"] for row in rows]
        axis.plot(tokens, times, "o-", color=f"C{number}", markersize=4, label=f"ours, sparsity {sparsity:g}")
        graphs = [row["sparse_graph_ms"] for row in rows]  # None, so no point, where a call was not timed as a graph
        axis.plot(tokens, graphs, ":", color=f"C{number}", linewidth=1.2)
    axis.plot([], [], ":", color="0.5", linewidth=1.2, label="as a CUDA graph")
    for row in rows:  # of the last sparsity, the lowest curve
        text = f"{row['speedup']:.1f}x"
        at = (row["tokens"], row["sparse_ms"])
        axis.annotate(text, at, xytext=(5, -9), textcoords="offset points", fontsize=7.5, color=f"C{number}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(tokens, [f"{count / 1000:.0f}k" for count in tokens])
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    axis.set_ylabel("ms")
    axis.set_title(f"{result['heads']} heads of {result['head_dim']}, {result['gpu']}, {result['dtype']}", fontsize=10)
    axis.legend(fontsize=7.5, frameon=False, loc="upper left")
