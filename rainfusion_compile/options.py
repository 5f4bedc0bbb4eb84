# SPDX-License-Identifier: Apache-2.0
"""The options of ``torch.compile(model, backend="rainfusion", options={...})``."""

from __future__ import annotations

import ast
import difflib
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from rainfusion_compile.sparsity.block_tables import BlockTables, block_tables
from rainfusion_compile.sparsity.candidates import MAX_CANDIDATES, most_candidates
from rainfusion_compile.sparsity.layout import Grids, VideoLayout, as_grids, checked_grids, checked_ints
from rainfusion_compile.sparsity.patterns import BY_NAME, PATTERNS, PatternName

PRESETS = {"quality": 0.02, "balanced": 0.04, "fast": 0.1}
"""Their errors; docs/quality.md has what each came to."""
DEFAULT_LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.35)
"""Sparsities that heads take a pattern at; fewer of them where there are more patterns than the package has."""
RULES = {"error": {"error": PRESETS["balanced"]}, "recall": {"recall_target": 0.95, "min_recall": 0.8}}
"""The rules of the ARM, and what each has to be told."""
VARIABLE = "RAINFUSION_OPTIONS"
"""Of the environment: options for programs that pass on no more than a backend's name."""
TOGETHER = ({"arm", "preset", *(name for rule in RULES.values() for name in rule)}, {"grid", "text"})
"""Options that are told together: who tells one of them, tells all."""
DENSE = (-1.0, 2.0)
"""Limits that no candidate keeps, by either rule."""


