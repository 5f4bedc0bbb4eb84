# SPDX-License-Identifier: Apache-2.0
"""The options of ``torch.compile(model, backend="rainfusion", options={...})``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from rainfusion_compile.sparsity.block_tables import BlockTables, block_tables
from rainfusion_compile.sparsity.layout import Grids, VideoLayout, as_grids, checked_grids, checked_ints
from rainfusion_compile.sparsity.patterns import PATTERNS, PatternName

RULES = {"error": {"error": 0.05}, "recall": {"recall_target": 0.95, "min_recall": 0.8}}
"""The rules of the ARM, and what each has to be told."""
MAX_CANDIDATES = 30  # patterns times sparsities: bits of an int32, beside the sign and dense attention


@dataclass(frozen=True)
class Options:
    """What to make sparse, and how much. Frozen; checked on construction.

    Attributes:
        sparsity: wanted shares of dropped token pairs, one or several in [0, 1); realised ones come as near as the grid
            lets them. A head takes a pattern at one of them, or stays dense.
        patterns: the patterns that heads may take, some of "spatial", "temporal", "textural".
        arm: how a head's pattern and sparsity are chosen, on every call. By "error": what drops most, while the error
            of what comes out of all heads of an attention stays within `error`. By "recall", the rule of the RainFusion
            paper: the sparsest that holds `recall_target` of the head's attention mass.
        error: root of the heads' summed squared output error over their outputs' squares; 0.05 by default.
        recall_target: with arm="recall", 0.95 by default; a head that no pattern serves so well takes the best one.
        min_recall: with arm="recall", a head whose best pattern holds less than this share (0.8) stays dense.
        grid: ``(T, H, W)`` in tokens, for self-attentions with that many tokens whose grid the graph does not show;
            None infers it. Where it contradicts the graph, attention stays dense. For several videos, a tuple of such.
        text: likewise, ``(before, after)`` text tokens around the video, or one number more than there are videos.
        min_tokens: attentions over fewer tokens stay dense: blocks cover most of a small grid, and launches take time.
        dense_layers: video attentions to leave dense, by their number in the order they run (negative: from the end);
            an int n means the first n.
        inductor_mode: what ``mode=`` is to ``torch.compile``, for use together with options.
        inductor: options passed on to Inductor, as ``torch.compile(model, options=...)`` takes them.

    Raises:
        ValueError: on a value that cannot be, naming it and what would be accepted.
    """

    sparsity: float | tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.35)
    patterns: tuple[PatternName, ...] = PATTERNS
    arm: Literal["error", "recall"] = "error"
    error: float | None = None
    recall_target: float | None = None
    min_recall: float | None = None
    grid: Grids | None = None
    text: tuple[int, ...] | None = None
    min_tokens: int = 8192
    dense_layers: tuple[int, ...] | int = ()
    inductor_mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", _checked_sparsity(self.sparsity))
        if self.arm not in tuple(RULES):  # whatever it is: a list has no hash
            raise ValueError(f"arm must be one of {', '.join(map(repr, RULES))}; got {self.arm!r}")
        for arm, defaults in RULES.items():
            for name, usual in defaults.items():
                share = getattr(self, name)
                if share is not None and self.arm != arm:
                    raise ValueError(f"{name} belongs to arm={arm!r}; got {name}={share!r} with arm={self.arm!r}")
                if self.arm == arm:
                    share = usual if share is None else share
                    if not _is_share(share):
                        raise ValueError(f"{name} must be a number in [0, 1]; got {share!r}")
                    object.__setattr__(self, name, share)
        object.__setattr__(self, "patterns", _checked_patterns(self.patterns))
        if len(self.ladder) * len(self.patterns) > MAX_CANDIDATES:
            most = f"at most {MAX_CANDIDATES // len(self.patterns)} numbers for {len(self.patterns)} patterns"
            raise ValueError(f"sparsity must have {most}; got {len(self.ladder)}: {self.sparsity!r}")
        if self.grid is not None:
            object.__setattr__(self, "grid", checked_grids("grid", self.grid))
        if self.text is not None:
            several = isinstance(self.text, (tuple, list)) and len(self.text) > 2  # of videos that the graph shows
            count = len(as_grids(self.grid)) + 1 if self.grid is not None else len(self.text) if several else 2
            object.__setattr__(self, "text", checked_ints("text", self.text, count, minimum=0))
        if not _is_int(self.min_tokens) or self.min_tokens < 0:
            raise ValueError(f"min_tokens must be an integer of at least 0; got {self.min_tokens!r}")
        layers: Any = self.dense_layers
        layers = range(layers) if _is_int(layers) and layers >= 0 else layers
        if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(map(_is_int, layers)):
            raise ValueError(f"dense_layers must be an integer of at least 0 or a sequence of integers; got {layers!r}")
        object.__setattr__(self, "dense_layers", tuple(layers))
        _check_inductor(self.inductor_mode, self.inductor)

    @property
    def ladder(self) -> tuple[float, ...]:
        """The sparsities, highest first."""
        return self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)

    @property
    def rule(self) -> tuple[float | None, float, float]:
        """``error``, ``recall_target`` and ``min_recall``, as the operators take them."""
        return self.error, self.recall_target or 0.0, self.min_recall or 0.0

    def tables(self, layout: VideoLayout, device: torch.device | None = None) -> BlockTables:
        """The candidates over a layout. By error, windows are filled up with samples; by recall they stand alone."""
        sampled = self.arm == "error"
        return block_tables(layout, sparsity=self.ladder, patterns=self.patterns, sampled=sampled, device=device)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Options as ``torch.compile`` hands them to a backend: its ``options`` mapping, or its ``mode``."""
        given, known = dict(options or {}), [option.name for option in fields(cls)]
        for name in given:
            if name in known:
                continue
            if name == "mode":
                raise ValueError("unknown option 'mode'; inside options it is called 'inductor_mode'")
            from torch import _inductor  # here: importing a backend must stay cheap

            if name in _inductor.list_options():
                place = f"options={{'inductor': {{{name!r}: ...}}}}"
                raise ValueError(f"unknown option {name!r}; Inductor's options go into {place}")
            raise ValueError(f"unknown option {name!r}{_nearest(name, known)}; known options: {', '.join(known)}")
        return cls(**given | ({} if mode is None else {"inductor_mode": mode}))


