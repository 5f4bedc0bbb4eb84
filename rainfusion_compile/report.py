# SPDX-License-Identifier: Apache-2.0
"""What was found, what was rewritten, and what each head did: a report that prints as a table and becomes a dict."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from os import PathLike
from pathlib import Path
from statistics import fmean as mean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rainfusion_compile.options import Options
from rainfusion_compile.report_page import page, table_of_calls
from rainfusion_compile.report_plot import figure
from rainfusion_compile.report_text import plural, text_of, video_entries
from rainfusion_compile.sparsity.layout import Grids, VideoLayout
from rainfusion_compile.sparsity.patterns import DENSE

Category = Literal["video self-attention", "cross-attention", "other"]


@dataclass
class AttentionReport:
    """One attention of a compiled graph.

    Attributes:
        name: where it stands in the model, such as ``blocks.0.attn1``.
        status: "sparse" if it was rewritten, else "dense".
        reason, remedy: why it was left dense, and what can be done about it; None if it is sparse.
        category: "other" is self-attention over few tokens that no graph shows to be a video's, of text for one.
        grid, text: ``(T, H, W)`` and ``(before, after)`` in tokens, as a :class:`VideoLayout` has them, or None.
        heads, head_dim, tokens: of the query. Fewer tokens than grid and text have, where text has keys only.
        patterns, sparsities, densities: names, wanted sparsities and realised densities of what heads choose from.
        eager: whether it runs outside all graphs; its name is then the file and line that call it.
    """

    name: str
    status: Literal["sparse", "dense"]
    reason: str | None = None
    remedy: str | None = None
    category: Category = "video self-attention"
    grid: Grids | None = None
    text: tuple[int, ...] | None = None
    heads: int | None = None
    head_dim: int | None = None
    tokens: int | None = None
    patterns: tuple[str, ...] = ()
    sparsities: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    eager: bool = False


@dataclass
class GraphReport:
    """All attentions of one compiled graph, in the order they run; and over how many tokens they are over a video."""

    attentions: list[AttentionReport] = field(default_factory=list)
    min_tokens: int | None = None

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
    remedy: str | None = None


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
OBSERVED = ("patterns", "sparsity", "error", "layer_error", "recall", "density", "mean_density", "too_small")
SMALL_SAVING = 0.9995  # densities that print as 1.000 save nothing


def may_be_of_video(tokens: int | None, videos: Container[int | None], min_tokens: int) -> bool:
    """Whether attention outside all graphs is told of: over as many tokens as one of the ``videos``, or over enough."""
    return tokens in videos or (tokens or 0) >= max(min_tokens, 1)


class ReportedCall(NamedTuple):
    """One call of a graph: what the heads of its sparse attentions chose, and the token pairs of all attentions."""

    observed: list[Observed]
    pairs: tuple[int | None, ...]


class Report:
    """What ran while the report was open; see :func:`rainfusion_compile.observe`. Reads devices only when asked.

    ``missed``: calls that ran in other threads. ``eager``: whether Dynamo was told to compile nothing. ``min_tokens``:
    of the model's options, if they are known, for attention outside all graphs that are compiled with them.
    """

    def __init__(self) -> None:
        self.missed, self.eager = 0, False
        self.min_tokens: int | None = None
        self._calls: dict[int, tuple[GraphReport, list[ReportedCall]]] = {}  # by identity
        self._overheard: dict[tuple[Any, ...], tuple[GraphReport, list[ReportedCall]]] = {}  # by place and sizes

    def add(self, graph: GraphReport, observed: list[Observed], pairs: tuple[int | None, ...]) -> None:
        """Record one call of a compiled graph: an entry for each of its sparse attentions, token pairs for each."""
        self._calls.setdefault(id(graph), (graph, []))[1].append(ReportedCall(observed, pairs))

    def overhear(self, attention: AttentionReport, batch: int) -> None:
        """Record one call of an attention outside all graphs, which nobody made sparse."""
        heads, tokens = attention.heads or 0, attention.tokens or 0
        place = attention.name, heads, tokens, attention.head_dim
        _, calls = self._overheard.setdefault(place, (GraphReport([attention]), []))
        calls.append(ReportedCall([], (batch * heads * tokens**2,)))

    def to_dict(self) -> dict[str, Any]:
        """``{"attentions": [...], "density": ..., "graphs": ..., "torch": ...}``, plain Python values.

        A sparse attention has ``patterns``, ``sparsity`` (the one that was taken of those wanted, 0 where a head stayed
        dense), ``density``, ``error`` (the predicted root of the head's squared output error over its output's square)
        and ``recall`` per batch element and head, ``[B][H]``, of its latest call; and ``layer_error``, the same error
        of all heads together, ``[B]``. ``recall`` is that of what the head took; of its best candidate where it stayed
        dense. ``too_small``: whether none of its patterns could drop anything. In a graph for many resolutions, status,
        reason, grid, text and tokens are also those of the latest call.

        Of all calls, every video self-attention has ``density_by_call``, over samples and heads; ``error_by_call``, the
        largest layer error of a sample; ``pairs_by_call``, batch x heads x queries x keys, None where the graph does
        not show them; and ``mean_density``, kept token pairs over all. The report's ``density`` is the same of all of
        them together; None if there are none.

        Attention with ``eager`` ran outside all graphs. It is here if it was made sparse, or is over as many tokens as
        a video of this report, or over ``min_tokens``.
        """
        attentions = self._entries(self._calls.values())
        videos = {entry["tokens"] for entry in attentions if entry["grid"]}
        told = [self.min_tokens, *(graph.min_tokens for graph, _ in self._calls.values())]
        enough = min((least for least in told if least is not None), default=Options.min_tokens)
        overheard = self._entries(self._overheard.values())
        attentions += [entry for entry in overheard if may_be_of_video(entry["tokens"], videos, enough)]
        density = _density(video_entries(attentions))
        graphs = sum(any(not one.eager for one in graph.attentions) for graph, _ in self._calls.values())
        return {"attentions": attentions, "density": density, "graphs": graphs, "torch": torch.__version__}

    def _entries(self, reported: Iterable[tuple[GraphReport, list[ReportedCall]]]) -> list[dict[str, Any]]:
        attentions = []
        for graph, calls in list(reported):
            observed = zip(*(call.observed for call in calls), strict=True)  # all calls of one sparse attention
            pairs = zip(*(call.pairs for call in calls), strict=True)
            for attention, sizes in zip(graph.attentions, pairs, strict=True):
                entry = {name: _plain(value) for name, value in vars(attention).items() if name not in HIDDEN}
                entry |= dict.fromkeys(OBSERVED) | {"calls": len(calls), "pairs_by_call": [*sizes]}
                entry |= {"density_by_call": [1.0] * len(calls), "error_by_call": [0.0] * len(calls)}
                if attention.status == "sparse":
                    entry |= _observed_entry(attention, next(observed))
                entry["mean_density"] = _density([entry]) or mean(entry["density_by_call"])
                attentions.append(entry)
        return attentions

    def __str__(self) -> str:
        """For a terminal: the latest call of each sparse attention, sample by sample; then the others by reason."""
        found = self.to_dict()
        if not found["attentions"]:
            graphs = plural(len(self._calls), "graph")
            ran = f"{graphs} ran, without any attention: compile what attends, a pipeline's transformer"
            return f"rainfusion: {self.why_empty or ran}"
        return "\n".join([text_of(found), *([self.why_empty] if self.why_empty else [])])

    __repr__ = __str__

    def save(self, path: str | PathLike[str]) -> None:
        """Write a file, by its ending: a page for browsers (html), `plot` (png), ``to_dict()`` (json), or calls (csv).

        Raises:
            ImportError, ValueError: on a png, as `plot` does.
            ValueError: on another ending.
        """
        found, ending = self.to_dict(), Path(path).suffix
        if ending not in (".html", ".png", ".json", ".csv"):
            raise ValueError(f"path must end with .html, .png, .json or .csv; got {str(path)!r}")
        if ending == ".png":
            return figure(found).savefig(path, dpi=150)
        if ending == ".json":
            text = json.dumps(found, indent=2) + "\n"
        else:
            text = page(found, str(self)) if ending == ".html" else table_of_calls(found)
        Path(path).write_text(text, encoding="utf-8")

    def plot(self) -> Any:
        """A ``matplotlib.figure.Figure``: heads by layers, coloured by pattern; density and error over calls.

        Raises:
            ImportError: without matplotlib.
            ValueError: if no attention was sparse.
        """
        return figure(self.to_dict())

    @property
    def why_empty(self) -> str:
        """Why no graph was seen, as far as it can be known; "" if one was."""
        if self._calls:
            return ""
        if self.missed:
            calls = plural(self.missed, "call")
            return f"nothing ran in this thread, {calls} in others: observe(all_threads=True) hears them"
        if self.eager:
            return "nothing ran, for torch.compile is switched off (set_stance('force_eager') or TORCHDYNAMO_DISABLE)"
        return (
            "no graph of this backend ran: nothing was called, or it ran eagerly, or it is compiled by another backend "
            "than 'rainfusion'; call what torch.compile(model, backend='rainfusion') returns"
        )


def _density(entries: list[dict[str, Any]]) -> float | None:
    """Kept token pairs over all of them, in all calls of these attentions; None if nothing is known of their sizes."""
    calls = [zip(entry["density_by_call"], entry["pairs_by_call"], strict=True) for entry in entries]
    known = [(density, pairs) for density, pairs in chain(*calls) if pairs]
    return sum(density * pairs for density, pairs in known) / sum(pairs for _, pairs in known) if known else None


def _plain(value: Any) -> Any:
    """Lists for tuples, and strings for their subclasses."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value


