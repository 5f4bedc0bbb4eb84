# SPDX-License-Identifier: Apache-2.0
"""Imports a repository's own classes from a checkout: without its packages' own imports, on a machine without a GPU.

What one process imports stays imported: a process serves one repository.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.zoo.case import ModelCase
from rainfusion_compile.sparsity.layout import Grid

Build = Callable[[Path, Grid], ModelCase]
Edits = dict[str, str]
"""Source that is read otherwise than it stands in a file; each must be there once or more."""

LAYERS, HEADS, HEAD_DIM = 2, 3, 32
WIDTH, TEXT = HEADS * HEAD_DIM, 16
"""Channels of tokens; tokens of a text."""


@dataclass(frozen=True)
class Official:
    """A class of an official repository and how it is built.

    Attributes:
        repository: owner and name on GitHub; its checkout has that name, without the owner.
        name: of the class. attention: what it calls, in words.
        build: from the checkout's folder and a token grid.
        note: what is otherwise than in the repository.
    """

    repository: str
    name: str
    attention: str
    build: Build
    note: str = ""

    @property
    def folder(self) -> str:
        return self.repository.split("/")[1]


OFFICIAL: list[Official] = []


def official(repository: str, name: str, attention: str, note: str = "") -> Callable[[Build], Build]:
    """Enter a builder of a repository's class."""

    def enter(build: Build) -> Build:
        OFFICIAL.append(Official(repository, name, attention, build, note))
        return build

    return enter


class OfficialCase(ModelCase):
    """A case whose forward takes nothing but its own inputs."""

    def __post_init__(self) -> None:
        inputs = self.inputs
        super().__post_init__()
        self.inputs = inputs


class _Edited(SourceFileLoader):
    """Reads a file otherwise than it is written, and keeps no bytecode of it."""

    def __init__(self, name: str, path: str, edits: Edits) -> None:
        super().__init__(name, path)
        self.edits = edits

    def path_stats(self, path: Any) -> Any:
        raise OSError  # so that bytecode of the file as it is written is not taken

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:  # type: ignore[override]
        text = data.decode()
        for old, new in self.edits.items():
            if old not in text:
                raise ValueError(f"{self.path} has no {old!r}: this checkout is another one")
            text = text.replace(old, new)
        return super().source_to_code(text.encode(), path, _optimize=_optimize)


class _Finder:
    def __init__(self, edits: dict[str, Edits]) -> None:
        self.edits = edits

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in self.edits else None
        if spec is not None and spec.origin:
            spec.loader = _Edited(name, spec.origin, self.edits[name])
        return spec


def import_from(root: Path, name: str, bare: tuple[str, ...] = (), edits: dict[str, Edits] | None = None) -> Any:
    """The module ``name`` of a checkout.

    Packages named in ``bare`` are not run, so that they import nothing else; modules in ``edits`` are read with these.
    """
    sys.dont_write_bytecode = True
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
        sys.meta_path.insert(0, _Finder(edits or {}))
    for package in bare:
        if package not in sys.modules:
            module = stand_in(package)
            module.__path__ = [str(root.joinpath(*package.split(".")))]
    return importlib.import_module(name)


def stand_in(name: str, **contents: Any) -> ModuleType:
    """A module that nothing is loaded for, which has these contents and nothing else."""
    module = sys.modules.get(name)
    if module is None:
        module = sys.modules[name] = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(stand_in(parent), last, module)
    vars(module).update(contents)
    return module


def flash_attention() -> None:
    """Let flash-attn be installed, as stand-ins."""
    from benchmarks.zoo import flash_stand_in

    flash_stand_in.define("flash_attn")
    functions = {name: getattr(flash_stand_in, name) for name in ("flash_attn_func", "flash_attn_varlen_func")}
    stand_in("flash_attn", __version__="2.8.0", **functions)
    stand_in("flash_attn.flash_attn_interface", _flash_attn_forward=None, **functions)
