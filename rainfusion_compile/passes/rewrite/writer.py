# SPDX-License-Identifier: Apache-2.0
"""Rewriting: each attention that is to be sparse becomes an ARM probe and block-sparse attention."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import Source
from torch._logging import trace_structured

from rainfusion_compile.kernels import operators  # noqa: F401  (registers torch.ops.rainfusion)
from rainfusion_compile.options import Options, constant
from rainfusion_compile.passes.attention_match import AttentionMatch, MaskFactor
from rainfusion_compile.passes.graph.nodes import copy_graph, describe, emit, example_of
from rainfusion_compile.passes.graph.symbolic_sizes import at_sizes, fixed, hint_of
from rainfusion_compile.passes.match.noise_level import find_timestep_angles, level_of, limits_of_samples
from rainfusion_compile.passes.normalize import normalize
from rainfusion_compile.passes.provenance.known_tokens import NOTHING
from rainfusion_compile.passes.rewrite.analysis import Plan, same_sizes
from rainfusion_compile.passes.rewrite.guards import guard
from rainfusion_compile.passes.rewrite.level_flow import LevelFlow, find_level_flow, return_level
from rainfusion_compile.passes.rewrite.summary import log_result, refuse_dense, summarize
from rainfusion_compile.report import GraphReport
from rainfusion_compile.sparsity.block_tables import BlockTables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.layout_codec import NO_VIDEO


def rewrite(gm: fx.GraphModule, options: Options) -> GraphReport:
    """Make the video self-attentions of a Dynamo graph sparse, in place and for the sizes that it has now.

    Returns a report on every attention. A graph without any video attention is left exactly as it is.
    """
    plan = Plan(gm, options, normalize(gm), NOTHING)
    write(plan)
    return summarize(plan)


class Written(NamedTuple):
    """The graph to compile, and examples of the inputs that it has besides its own.

    These are the layouts of its attentions, at any size, then limits, a tensor for each device that it attends on, then
    noise levels. At the end of its outputs are choice, errors and recall of each rewritten attention; and, at any size,
    the layout with its rest filled in. `shows_level`: whether it keeps within `dense_levels` itself, by its timestep or
    by the `levels` that it takes. Last is the noise level that `flow` tells of.
    """

    module: fx.GraphModule
    layouts: tuple[Tensor, ...] = ()
    limits: tuple[Tensor, ...] = ()
    levels: tuple[Tensor, ...] = ()
    shows_level: bool = False
    flow: LevelFlow = LevelFlow()


def write(plan: Plan) -> Written:
    """Write the operators of a plan into its graph, with Dynamo's guards for what they rely on."""
    sparse, gm = plan.sparse, plan.module
    guard(plan)
    _show(gm, "before")
    plan.normalized.keep_only(match.node for match in sparse)
    refuse_dense(plan.matches, plan.options)
    log_result(plan)
    _artifact("report", "json", lambda: json.dumps(dataclasses.asdict(summarize(plan)), indent=1))
    flow = find_level_flow(gm, plan.options)
    if not sparse and flow.timestep is None:
        return Written(gm, flow=flow)
    if not sparse:
        module = copy_graph(gm)  # which Dynamo goes on with
        with at_sizes(plan.at_compilation), torch.no_grad():
            return_level(module, flow)
        return Written(module, flow=flow)
    with at_sizes(plan.at_compilation), torch.no_grad():
        writer = (_AnySizeWriter if plan.any_size else Writer)(gm, plan.options, len(sparse))
        for match in sparse:
            writer.write(match)
        (output,) = gm.graph.find_nodes(op="output")
        output.args = ((*output.args[0], *writer.observed),)
        return_level(gm, flow)
        writer.levels_last()
        gm.graph.lint()
        gm.recompile()
    _show(gm, "after")
    given = writer.layouts, writer.limits.values(), writer.levels.values()
    layouts, limits, levels = (tuple(map(example_of, nodes)) for nodes in given)
    module = gm
    if gm is plan.gm:  # which Dynamo goes on with: it must not find inputs that it does not know
        module = copy_graph(gm)
        writer.fix_limits()
    shows = writer.angles is not None or bool(levels)
    return Written(module, layouts, limits, levels, shows, flow._replace(takes=tuple(writer.levels)))


def _show(gm: fx.GraphModule, when: str) -> None:
    """For ``TORCH_TRACE`` and tlparse: a graph before and after."""
    _artifact(when, "string", lambda: gm.print_readable(print_output=False))


def _artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    metadata = {"name": f"rainfusion_{name}", "encoding": encoding}
    trace_structured("artifact", lambda: metadata, payload_fn=payload)


