# SPDX-License-Identifier: Apache-2.0
"""A report as a picture, by matplotlib, which is not among the package's own requirements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rainfusion_compile.report_page import FIRST_HUE, LAST_HUE, colours_of
from rainfusion_compile.report_text import Entry, plural
from rainfusion_compile.sparsity.patterns import DENSE

GREY = "#9a9a9a"


def figure(found: dict[str, Any]) -> Any:
    """A ``matplotlib.figure.Figure`` of ``Report.to_dict()``: heads by layers, density and error over calls.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no attention was sparse.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a report's picture needs matplotlib: pip install matplotlib") from error
    sparse = [entry for entry in found["attentions"] if entry["patterns"] is not None]
    if not sparse:
        raise ValueError("no attention of this report was sparse: there is nothing to draw")
    samples = sum(len(entry["patterns"]) for entry in sparse)
    most = max(len(entry["patterns"][0]) for entry in sparse)
    whole = Figure(figsize=(8 + 0.16 * most, max(4.0, 0.18 * samples + 1.5)), layout="constrained")
    axes = whole.subplot_mosaic([["heads", "density"], ["heads", "error"]], width_ratios=[0.16 * most + 2, 5])
    _heads(axes["heads"], sparse)
    for name, title in (("density", "density"), ("error", "predicted error")):
        _lines(axes[name], [entry[f"{name}_by_call"] for entry in sparse], title)
    axes["error"].set_xlabel("call")
    density = f": {found['density']:.3f} of all token pairs kept" if found["density"] is not None else ""
    whole.suptitle(f"{plural(len(sparse), 'sparse attention')}{density}")
    return whole


def _heads(axes: Any, sparse: Sequence[Entry]) -> None:
    """A square for each head, coloured by its pattern, the stronger the sparser; a line for each sample."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    colours = {**colours_of(sparse), DENSE: GREY}
    lines = [(entry, number) for entry in sparse for number in range(len(entry["patterns"]))]
    most = max(len(entry["patterns"][number]) for entry, number in lines)
    image = [[(0.0, 0.0, 0.0, 0.0)] * most for _ in lines]
    for line, (entry, number) in enumerate(lines):
        for head, (name, share) in enumerate(zip(entry["patterns"][number], entry["sparsity"][number], strict=True)):
            image[line][head] = to_rgba(colours[name], 1.0 if name == DENSE else 0.3 + 0.7 * share)
    axes.imshow(image, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(lines)), ["" if number else entry["name"] for entry, number in lines], fontsize=6)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("head")
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axes.legend(handles=patches, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=7, frameon=False)


def _lines(axes: Any, series: Sequence[Sequence[float]], title: str) -> None:
    """A line for each attention, from the first (blue) to the last (red)."""
    from matplotlib.colors import hsv_to_rgb

    for number, values in enumerate(series):
        hue = FIRST_HUE + (LAST_HUE - FIRST_HUE) * number / max(len(series) - 1, 1)
        marker = "." if len(values) == 1 else None
        axes.plot(values, color=hsv_to_rgb((hue / 360, 0.75, 0.8)), alpha=0.8, marker=marker)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