@dataclass(frozen=True)
class Options:
    """What to make sparse, and how much. Frozen; checked on construction.

    Attributes:
        sparsity: wanted shares of dropped token pairs, one or several in [0, 1); realised ones come as near as the grid
            lets them. A head takes a pattern at one of them, or stays dense.
        patterns: the patterns that heads may take: RainFusion's "spatial", "temporal" and "textural", and, with
            arm="error", "adaptive", which reads the key blocks that suit each query block most. All that there are, if
            it is None.
        arm: how a head's pattern and sparsity are chosen, on every call. By "error": what drops most, while the error
            of what comes out of all heads of an attention stays within `error`. By "recall", the rule of the RainFusion
            paper: the sparsest that holds `recall_target` of the head's attention mass.
        error: root of the heads' summed squared output error over their outputs' squares.
        recall_target: with arm="recall", 0.95 by default; a head that no pattern serves so well takes the best one.
        min_recall: with arm="recall", a head whose best pattern holds less than this share (0.8) stays dense.
        preset: with arm="error", what `error` is unless it is told: "quality" (0.02), "balanced" (0.04, the default) or
            "fast" (0.1).
        grid: ``(T, H, W)`` in tokens, for self-attentions with that many tokens whose grid the graph does not show;
            None infers it. Where it contradicts the graph, attention stays dense. For several videos, a tuple of such.
        text: likewise, ``(before, after)`` text tokens around the video, or one number more than there are videos.
        min_tokens: attentions over fewer tokens stay dense: blocks cover most of a small grid, and launches take time.
        dense_steps: the part of the noise levels, from the highest on, at which attention stays dense, in [0, 1]; or a
            pair, from the highest and from the lowest. A level is the timestep, as the model embeds it, over 1000; with
            a shifted schedule, many steps have high levels. Where a graph neither shows the timestep nor is handed what
            another one made of it, attention stays dense; see :func:`rainfusion_compile.dense_first_steps`.
        dense_layers: video attentions to leave dense, by their number in the order they run (negative: from the end);
            an int n means the first n.
        precision: "full" multiplies queries and keys as they are. "int8" rounds both to 8-bit integers, for GPUs of
            compute capability 9.0 (H100, H200), head_dim 128 and 16-bit dtypes; `error` counts what the rounding costs.
        strict: raise an error, with name, reason and remedy, where attention over at least `min_tokens` tokens that is
            no cross-attention stays dense unasked.
        inductor_mode: what ``mode=`` is to ``torch.compile``, for use together with options.
        inductor: options passed on to Inductor, as ``torch.compile(model, options=...)`` takes them.

    Raises:
        ValueError: on a value that cannot be, naming it and what would be accepted.
    """

    sparsity: float | tuple[float, ...] = DEFAULT_LADDER
    patterns: tuple[PatternName, ...] | None = None
    arm: Literal["error", "recall"] = "error"
    error: float | None = None
    recall_target: float | None = None
    min_recall: float | None = None
    preset: Literal["quality", "balanced", "fast"] | None = None
    grid: Grids | None = None
    text: tuple[int, ...] | None = None
    min_tokens: int = 8192
    dense_steps: float | tuple[float, float] = 0.0
    dense_layers: tuple[int, ...] | int = ()
    precision: Literal["full", "int8"] = "full"
    strict: bool = False
    inductor_mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", _checked_sparsity(self.sparsity))
        if self.arm not in tuple(RULES):  # whatever it is: a list has no hash
            raise ValueError(f"arm must be one of {', '.join(map(repr, RULES))}; got {self.arm!r}")
        if self.preset is not None and (self.arm != "error" or self.preset not in tuple(PRESETS)):
            accepted = f"preset must be one of {', '.join(map(repr, PRESETS))}, with arm='error'"
            raise ValueError(f"{accepted}; got {self.preset!r} with arm={self.arm!r}")
        for arm, defaults in RULES.items():
            for name, usual in defaults.items():
                usual = PRESETS[self.preset] if self.preset is not None else usual
                share = getattr(self, name)
                if share is not None and self.arm != arm:
                    raise ValueError(f"{name} belongs to arm={arm!r}; got {name}={share!r} with arm={self.arm!r}")
                if self.arm == arm:
                    share = usual if share is None else share
                    if not _is_share(share):
                        raise ValueError(f"{name} must be a number in [0, 1]; got {share!r}")
                    object.__setattr__(self, name, share)
        possible = tuple(BY_NAME) if self.by_error else PATTERNS
        object.__setattr__(self, "patterns", _checked_patterns(self.patterns, possible, self.arm))
        most = MAX_CANDIDATES // most_candidates(1, self.names)
        if len(self.ladder) > most and self.sparsity == DEFAULT_LADDER:  # of more patterns than there are
            object.__setattr__(self, "sparsity", _evenly(DEFAULT_LADDER, most))
        if len(self.ladder) > most:
            accepted = f"at most {most} numbers for patterns {', '.join(self.names)}"
            raise ValueError(f"sparsity must have {accepted}; got {len(self.ladder)}: {self.sparsity!r}")
        if self.grid is not None:
            object.__setattr__(self, "grid", checked_grids("grid", self.grid))
        if self.text is not None:
            several = isinstance(self.text, (tuple, list)) and len(self.text) > 2  # of videos that the graph shows
            count = len(as_grids(self.grid)) + 1 if self.grid is not None else len(self.text) if several else 2
            object.__setattr__(self, "text", checked_ints("text", self.text, count, minimum=0))
        if not _is_int(self.min_tokens) or self.min_tokens < 0:
            raise ValueError(f"min_tokens must be an integer of at least 0; got {self.min_tokens!r}")
        steps: Any = self.dense_steps
        steps = tuple(steps) if isinstance(steps, (list, tuple)) else (steps, 0.0)
        if len(steps) != 2 or not all(map(_is_share, steps)):
            raise ValueError(f"dense_steps must be a number in [0, 1], or a pair of such; got {self.dense_steps!r}")
        object.__setattr__(self, "dense_steps", steps)
        layers: Any = self.dense_layers
        layers = range(layers) if _is_int(layers) and layers >= 0 else layers
        if isinstance(layers, str) or not isinstance(layers, Sequence) or not all(map(_is_int, layers)):
            raise ValueError(f"dense_layers must be an integer of at least 0 or a sequence of integers; got {layers!r}")
        object.__setattr__(self, "dense_layers", tuple(layers))
        if self.precision not in ("full", "int8"):
            hint = "; 'int8' is more exact than float8" if "8" in str(self.precision) else ""
            raise ValueError(f"precision must be 'full' or 'int8'; got {self.precision!r}{hint}")
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict must be True or False; got {self.strict!r}")
        _check_inductor(self.inductor_mode, self.inductor)

    @property
    def ladder(self) -> tuple[float, ...]:
        """The sparsities, highest first."""
        return self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)

    @property
    def names(self) -> tuple[PatternName, ...]:
        """The patterns that heads may take."""
        assert self.patterns is not None
        return self.patterns

    @property
    def by_error(self) -> bool:
        return self.arm == "error"

    @property
    def limits(self) -> tuple[float, float]:
        """``error``, or ``recall_target`` and ``min_recall``, as the operators take them."""
        first, second = (self.error, 0.0) if self.by_error else (self.recall_target, self.min_recall)
        assert first is not None
        assert second is not None
        return first, second

    @property
    def dense_levels(self) -> tuple[float, float]:
        """The noise levels from which on, and to which, attention is dense: outside all levels where it is not."""
        assert isinstance(self.dense_steps, tuple)
        first, last = self.dense_steps
        return (1.0 - first if first else math.inf), (last or -math.inf)

    def all_limits(self, device: torch.device) -> Tensor:
        """What a graph takes, float32 ``[3, 2]``: ``limits``, ``dense_levels``, and limits that nothing keeps."""
        return constant((self.limits, self.dense_levels, DENSE), device)

    def rule(self, device: torch.device) -> tuple[bool, Tensor]:
        """``by_error`` and ``limits``, float32 ``[1, 2]``, as the operators take them."""
        return self.by_error, constant((self.limits,), device)

    def tables(self, layout: VideoLayout, device: torch.device | None = None) -> BlockTables:
        """The candidates over a layout. By error, windows are filled up with samples; by recall they stand alone."""
        with real_tensors():
            return block_tables(
                layout,
                sparsity=self.ladder,
                patterns=self.names,
                sampled=self.by_error,
                int8=self.precision == "int8",
                device=device,
            )

    @classmethod
    def parse(cls, options: Options | Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Options as ``torch.compile`` hands them to a backend: its ``options`` as they are, or its ``mode``.

        A mapping, or none, is filled up with those of the environment variable ``RAINFUSION_OPTIONS``.
        """
        if isinstance(options, Options):
            return options
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"options must be rainfusion_compile.Options or a mapping; got {options!r}")
        given = dict(options or {}) | ({} if mode is None else {"inductor_mode": mode})
        told = {name for group in TOGETHER if group & given.keys() for name in group} | given.keys()
        usual = {name: value for name, value in cls._of_environment().items() if name not in told}
        return cls._checked(usual | given)

    @classmethod
    def _of_environment(cls) -> dict[str, Any]:
        """The options of the environment. Raises ValueError, naming the variable, if they are none."""
        given = os.environ.get(VARIABLE, "").strip()
        try:
            options = _read(given)
            cls._checked(options)
        except ValueError as error:
            raise ValueError(f"environment variable {VARIABLE}={given!r}: {error}") from error
        return options

    @classmethod
    def _checked(cls, given: dict[str, Any]) -> Options:
        known = [option.name for option in fields(cls)]
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
        return cls(**given)


@functools.lru_cache(256)
def constant(values: tuple[tuple[float, ...], ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that is made once: copying it to a GPU in each call would cost time, and cannot be recorded."""
    with torch.inference_mode(False), real_tensors():
        return torch.tensor(values, dtype=dtype, device=device)


def real_tensors() -> AbstractContextManager[Any]:
    """What is made here is remembered: while `torch.export` traces, it is a constant, and nothing that it traces."""
    return nullcontext() if torch.compiler.is_dynamo_compiling() else _disable_current_modes()


def _read(given: str) -> dict[str, Any]:
    """Options as text: a JSON object, or ``name=value,name=value``, where a value may have commas of its own."""
    if given.startswith("{"):
        try:
            return dict(json.loads(given))
        except json.JSONDecodeError as error:
            raise ValueError(f"what begins with {{ is read as JSON, and this is none: {error}") from error
    options = {}
    for item in re.split(r",(?=\s*\w+\s*=)", given) if given else ():
        name, sign, value = (part.strip() for part in item.partition("="))
        if not sign or not value:
            raise ValueError(f"options are name=value, joined by commas, or a JSON object; got {item.strip()!r}")
        options[name] = _value(value)
    if isinstance(options.get("patterns"), str):  # one word, of several that could be
        options["patterns"] = [options["patterns"]]
    return options


def _value(text: str) -> Any:
    """A number, True, a tuple, or whatever else Python or JSON write so; else words, or one."""
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    words = [word.strip() for word in text.split(",")]
    return words if len(words) > 1 else text


def _checked_patterns(patterns: object, possible: tuple[PatternName, ...], arm: str) -> tuple[PatternName, ...]:
    """``patterns`` as a tuple without repetitions, or a ``ValueError`` naming what is wrong."""
    accepted = f"one or more of {', '.join(map(repr, possible))} with arm={arm!r}"
    if patterns is None:
        return possible
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise ValueError(f"patterns must be a sequence with {accepted}; got {patterns!r}")
    names = tuple(patterns)
    for name in names:
        if name not in possible:
            raise ValueError(f"unknown pattern {name!r}{_nearest(name, possible)}; patterns takes {accepted}")
    if not names:
        raise ValueError(f"patterns must have {accepted}; got none")
    return tuple(dict.fromkeys(names))


def _check_inductor(mode: object, options: object) -> None:
    if not isinstance(options, Mapping):
        raise ValueError(f"inductor must be a mapping of Inductor's options; got {options!r}")
    if mode is None and not options:
        return  # listing what Inductor takes costs milliseconds, and `attention` makes Options on every call
    from torch import _inductor

    modes = [*dict.fromkeys(["default", *_inductor.list_mode_options()])]
    if mode is not None and mode not in modes:
        raise ValueError(f"unknown inductor_mode {mode!r}{_nearest(mode, modes)}; it takes {', '.join(modes)}")
    known = _inductor.list_options()
    for name in options:
        if str(name).replace("-", "_") not in known:
            raise ValueError(f"unknown Inductor option {name!r}{_nearest(name, known)}")


def _nearest(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _evenly(ladder: tuple[float, ...], most: int) -> tuple[float, ...]:
    """So many numbers of a ladder, the first and the last among them if there are two or more."""
    return tuple(ladder[i * (len(ladder) - 1) // max(most - 1, 1)] for i in range(most))


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
