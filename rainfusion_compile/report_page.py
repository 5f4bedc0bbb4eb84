# SPDX-License-Identifier: Apache-2.0
"""A report as a file: one page that needs nothing else, or a table for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

from rainfusion_compile.report_text import Entry
from rainfusion_compile.sparsity.layout import grid_text
from rainfusion_compile.sparsity.patterns import DENSE

COLUMNS = ("name", "category", "status", "grid", "text", "tokens", "heads", "head_dim", "calls", "mean_density")
PALETTE = ("#3b7dd8", "#d9822b", "#2f9e6e", "#a050c8", "#c2434f", "#7d8b2a")
HEADS = ("attention", "sample", "head", "patterns", "sparsity", "density", "error", "recall")
CELL = 14  # pixels of a head
FIRST_HUE, LAST_HUE = 220, 0  # of the lines of attentions, in the order they run

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #8886; --dense: #9a9a9a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #17181a; --dense: #666; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 1rem; max-width: 70rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; } pre { white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--faint); vertical-align: top; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td:last-child { min-width: 14rem; } td:nth-child(2) { white-space: nowrap; } summary { cursor: pointer; }
svg { display: block; } svg.chart { max-width: 100%; height: auto; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg line { stroke: var(--faint); } .dense { fill: var(--dense); }
.key span { display: inline-block; margin-right: 1rem; } .key i { display: inline-block; width: .8em; height: .8em; }
"""
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending", place = head.cellIndex;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const text = (row) => row.cells[place].innerText;
  const rows = [...body.rows].sort((a, b) => isNaN(text(a) - text(b))
    ? text(a).localeCompare(text(b), undefined, {numeric: true}) : text(a) - text(b));
  body.append(...(down ? rows.reverse() : rows));
};
"""


def page(found: dict[str, Any], text: str) -> str:
    """A page of HTML: what a report's dict and its text say."""
    entries = found["attentions"]
    sparse = [entry for entry in entries if entry["patterns"] is not None]
    first, *rest = text.splitlines()
    parts = [f"<h1>{escape(first)}</h1>"]
    if found["density"] is not None:
        parts.append(f"<p>Kept token pairs of video self-attention, over all calls: {found['density']:.3f}</p>")
    parts += [f"<p>{escape(line)}</p>" for line in rest if " left " in line]
    if sparse:
        parts += ["<h2>What each head took, in the latest call</h2>", _key(sparse), _heads(sparse)]
        parts += [f"<details><summary>The same in numbers</summary>{_table(HEADS, _rows_of_heads(sparse))}</details>"]
        for title, name in (("Density over calls", "density_by_call"), ("Predicted error over calls", "error_by_call")):
            parts += [f"<h2>{title}</h2>", _chart({entry["name"]: entry[name] for entry in sparse}, title)]
    if entries:
        parts += ["<h2>All attentions</h2>", _table((*COLUMNS, "why"), map(_row, entries))]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>rainfusion</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n<script>{SCRIPT}</script></body></html>\n"
    )


def table_of_calls(found: dict[str, Any]) -> str:
    """Comma-separated values, a row for each call of each attention."""
    names = [name for name in COLUMNS if name not in ("calls", "mean_density")]
    rows: list[list[object]] = [[*names, "reason", "remedy", "call", "density", "layer_error", "token_pairs"]]
    for entry in found["attentions"]:
        each = zip(entry["density_by_call"], entry["error_by_call"], entry["pairs_by_call"], strict=True)
        facts = [*(_shown(entry, name) for name in names), entry["reason"] or "", entry["remedy"] or ""]
        rows += [[*facts, call, *numbers] for call, numbers in enumerate(each)]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _shown(entry: Entry, name: str) -> str:
    value = entry[name]
    if value is None:
        return ""
    if name == "grid":
        return grid_text(value)
    return "+".join(map(str, value)) if name == "text" else f"{value:.3f}" if isinstance(value, float) else str(value)


def _row(entry: Entry) -> list[str]:
    why = "; ".join(filter(None, (entry["reason"], entry["remedy"])))
    return [*(_shown(entry, name) for name in COLUMNS), "too small for blocks" if entry["too_small"] else why]