def _checked_patterns(patterns: object) -> tuple[PatternName, ...]:
    """``patterns`` as a tuple without repetitions, or a ``ValueError`` naming what is wrong."""
    accepted = f"one or more of {', '.join(map(repr, PATTERNS))}"
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise ValueError(f"patterns must be a sequence with {accepted}; got {patterns!r}")
    names = tuple(patterns)
    for name in names:
        if name not in PATTERNS:
            raise ValueError(f"unknown pattern {name!r}{_nearest(name, PATTERNS)}; patterns takes {accepted}")
    if not names:
        raise ValueError(f"patterns must have {accepted}; got none")
    return tuple(dict.fromkeys(names))


def _check_inductor(mode: object, options: object) -> None:
    if not isinstance(options, Mapping):
        raise ValueError(f"inductor must be a mapping of Inductor's options; got {options!r}")
    if mode is None and not options:
        return  # listing what Inductor takes costs milliseconds, and `attention` makes Options on every call
    from torch import _inductor

    modes = ["default", *_inductor.list_mode_options()]
    if mode is not None and mode not in modes:
        raise ValueError(f"unknown inductor_mode {mode!r}{_nearest(mode, modes)}; it takes {', '.join(modes)}")
    known = _inductor.list_options()
    for name in options:
        if str(name).replace("-", "_") not in known:
            raise ValueError(f"unknown Inductor option {name!r}{_nearest(name, known)}")


def _nearest(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _checked_sparsity(given: object) -> float | tuple[float, ...]:
    each = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if not each or not all(_is_share(share) and share < 1 for share in each):
        raise ValueError(f"sparsity must be a number in [0, 1), or several; got {given!r}")
    if not isinstance(given, (list, tuple)):
        return float(given)  # type: ignore[arg-type]
    return tuple(sorted({float(share) for share in each}, reverse=True))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