class Writer:
    """Writes the operators into one graph; attentions over the same layout share their tables.

    ``layouts``, ``limits``, ``levels`` and ``observed``: nodes of what the graph takes and returns besides its own.
    ``angles``: of the timestep, if it shows.
    """

    def __init__(self, gm: fx.GraphModule, options: Options, attentions: int) -> None:
        self.gm, self.options, self.angles = gm, options, find_timestep_angles(gm)
        self.tables: dict[tuple[VideoLayout, torch.device], BlockTables] = {}
        self.layouts: list[fx.Node] = []
        self.limits: dict[torch.device, fx.Node] = {}
        self.levels: dict[torch.device, fx.Node] = {}
        self._limits_of: dict[Any, fx.Node] = {}
        self.observed: list[fx.Node] = []

    def write(self, match: AttentionMatch) -> None:
        """Replace one attention."""
        old = match.node
        with self.gm.graph.inserting_before(old):
            # under autocast, attention computes in another dtype than its inputs have; our operators do not autocast
            dtype, to = example_of(old).dtype, torch.ops.aten.to.dtype
            operands = match.query, match.key, match.value
            q, k, v = (x if example_of(x).dtype == dtype else emit(old, to, x, dtype) for x in operands)
            key_mask = self._mask(old, match.mask.keys, match.key)
            query_mask = self._mask(old, match.mask.queries, match.query)
            around = self._without_query(match) if any(match.partial_queries) else None
            if around is not None:  # rows of zeros for the tokens without a query
                q = emit(old, torch.ops.aten.constant_pad_nd.default, q, [0, 0, *around])
            new, *observed = self._attend(match, q, k, v, key_mask)
            if around is not None:
                sizes = [around[0], self._size(old, match.query, 2), around[1]]
                pieces = emit(old, torch.ops.aten.split_with_sizes.default, new, sizes, 2)
                new = emit(old, operator.getitem, pieces, 1)
            if query_mask is not None:  # a query that may see nothing gives 0, as SDPA has it
                query_mask = emit(old, torch.ops.aten.unsqueeze.default, query_mask, -1)
                new = emit(old, torch.ops.aten.where.ScalarOther, query_mask, new, 0)
            new = self._restride(old, new)
        old.replace_all_uses_with(new)
        self.gm.graph.erase_node(old)
        self.observed += observed

    def _attend(self, match: AttentionMatch, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None) -> list[fx.Node]:
        """The attention, and what is observed of it: choice, errors and recall."""
        old, options = match.node, self.options
        assert match.layout is not None
        tables = self._tables_for(match.layout, old)
        ops = torch.ops.rainfusion
        rule = match.scale, options.by_error, self._limits(old, match.query)
        probe = emit(old, ops.arm_probe.default, q, k, v, mask, *tables.probe_arguments, *rule)
        choice, errors, recall = (emit(old, operator.getitem, probe, number) for number in range(3))
        arguments = q, k, v, choice, mask, *tables.attention_arguments, match.scale
        return [emit(old, ops.block_sparse_attention.default, *arguments), choice, errors, recall]

    def _limits(self, old: fx.Node, query: fx.Node) -> fx.Node:
        """What the ARM chooses by, ``[B or 1, 2]``, for a sample as noisy as `dense_levels`: what nothing keeps."""
        if self.angles is not None and not self.angles < old:
            self.angles = None
        device, angles = example_of(query).device, self.angles
        alike = angles is not None and same_sizes(example_of(angles).shape[:1], example_of(query).shape[:1])
        asks = angles is None and self.options.dense_steps != (0.0, 0.0)
        if asks and device not in self.levels:
            self.levels[device] = self._input(f"rainfusion_level_{len(self.levels)}", (1,), torch.float32, device)
        key = device, alike, asks
        if key not in self._limits_of:
            if device not in self.limits:
                self.limits[device] = self._input(
                    f"rainfusion_limits_{len(self.limits)}", (3, 2), torch.float32, device
                )
            level = self.levels[device] if asks else None
            # where the angles are made, for they may be written over
            with self.gm.graph.inserting_before(old if angles is None else angles.next):
                if angles is not None:
                    level = level_of(old, angles, device, per_sample=alike)
                self._limits_of[key] = limits_of_samples(old, self.limits[device], level)
        return self._limits_of[key]

    def levels_last(self) -> None:
        """Let the inputs for noise levels be the last ones, in their order."""
        for node in self.levels.values():
            self.gm.graph.find_nodes(op="placeholder")[-1].append(node)

    def fix_limits(self) -> None:
        """Make buffers of the limits, those of the options, so that the graph takes what it took before.

        No level is known there.
        """
        buffers = {node: self.options.all_limits(device) for device, node in self.limits.items()}
        unknown = {node: constant(((math.nan,),), device)[0] for device, node in self.levels.items()}
        for node, value in (buffers | unknown).items():
            self.gm.register_buffer(node.name, value)
            with self.gm.graph.inserting_before(node):
                node.replace_all_uses_with(describe(self.gm.graph.get_attr(node.name), node, example_of(node)))
            self.gm.graph.erase_node(node)
        self.gm.recompile()

    def _input(self, name: str, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> fx.Node:
        """A further input of the graph, after the others."""
        inputs, values = self.gm.graph.find_nodes(op="placeholder"), map(example_of, self.gm.graph.nodes)
        mode = next(mode for value in values if (mode := getattr(value, "fake_mode", None)) is not None)
        first = next(iter(self.gm.graph.nodes))
        with self.gm.graph.inserting_after(inputs[-1]) if inputs else self.gm.graph.inserting_before(first):
            node = self.gm.graph.placeholder(name)
        node._dynamo_source = ConstantSource(node.name)  # Dynamo does not know of it, so nothing guards it
        with mode:
            node.meta["example_value"] = torch.empty(shape, dtype=dtype, device=device)
        return node

    def _tables_for(self, layout: VideoLayout, like: fx.Node) -> BlockTables:
        """Tables of a layout, with buffers of the graph for tensors; made where they are used first."""
        key = layout, example_of(like).device
        if key not in self.tables:
            nodes = dict[str, Any]()
            tables = self.options.tables(*key)
            # AOTAutograd wants to know where each tensor of a Dynamo graph comes from: from us, guarded by nothing.
            sources: dict[str, Source] = self.gm._param_name_to_source  # type: ignore[assignment]
            for name, tensor in tables.tensors.items():
                buffer = f"rainfusion_{name}_{len(self.tables)}"
                self.gm.register_buffer(buffer, tensor)
                sources[buffer] = ConstantSource(buffer)
                value = example_of(like).fake_mode.from_tensor(tensor, static_shapes=True)
                nodes[name] = describe(self.gm.graph.get_attr(buffer), like, value)
            self.tables[key] = dataclasses.replace(tables, **nodes)
        return self.tables[key]

    def _without_query(self, match: AttentionMatch) -> tuple[Any, Any]:
        """How many tokens have no query, before and after the others: as many as the call has."""
        keys, queries = (self._size(match.node, node, 2) for node in (match.key, match.query))
        if isinstance(keys, int) and isinstance(queries, int):
            return match.partial_queries
        count = emit(match.node, operator.sub, keys, queries)  # all are on one side
        return count if match.partial_queries[0] else 0, count if match.partial_queries[1] else 0

    def _mask(self, like: fx.Node, factors: Iterable[MaskFactor], of: fx.Node) -> fx.Node | None:
        """A mask of keys or of queries, ``[B or 1, H or 1, S]``: all its factors at once."""
        nodes = [self._along(like, factor) for factor in sorted(factors, key=lambda f: (f.node.name, f.axis))]
        if not nodes:
            return None
        mask = functools.reduce(functools.partial(emit, like, torch.ops.aten.logical_and.default), nodes)
        if same_sizes(example_of(mask).shape[2:], example_of(of).shape[2:3]):
            return mask
        return emit(like, torch.ops.aten.expand.default, mask, [-1, -1, self._size(like, of, 2)])

    def _along(self, like: fx.Node, factor: MaskFactor) -> fx.Node:
        """A mask that broadcasts to ``[B, H, queries, keys]`` and varies along one of the last two: ``[B, H, S]``."""
        mask = factor.node
        while example_of(mask).dim() < 4:
            mask = emit(like, torch.ops.aten.unsqueeze.default, mask, 0)
        return emit(like, torch.ops.aten.select.int, mask, 2 if factor.axis == -1 else 3, 0)

    def _size(self, like: fx.Node, node: fx.Node, dim: int) -> Any:
        """The size of a tensor, as an argument."""
        size = fixed(example_of(node).shape[dim])
        return emit(like, torch.ops.aten.sym_size.int, node, dim) if size is None else size

    def _restride(self, old: fx.Node, new: fx.Node) -> fx.Node:
        """Give the replacement the memory layout that the rest of the graph was traced with."""
        was, now = example_of(old), example_of(new)
        assert (was.dtype, was.device) == (now.dtype, now.device), (was, now)
        assert same_sizes(was.shape, now.shape), (was, now)
        if same_sizes(was.stride(), now.stride()):
            return new
        sizes = [(hint_of(was.stride(dim)), hint_of(was.shape[dim])) for dim in range(was.dim())]
        order = sorted(range(was.dim()), key=sizes.__getitem__, reverse=True)
        new = emit(old, torch.ops.aten.permute.default, new, order)
        new = emit(old, torch.ops.aten.contiguous.default, new)
        return emit(old, torch.ops.aten.permute.default, new, [order.index(dim) for dim in range(was.dim())])


class _AnySizeWriter(Writer):
    """Writes `video_attention` instead, which reads its layout from one more input: a row for each attention."""

    def __init__(self, gm: fx.GraphModule, options: Options, attentions: int) -> None:
        super().__init__(gm, options, attentions)
        shape = attentions, len(NO_VIDEO)
        self.layouts = [self._input("rainfusion_layouts", shape, torch.int64, torch.device("cpu"))]
        self.rows = iter(range(attentions))

    def _attend(self, match: AttentionMatch, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None) -> list[fx.Node]:
        """The attention, its choice, errors, recall, and layout with the rest filled in."""
        old, options = match.node, self.options
        row = emit(old, torch.ops.aten.select.int, self.layouts[0], 0, next(self.rows))
        given = (
            list(options.ladder),
            ",".join(options.names),
            options.precision == "int8",
            match.scale,
            options.by_error,
        )
        call = emit(old, torch.ops.rainfusion.video_attention.default, q, k, v, mask, row, *given, self._limits(old, q))
        return [emit(old, operator.getitem, call, number) for number in range(5)]
