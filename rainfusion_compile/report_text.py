# SPDX-License-Identifier: Apache-2.0
"""A report as text for a terminal of 80 columns: a strip of letters for the heads of each attention."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rainfusion_compile.sparsity.layout import grid_text
from rainfusion_compile.sparsity.patterns import DENSE

WIDTH = 80
STRONG = 0.7  # heads that drop this share or more have a capital letter
WHY_DENSE = "no pattern was within the limits (or steps are dense as asked); a larger `error` admits more"

Entry = dict[str, Any]
"""One of ``Report.to_dict()["attentions"]``."""


def text_of(found: dict[str, Any]) -> str:
    """What ``Report.to_dict()`` says of one attention or more: how many, each sparse one, then the others by reason."""
    entries = found["attentions"]
    video = video_entries(entries)
    alone = left_alone(entry["category"] for entry in entries)
    sparse = [entry for entry in video if entry["status"] == "sparse"]
    small, dense = sum(entry["too_small"] for entry in sparse), sum(map(_all_dense, sparse))
    of_them = f", {small} of them too small for blocks to save anything" if small else ""
    of_them += f", {dense} of them with every head dense in every call" if dense else ""
    count = f"{len(sparse)} of {len(video)} video self-attentions sparse" if video else "no video self-attention"
    lines = [f"rainfusion: {count}{of_them}{f' ({alone})' if alone else ''}", *_table(sparse)]
    if dense:
        lines.append(f"{dense} with every head dense: {WHY_DENSE}")
    if found["density"] is not None and video:
        unknown = sum(None in entry["pairs_by_call"] for entry in video)
        without = f", without {unknown} whose sizes are not known" if unknown else ""
        lines.append(f"kept token pairs of video self-attention, over all calls: {found['density']:.3f}{without}")
    why: Counter[str] = Counter()
    for entry in entries:
        if entry["status"] == "dense" and entry["category"] == "video self-attention":
            why[f"left dense: {entry['reason']}{_often(entry)}; {entry['remedy']}"] += 1
        elif entry["status"] == "dense":
            why[f"left alone: {entry['reason']}"] += 1
    return "\n".join([*lines, *(f"{count} {what}" for what, count in why.most_common())])


def left_alone(categories: Iterable[str]) -> str:
    """How many attentions are none of a video, by their categories; "" if all are."""
    counts = Counter(categories)
    names = {"cross-attention": ("cross-attention", ""), "other": ("other self-attention", " over few tokens")}
    found = ((counts[category], *name) for category, name in names.items() if counts[category])
    told = " and ".join(f"{plural(count, name)}{over}" for count, name, over in found)
    return f"{told} left alone" if told else ""


def plural(count: int, name: str) -> str:
    """``count`` things of this name."""
    return f"{count} {name}{'' if count == 1 else 's'}"


def _all_dense(entry: Entry) -> bool:
    """Whether no head of a sparse attention took a pattern in any call, though its grid has some that save work."""
    taken = {name for sample in entry["patterns"] for name in sample}
    return not entry["too_small"] and taken == {DENSE} and min(entry["density_by_call"]) == 1.0


def video_entries(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry["category"] == "video self-attention"]


def _table(sparse: Sequence[Entry]) -> list[str]:
    """A line for each sparse attention and sample of its latest call, under its layout; and what letters stand for."""
    if not sparse:
        return []
    letters, names = _letters(sparse), max([len(_name(entry)) for entry in sparse] + [len("attention")])
    lines = [f"{'attention':{names}}  density  error  recall  heads"]
    room = max(WIDTH - len(lines[0]) + len("heads"), 16)
    for layout, entries in groupby(sparse, _layout):
        lines.append(layout)
        for entry in entries:
            name = _name(entry)
            for number, errors in enumerate(entry["layer_error"]):
                density, recall = (sum(entry[key][number]) / entry["heads"] for key in ("density", "recall"))
                strip = _strip(entry["patterns"][number], entry["density"][number], letters)
                shown = "too small for blocks" if entry["too_small"] else strip
                first, *rest = textwrap.wrap(shown, room)
                lines.append(f"{name:{names}}  {density:7.3f}  {errors:5.3f}  {recall:6.3f}  {first}")
                lines += [" " * (WIDTH - room) + more for more in rest]
                name = ""
    told = ", ".join([*(f"{letter} {name}" for name, letter in letters.items()), f". {DENSE}"])
    capital = f"; a capital drops {STRONG:g} of the pairs or more" if any(map(_has_strong, sparse)) else ""
    return [*lines, *textwrap.wrap(f"heads: {told}{capital}", WIDTH)]


def _name(entry: Entry) -> str:
    return entry["name"] + _often(entry)


def _often(entry: Entry) -> str:
    """How many calls were of an attention outside all graphs, of which a place may have many."""
    return f", {entry['calls']} calls" if entry["eager"] and entry["calls"] > 1 else ""


def _layout(entry: Entry) -> str:
    text = f", text {'+'.join(map(str, entry['text']))}" if any(entry["text"]) else ""
    return f"grid {grid_text(entry['grid'])}{text}, {entry['heads']} heads of {entry['head_dim']}:"


def _letters(entries: Iterable[Entry]) -> dict[str, str]:
    """A small letter for each pattern that some head took: one of its own, that no other has."""
    taken = {name for entry in entries for sample in entry["patterns"] for name in sample} - {DENSE}
    letters: dict[str, str] = {}
    for name in sorted(taken):
        own = (letter for letter in name.lower() + "abcdefghijklmnopqrstuvwxyz" if letter.isalpha())
        letters[name] = next((letter for letter in own if letter not in letters.values()), "?")
    return letters


def _strip(patterns: Sequence[str], densities: Sequence[float], letters: dict[str, str]) -> str:
    shown = ((letters.get(name, "."), density) for name, density in zip(patterns, densities, strict=True))
    return "".join(letter.upper() if _is_strong(density) else letter for letter, density in shown)


def _is_strong(density: float) -> bool:
    return 1.0 - density >= STRONG


def _has_strong(entry: Entry) -> bool:
    """Whether a head of an attention has a capital."""
    return not entry["too_small"] and any(_is_strong(density) for sample in entry["density"] for density in sample)
