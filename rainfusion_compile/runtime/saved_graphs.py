# SPDX-License-Identifier: Apache-2.0
"""Compiled graphs as bytes, for ``torch.compile(...).aot_compile``: what Inductor made, and the graph to analyse again.

Tables of blocks, which are buffers of what Inductor compiled, are saved as they are. What is looked up in each call
comes from the same analysis as before, of the same graph; so files are for the version that wrote them.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
from torch._functorch import config

from rainfusion_compile.options import Options
from rainfusion_compile.passes.graph.graph_bytes import dump_graph, load_graph
from rainfusion_compile.passes.normalize import normalize
from rainfusion_compile.passes.provenance.known_tokens import Told
from rainfusion_compile.passes.rewrite.analysis import Plan


def is_to_be_saved() -> bool:
    """Whether Dynamo compiles for a file, not for this process alone."""
    return bool(config.bundled_autograd_cache)


@dataclass(frozen=True)
class Original:
    """A graph as Dynamo made it, before anything was written into it: its bytes, or why there are none."""

    data: bytes = b""
    obstacle: str = "it was not compiled by aot_compile"

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Original:
        """That of a graph, if it is to be saved."""
        if not is_to_be_saved():
            return cls()
        try:
            return cls(dump_graph(gm), "")
        except Exception as error:  # whatever code of others put into the graph
            return cls(obstacle=str(error))

    def refuse(self) -> NoReturn:
        """Raises RuntimeError: the graph cannot be saved."""
        raise RuntimeError(f"rainfusion: this graph cannot be saved: {self.obstacle}")

    def plan(self, options: Options, known: Told, *, any_size: bool = False) -> Plan:
        """What was to become of it, found again."""
        gm = load_graph(self.data)
        return Plan(gm, options, normalize(gm, known.holds), known, any_size=any_size)


@dataclass(frozen=True)
class SavedCode:
    """What Inductor made of a graph, and the tables that it has as buffers."""

    data: bytes
    buffers: tuple[Tensor, ...]

    @classmethod
    def of(cls, compiled: Any, module: fx.GraphModule) -> SavedCode:
        """Raises RuntimeError if Inductor's part cannot be saved."""
        if getattr(compiled, "serialize", None) is None:
            raise RuntimeError("rainfusion: this graph cannot be saved: Inductor made nothing that can be")
        parameters = [tensor for _, tensor in module.named_parameters(remove_duplicate=False)]
        buffers = [tensor for _, tensor in module.named_buffers(remove_duplicate=False)]
        bundle = BundledAOTAutogradSerializableCallable(compiled)
        data = BundledAOTAutogradSerializableCallable.serialize_compile_artifacts(bundle)
        return cls(data, (*(tensor.detach() for tensor in parameters), *buffers))

    def load(self) -> Callable[..., Sequence[Any]]:
        """What takes the arguments that `of` was given took."""
        bundle = BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts(self.data)
        return lambda *args: bundle(*self.buffers, *args)


def dump(state: Any) -> bytes:
    """The state of a compiled graph as bytes, with the versions that it is for."""
    return pickle.dumps((_versions(), pickle.dumps(state)))


def load(data: bytes) -> Any:
    """What `dump` was given. Raises RuntimeError if it is of another version of this package, or of torch."""
    versions, state = pickle.loads(data)
    if versions != _versions():
        raise RuntimeError(f"rainfusion: this was saved by {versions}, and this is {_versions()}: compile it again")
    return pickle.loads(state)


@functools.cache
def _versions() -> str:
    """This package's version, by its source, and torch's."""
    root = Path(__file__).parents[1]
    source = b"".join(file.read_bytes() for file in sorted(root.rglob("*.py")))
    return f"rainfusion-compile of source {hashlib.sha256(source).hexdigest()[:16]} under torch {torch.__version__}"
