# SPDX-License-Identifier: Apache-2.0
"""Run time: compiled graphs tell an open report what their heads chose, and each other what their tokens are.

Each rewritten graph returns what its heads chose, and why, as extra outputs, dropped here unless someone looks. So
nothing is written from inside a graph, and CUDA graphs and compile caches work as always.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.aot_compile_types import SerializableCallable
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor

from rainfusion_compile.inductor import compile_with_inductor
from rainfusion_compile.options import Options
from rainfusion_compile.passes.attention_match import Reason
from rainfusion_compile.passes.graph.mutation import repeatable
from rainfusion_compile.passes.graph.nodes import copy_graph, example_of
from rainfusion_compile.passes.normalize import normalize
from rainfusion_compile.passes.provenance.known_tokens import NOTHING, Told
from rainfusion_compile.passes.rewrite.analysis import CallLayouts, Plan
from rainfusion_compile.passes.rewrite.guards import fix_floats, guard_forward_ad, specialise
from rainfusion_compile.passes.rewrite.level_flow import LevelFlow
from rainfusion_compile.passes.rewrite.notices import Notices, Silence
from rainfusion_compile.passes.rewrite.summary import check_given, realised, summarize
from rainfusion_compile.passes.rewrite.writer import write
from rainfusion_compile.report import Observed, Realised
from rainfusion_compile.runtime.carry import attach, carried_by, claims
from rainfusion_compile.runtime.changed_options import Limits
from rainfusion_compile.runtime.levels import HeardLevels, Levels
from rainfusion_compile.runtime.open_reports import listening
from rainfusion_compile.runtime.outside_knowledge import Heard, Listener, Predictor
from rainfusion_compile.runtime.saved_graphs import Original, SavedCode, dump, load
from rainfusion_compile.runtime.without_attention import without_attention
from rainfusion_compile.sparsity.layout_codec import decode

MAX_VARIANTS = 64  # of one graph; what comes after stays dense
MAX_RESOLUTIONS = 64  # how many sizes of inputs a graph remembers layouts of; it forgets the least recently used


class CompiledGraph(SerializableCallable):
    """A compiled graph that tells an open report what its heads chose, and its outputs what their tokens are.

    Both are looked up by the sizes of the inputs one by one, so 45x80 and 80x45 are two entries, and by what is known
    of the tokens from outside. What was not seen before costs one analysis. ``repeats``: whether a run may be dropped.
    ``save``: what makes its saved state, if it can be saved.
    """

    def __init__(
        self,
        compiled: Callable[..., Sequence[Any]],
        plan: Plan,
        outside: Listener,
        repeats: bool,
        limits: Limits,
        flow: LevelFlow,
        save: Callable[[], _Saved],
    ) -> None:
        self.compiled, self.options, self.sizes = compiled, plan.options, plan.sizes
        self.limits, self.levels, self.save = limits, Levels(flow, limits), save
        self.report = summarize(plan)
        self.each = 4 if plan.any_size else 3  # outputs of an attention: choice, errors, recall, layout at any size
        self.extra = self.each * len(plan.sparse)
        self.always = plan.first if plan.sparse and not plan.any_size else None  # guards hold its sizes
        self.pairs = lru_cache(MAX_RESOLUTIONS)(plan.pairs)
        self.at: Callable[[tuple[int, ...], Told], CallLayouts] = lru_cache(MAX_RESOLUTIONS)(plan.at)
        self.seen: set[tuple[tuple[int, ...], Told]] = set()
        known = plan.known if plan.sparse else None  # what is sparse over what it shows itself is so, whatever is heard
        self.listen: Callable[[Sequence[Any]], Heard] = partial(_notes, known=known)
        if (plan.any_size and known) or plan.passes_on:
            self.listen = outside.listen
        elif self.always and not any(self.always.carried):
            self.listen = lambda _: Heard({}, lambda _: plan.known)
        self.given, self.tell, self.of_another_module = outside.given, plan.tell, outside.of_another_module
        self.predicted = Predictor(repeats)
        self.told_apart_by, self.runs = plan.told_apart_by, without_attention(plan)

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self.predicted(self.listen(args), partial(self.has_seen, args), partial(self.start, args))

    @classmethod
    def serialize_compile_artifacts(cls, fn: CompiledGraph) -> bytes:
        """The graph as bytes, for a file. Raises RuntimeError if that cannot be."""
        return dump(fn.save())

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> CompiledGraph:
        """What was saved. Raises RuntimeError if that was by another version."""
        saved: _Saved = load(data)
        return saved.graph(Listener(saved.options))

    def has_seen(self, args: Sequence[Any], known: Told) -> bool:
        """Whether a call of which this is known needs no analysis."""
        return self.always is not None or (self.sizes.of(args), known) in self.seen

    def start(self, args: Sequence[Any], known: Told) -> Callable[[], Sequence[Any]]:
        """Run a call of which this is known. What comes back finishes it, and returns its outputs."""
        if self.runs is not None:
            self.runs()
        if self.told_apart_by is not None and self.of_another_module(args[self.told_apart_by]):
            raise ValueError(
                f"dense_layers={self.options.dense_layers} cannot tell apart the blocks of a model that are compiled "
                "one by one: leave it out, and the blocks that are to be dense uncompiled or to another backend"
            )
        found = self.always
        if found is None:
            call = self.sizes.of(args), known
            found = self.at(*call)
            if call not in self.seen and len(self.seen) >= MAX_RESOLUTIONS:
                self.seen.clear()  # so that these are never more than are remembered
            self.seen.add(call)
        check_given(found.shown, self.given(), self.tell)
        heard = self.levels.heard(args)  # before the graph may write into its inputs
        inputs = *found.inputs, *self.limits.now(), *self.levels.inputs(args, heard)
        return partial(self._finish, args, found, heard, self.compiled(*args, *inputs))

    def _finish(
        self, args: Sequence[Any], found: CallLayouts, heard: HeardLevels, outputs: Sequence[Any]
    ) -> Sequence[Any]:
        outputs = self.levels.tell(args, heard, outputs)
        if any(found.carried):
            attach(outputs, found.carried, args)
        split = len(outputs) - self.extra
        # Where DistributedDataParallel splits a graph, what is compiled of it is called with fake tensors first.
        if (reports := listening()) and not any(isinstance(output, FakeTensor) for output in outputs):
            chosen = [outputs[start : start + self.each] for start in range(split, len(outputs), self.each)]
            observed = list(map(self._observed, chosen, found.reasons, found.partial_queries))
            for report in reports:
                report.add(self.report, observed, self.pairs(self.sizes.of(args)))
        return outputs[:split]

    def _observed(self, outputs: Sequence[Tensor], reason: Reason | None, partial_queries: int) -> Observed:
        choice, errors, recall, *row = outputs
        known = None
        if row:
            layout = decode(row[0].tolist())
            remedy = None if reason is None else reason.kind.remedy
            dense = Realised(reason=reason, remedy=remedy)
            known = dense if layout is None else realised(layout, self.options, partial_queries)
        # a CUDA graph writes its next call over these
        return Observed(choice.clone(), errors.clone(), recall.clone(), known)


class WaitingGraph(SerializableCallable):
    """A graph that does not show its grid, compiled anew for everything that its inputs or the context say of it.

    Looked up on every call, so no call runs with another's grid. What is not known stays dense. Such a graph is fixed
    to its sizes; a dynamic one comes here only if nothing was known of its tokens when Dynamo made it. One that was
    loaded from a file has the `variants` that were saved, and stays dense for what is none of them.
    """

    def __init__(
        self,
        options: Options,
        outside: Listener,
        repeats: bool,
        make: Callable[[Told, Notices], CompiledGraph],
        tell: Notices,
    ) -> None:
        self.options, self.outside, self.repeats, self.make, self.tell = options, outside, repeats, make, tell
        self.variants: dict[Told, CompiledGraph] = {}
        self.lock = threading.Lock()
        self.predicted = Predictor(repeats)

    @classmethod
    def of(cls, plan: Plan, outside: Listener, original: Original) -> WaitingGraph:
        """One that waits for what the calls of a plan bring."""
        gm, options, tell = plan.gm, plan.options, plan.tell
        guard_forward_ad()
        fix_floats(gm)
        specialise(gm)
        # Not the inputs of this call: they would be kept, and Inductor would take their sizes for symbols of its own,
        # for by the time it sees them, Dynamo has forgotten what it knew of them.
        examples = [example_of(node) for node in gm.graph.find_nodes(op="placeholder")]
        context = TracingContext.try_get()
        dense: list[Callable[..., Sequence[Any]]] = []  # as it is compiled for all that makes nothing sparse

        def make(known: Told, tell: Notices) -> CompiledGraph:
            with tracing(context):  # what Dynamo knows of the graph's parameters
                graph = copy_graph(gm)
                plan = Plan(graph, options, normalize(graph, known.holds), known, tell=tell)
                compiled = None if plan.sparse or not dense else dense[0]
                made = compile_plan(plan, examples, outside, original, compiled)
            if not plan.sparse:
                dense[:] = [made.compiled]
            return made

        return cls(options, outside, repeatable(gm.graph), make, tell)

    def compile_for(self, args: Sequence[Any]) -> None:
        """Compile now what calls like this one need, and all others, for a file that can compile nothing."""
        self._variant(self.outside.listen(args).wait())
        if NOTHING not in self.variants and not self.options.strict:
            self.variants[NOTHING] = self.make(NOTHING, Silence())  # that it is dense surprises nobody yet

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self.predicted(self.outside.listen(args), partial(self._has_seen, args), partial(self._start, args))

    @classmethod
    def serialize_compile_artifacts(cls, fn: WaitingGraph) -> bytes:
        """What it was compiled for as bytes, for a file. Raises RuntimeError if that cannot be."""
        saved = {known: variant.save() for known, variant in fn.variants.items()}
        return dump((fn.options, fn.repeats, saved))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> WaitingGraph:
        """What was saved. Raises RuntimeError if that was by another version."""
        options, repeats, saved = load(data)
        outside, tell = Listener(options), Notices()
        variants = {known: one.graph(outside) for known, one in saved.items()}

        def make(known: Told, tell: Notices) -> CompiledGraph:
            message = "attention stays dense: this file was compiled for other videos; compile it for one like this"
            if options.strict:
                raise RuntimeError(f"strict=True, but {message}")
            tell(message)
            return variants[NOTHING]

        graph = cls(options, outside, repeats, make, tell)
        graph.variants |= variants
        return graph

    def _has_seen(self, args: Sequence[Any], known: Told) -> bool:
        variant = self.variants.get(known)
        return variant is not None and variant.has_seen(args, known)

    def _start(self, args: Sequence[Any], known: Told) -> Callable[[], Sequence[Any]]:
        return self._variant(known).start(args, known)

    def _variant(self, known: Told) -> CompiledGraph:
        variant = self.variants.get(known)
        if variant is None:
            with self.lock:
                key = known if len(self.variants) < MAX_VARIANTS else NOTHING
                if key not in self.variants:
                    self.variants[key] = self.make(key, self.tell)
                variant = self.variants[key]
        return variant


def compile_plan(
    plan: Plan,
    example_inputs: Sequence[Any],
    outside: Listener,
    original: Original,
    compiled: Callable[..., Sequence[Any]] | None = None,
) -> CompiledGraph:
    """Write a plan's operators into its graph and let Inductor compile it, unless that is given as it is `compiled`."""
    sparse = bool(plan.sparse)
    # What is sparse over a grid that it shows itself runs for that, whatever is heard.
    repeats = (sparse and not (plan.any_size and plan.known)) or repeatable(plan.gm.graph)
    written = write(plan)
    inputs = [*example_inputs, *written.layouts, *written.limits, *written.levels]
    compiled = compiled or compile_with_inductor(written.module, inputs, plan.options, rewritten=sparse)
    devices = tuple(limits.device for limits in written.limits)

    def save() -> _Saved:
        code, any_size, count = SavedCode.of(compiled, written.module), plan.any_size, len(plan.sparse)
        level = written.shows_level, written.flow
        return _Saved(original, plan.options, plan.known, any_size, count, repeats, devices, *level, code)

    limits = Limits(plan.options, devices, written.shows_level, plan.tell)
    saving = original.refuse if original.obstacle else save
    return CompiledGraph(compiled, plan, outside, repeats, limits, written.flow, saving)


@dataclass(frozen=True)
class _Saved:
    """What is saved of a compiled graph; `devices` and `shows_level` are those of its limits."""

    original: Original
    options: Options
    known: Told
    any_size: bool
    sparse: int
    repeats: bool
    devices: tuple[torch.device, ...]
    shows_level: bool
    flow: LevelFlow
    code: SavedCode

    def graph(self, outside: Listener) -> CompiledGraph:
        """The compiled graph, whose calls are heard by this listener."""
        plan = self.original.plan(self.options, self.known, any_size=self.any_size)
        if len(plan.sparse) != self.sparse:
            raise RuntimeError("rainfusion: what was saved is not understood as it was: compile it again")
        limits = Limits(self.options, self.devices, self.shows_level, plan.tell)
        return CompiledGraph(self.code.load(), plan, outside, self.repeats, limits, self.flow, lambda: self)


def _notes(args: Sequence[Any], known: Told | None = None) -> Heard:
    """What a call's inputs carry; or `known` anyway, but notes that are not true any more are taken off."""

    def told(true: set[Any]) -> Told:
        carried = carried_by(args, true)
        return Told(carried) if known is None else known

    return Heard(claims(args), told)