def _observed_entry(attention: AttentionReport, calls: Sequence[Observed]) -> dict[str, Any]:
    latest, realised = calls[-1], calls[-1].realised
    known = realised or attention
    names, patterns = (*known.patterns, DENSE), _patterns(attention, latest)
    choice, recall = latest.choice.cpu().long(), latest.recall.cpu()[..., :patterns]
    spent, energy = _squares(attention, latest)
    wanted = torch.tensor([*known.sparsities, 0.0], dtype=torch.float64)
    taken = recall.gather(-1, choice.clamp_max(patterns - 1)[..., None])[..., 0]
    taken = torch.where(choice == patterns, recall.amax(-1), taken)
    entry = {
        "patterns": [[names[min(number, len(names) - 1)] for number in sample] for sample in choice.tolist()],
        "sparsity": wanted[choice.clamp_max(len(names) - 1)].tolist(),
        "error": (spent / energy).sqrt().tolist(),
        "layer_error": _layer_errors(attention, latest),
        "recall": taken.tolist(),
        "density": latest.densities(attention).tolist(),
        "density_by_call": [float(call.densities(attention).mean()) for call in calls],
        "error_by_call": [max(_layer_errors(attention, call)) for call in calls],
        "too_small": min(known.densities, default=0.0) > SMALL_SAVING and max(known.sparsities) > 0,
    }
    if realised is None:
        return entry
    if realised.layout is None:
        return entry | {"status": "dense", "reason": _plain(realised.reason), "remedy": realised.remedy}
    grid, text = map(_plain, (realised.layout.grid, realised.layout.text))
    return entry | {"grid": grid, "text": text, "tokens": realised.tokens}


def _patterns(attention: AttentionReport, call: Observed) -> int:
    """How many patterns heads could choose from in a call: there may be room for more."""
    return len((call.realised or attention).patterns) or call.recall.shape[-1]


def _squares(attention: AttentionReport, call: Observed) -> tuple[Tensor, Tensor]:
    """The squared error of what each head took, and its output's square, float64 ``[B, H]``."""
    patterns = _patterns(attention, call)
    errors = call.errors.cpu().double()[..., : patterns + 1]
    taken = call.choice.cpu().long().clamp_max(patterns)[..., None]
    spent = pad(errors[..., :-1], (0, 1)).gather(-1, taken)[..., 0]
    return spent, errors[..., -1].clamp_min(torch.finfo(torch.float64).tiny)


def _layer_errors(attention: AttentionReport, call: Observed) -> list[float]:
    spent, energy = _squares(attention, call)
    return (spent.sum(-1) / energy.sum(-1)).sqrt().tolist()