def _rows_of_heads(entries: Iterable[Entry]) -> Iterator[list[str]]:
    """A row for each head of each sample, in the latest call."""
    for entry in entries:
        for number in range(len(entry["patterns"])):
            each = zip(*(entry[key][number] for key in HEADS[3:]), strict=True)
            for head, (name, sparsity, *numbers) in enumerate(each):
                shown = [f"{sparsity:g}", *(f"{value:.3f}" for value in numbers)]
                yield [entry["name"], str(number), str(head), name, *shown]


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that its heads sort."""
    heads = "".join(f'<th scope="col"><button>{name.replace("_", " ")}</button></th>' for name in names)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def colours_of(entries: Iterable[Entry]) -> dict[str, str]:
    """A colour for each pattern that some head took, in the order of their names."""
    taken = {name for entry in entries for sample in entry["patterns"] for name in sample} - {DENSE}
    return {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(sorted(taken))}


def _key(entries: Sequence[Entry]) -> str:
    swatches = [*colours_of(entries).items(), (DENSE, "var(--dense)")]
    spans = "".join(f'<span><i style="background:{colour}"></i> {escape(name)}</span>' for name, colour in swatches)
    return f'<p class="key">{spans} The sparser, the stronger; a line for each attention and sample.</p>'


def _heads(entries: Sequence[Entry]) -> str:
    """Heads by layers and samples, coloured by what they took."""
    colours, rows = colours_of(entries), list[str]()
    lines = [(entry, number) for entry in entries for number in range(len(entry["patterns"]))]
    margin = 7 * max(len(entry["name"]) for entry in entries) + 20
    for line, (entry, number) in enumerate(lines):
        rows.append(f'<text x="0" y="{(line + 0.8) * CELL:.0f}">{escape(entry["name"]) if not number else ""}</text>')
        each = zip(*(entry[key][number] for key in ("patterns", "sparsity", "density", "error")), strict=True)
        for head, (name, sparsity, density, error) in enumerate(each):
            strong = f'fill="{colours.get(name)}" fill-opacity="{0.3 + 0.7 * sparsity:.2f}"'
            fill = strong if name in colours else 'class="dense"'
            which = f"{entry['name']}, sample {number}, head {head}"
            told = f"{which}: {name}@{sparsity:g}, density {density:.3f}, error {error:.3f}"
            place = f'x="{margin + head * CELL}" y="{line * CELL}" width="{CELL - 1}" height="{CELL - 1}"'
            rows.append(f"<rect {place} {fill}><title>{escape(told)}</title></rect>")
    width = margin + CELL * max(len(entry["patterns"][0]) for entry in entries)
    return _svg(width, CELL * len(lines), rows, "Patterns of heads")


def _chart(series: dict[str, Sequence[float]], title: str) -> str:
    """A line for each attention, by its name, over its calls."""
    width, height, left = 640, 160, 44
    top = max(map(max, series.values())) or 1.0
    last = max(map(len, series.values())) - 1

    def at(call: int, value: float) -> str:
        return f"{left + (width - left - 8) * call / max(last, 1):.1f},{8 + (height - 30) * (1 - value / top):.1f}"

    parts = []
    for value in (0.0, top / 2, top):
        y = at(0, value).split(",")[1]
        parts.append(f'<line x1="{left}" x2="{width}" y1="{y}" y2="{y}"/><text x="0" y="{y}" dy="4">{value:.3f}</text>')
    parts.append(f'<text x="{left}" y="{height - 4}">call 0</text>')
    if last:
        parts.append(f'<text x="{width}" y="{height - 4}" text-anchor="end">call {last}</text>')
    for number, (name, values) in enumerate(series.items()):
        colour = f"hsl({FIRST_HUE + (LAST_HUE - FIRST_HUE) * number // max(len(series) - 1, 1)} 60% 50%)"
        points = " ".join(at(call, value) for call, value in enumerate(values))
        style = f'fill="none" stroke="{colour}" stroke-opacity="0.8" stroke-linecap="round" stroke-width="2"'
        told = f"<title>{escape(name)}: {values[-1]:.3f} in the latest call</title>"
        parts.append(f'<polyline points="{points} {points.split()[-1]}" {style}>{told}</polyline>')
    ends = f"from {escape(next(iter(series)))} (blue) to {escape([*series][-1])} (red)" if len(series) > 1 else ""
    return _svg(width, height, parts, title, "chart") + f'<p class="key">A line for each attention {ends}</p>'


def _svg(width: int, height: int, parts: Iterable[str], label: str, kind: str = "map") -> str:
    inside = "\n".join(parts)
    size = f'class="{kind}" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<div class="wide"><svg {size} role="img" aria-label="{escape(label)}">\n{inside}\n</svg></div>'
