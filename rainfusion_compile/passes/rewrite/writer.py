# SPDX-License-Identifier: Apache-2.0
"""Rewriting: each matched attention becomes an ARM probe and block-sparse attention."""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._guards import Source

from rainfusion_compile.kernels import operators  # noqa: F401  (registers torch.ops.rainfusion)
from rainfusion_compile.options import Options
from rainfusion_compile.passes.graph.symbolic_sizes import InputSizes, Sizes, at_sizes, fixed, hint_of
from rainfusion_compile.passes.match.find import AttentionMatch, bind, find_attentions
from rainfusion_compile.passes.match.masks import MaskFactor
from rainfusion_compile.passes.match.partial_queries import density
from rainfusion_compile.passes.normalize import Spelled, spell_out
from rainfusion_compile.passes.provenance.known_tokens import Carried, carried_out
from rainfusion_compile.passes.provenance.trace import trace
from rainfusion_compile.passes.rewrite.guards import specialise
from rainfusion_compile.report import AttentionReport, GraphReport
from rainfusion_compile.sparsity.block_tables import BlockTables, block_tables
from rainfusion_compile.sparsity.layout import VideoLayout

logger = logging.getLogger(__name__)

DENSE_BY_OPTION = "kept dense by dense_layers"


@dataclasses.dataclass
class Analysis:
    """A graph's attentions, and what its outputs will carry."""

    matches: list[AttentionMatch]
    carried: Carried
    spelled: Spelled

    @property
    def open(self) -> bool:
        """Whether an attention could become sparse if only more were known of the graph's inputs."""
        return any(match.open and match.reason is not None for match in self.matches)


def analyse(gm: fx.GraphModule, options: Options, carried: Carried = (), spelled: Spelled | None = None) -> Analysis:
    """Find a Dynamo graph's attentions; its inputs carry what is known of them from other graphs.

    With `spelled`, other spellings of attention have been looked for already.
    """
    spelled = spelled or spell_out(gm)
    traced = trace(gm, carried)
    matches = find_attentions(gm, grid=options.grid, text=options.text, min_tokens=options.min_tokens, traced=traced)
    for match in matches:  # a closer look would not change that these are too few
        match.open = match.open and (match.tokens or 0) >= options.min_tokens
    return Analysis(spelled.in_order(matches), carried_out(traced.outputs, traced.inputs, carried), spelled)


def follow(gm: fx.GraphModule, carried: Carried, args: Sequence[Any]) -> Carried:
    """What a graph's outputs carry in a call with these arguments, whose inputs carry this."""
    sizes = InputSizes(gm)
    with at_sizes(Sizes(sizes.named(sizes.of(args)))):
        traced = trace(gm, carried)
    return carried_out(traced.outputs, traced.inputs)


def rewrite(gm: fx.GraphModule, options: Options, analysis: Analysis | None = None) -> GraphReport:
    """Make the video self-attentions of a Dynamo graph sparse, in place.

    Choices and recalls of the rewritten attentions become extra outputs at the end of the graph, two for each. A graph
    without any video attention is left exactly as it is.

    Returns:
        A report on every attention of the graph, rewritten or not.
    """
    analysis = analysis or analyse(gm, options)
    matches = analysis.matches
    sparse = [match for match in matches if match.reason is None]
    for number in dense_layers(options, len(sparse)):
        sparse[number].reason = DENSE_BY_OPTION
    sparse = [match for match in sparse if match.reason is None]
    analysis.spelled.settle(match.node for match in sparse)
    report = GraphReport()
    if sparse:
        specialise(gm)
    writer = Writer(gm, options)
    for match in matches:
        tables = writer.replace(match) if match.reason is None else None
        report.attentions.append(describe(match, tables))
    if sparse:
        writer.finish()
    log_result(matches, options)
    return report


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph that can be rewritten; values and submodules are shared."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if hasattr(node, "_dynamo_source"):  # which parameter or argument an input is
            copies[node]._dynamo_source = node._dynamo_source
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    sources: Any = getattr(gm, "_param_name_to_source", {})
    copied._param_name_to_source = dict(sources)  # type: ignore[assignment]
    return copied


def dense_layers(options: Options, count: int) -> set[int]:
    """The numbers of ``dense_layers`` that a graph of so many video attentions has, as non-negative ones."""
    wanted = options.dense_layers
    assert isinstance(wanted, tuple)
    beyond = [number for number in wanted if not -count <= number < count]
    if beyond and count:
        logger.warning("dense_layers %s: this graph has %d video attentions", beyond, count)
    return {number % count for number in wanted if number not in beyond} if count else set()


class Writer:
    """Writes the operators into one graph; attentions over the same layout share their tables."""

    def __init__(self, gm: fx.GraphModule, options: Options) -> None:
        self.gm, self.options = gm, options
        self.tables: dict[tuple[VideoLayout, torch.device], tuple[BlockTables, dict[str, str]]] = {}
        self.observed: list[fx.Node] = []

    def replace(self, match: AttentionMatch) -> BlockTables:
        assert match.grid is not None
        assert match.text is not None
        old = match.node
        example: Tensor = old.meta["example_value"]
        tables, names = self._tables_for(VideoLayout(match.grid, match.text), example.device)
        with self.gm.graph.inserting_before(old):
            nodes: Any = {name: self._emit(old, None, name=attribute) for name, attribute in names.items()}
            placed = dataclasses.replace(tables, **nodes)  # with the graph's buffers for tensors
            q, k, v = self._operands(match, example.dtype)
            q = self._fill(match, q)
            key_mask, query_mask = self._masks(match)
            probe = self._emit(
                old,
                torch.ops.rainfusion.arm_probe.default,
                q,
                k,
                key_mask,
                *placed.probe_arguments,
                match.scale,
                float(self.options.recall_target),
                float(self.options.min_recall),
            )
            choice, recall = (self._emit(old, operator.getitem, probe, number) for number in range(2))
            new = self._emit(
                old,
                torch.ops.rainfusion.block_sparse_attention.default,
                q,
                k,
                v,
                choice,
                key_mask,
                *placed.attention_arguments,
                match.scale,
            )
            new = self._restride(old, self._where(old, query_mask, self._cut(match, new)))
        old.replace_all_uses_with(new)
        self.gm.graph.erase_node(old)
        self.observed += [choice, recall]
        return tables

    def finish(self) -> None:
        """Return what was observed, and check the graph."""
        (output,) = self.gm.graph.find_nodes(op="output")
        output.args = ((*output.args[0], *self.observed),)
        self.gm.graph.lint()
        self.gm.recompile()

    def _tables_for(self, layout: VideoLayout, device: torch.device) -> tuple[BlockTables, dict[str, str]]:
        """Tables of a layout as buffers of the graph, under a name each."""
        key = (layout, device)
        if key not in self.tables:
            tables = block_tables(layout, sparsity=self.options.sparsity, patterns=self.options.patterns, device=device)
            names = {}
            for name, tensor in tables.tensors.items():
                names[name] = f"rainfusion_{name}_{len(self.tables)}"
                self._add_buffer(names[name], tensor)
            self.tables[key] = tables, names
        return self.tables[key]

    def _add_buffer(self, name: str, tensor: Tensor) -> None:
        self.gm.register_buffer(name, tensor)
        # AOTAutograd wants to know where each tensor of a Dynamo graph comes from: from us, guarded by nothing.
        sources: dict[str, Source] = self.gm._param_name_to_source  # type: ignore[assignment]
        sources[name] = ConstantSource(name)

    def _emit(self, like: fx.Node, target: Callable[..., Any] | None, *args: Any, name: str = "") -> fx.Node:
        """A call node (or a buffer's node, without target) where ``like`` stands, with its origin and a value."""
        graph = self.gm.graph
        node = graph.get_attr(name) if target is None else graph.call_function(target, args)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        mode = like.meta["example_value"].fake_mode
        if target is None:
            node.meta["example_value"] = mode.from_tensor(getattr(self.gm, name), static_shapes=True)
        else:
            with mode, enable_python_dispatcher(), torch.no_grad():
                node.meta["example_value"] = target(*fx.node.map_arg(args, lambda arg: arg.meta["example_value"]))
        return node

    def _operands(self, match: AttentionMatch, dtype: torch.dtype) -> list[fx.Node]:
        """Queries, keys and values as they are now: one may come straight out of an attention that was replaced."""
        given = bind(match.node)
        match.query, match.key, match.value = (given[name] for name in ("query", "key", "value"))
        return [self._cast(match.node, node, dtype) for node in (match.query, match.key, match.value)]

    def _cast(self, like: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Under autocast, attention computes in another dtype than its inputs have; our operators do not autocast."""
        if node.meta["example_value"].dtype == dtype:
            return node
        return self._emit(like, torch.ops.aten.to.dtype, node, dtype)

    def _fill(self, match: AttentionMatch, q: fx.Node) -> fx.Node:
        """Rows of zeros for the tokens without a query."""
        if not any(match.left_out):
            return q
        before, after = self._left_out(match)
        return self._emit(match.node, torch.ops.aten.constant_pad_nd.default, q, [0, 0, before, after])

    def _cut(self, match: AttentionMatch, new: fx.Node) -> fx.Node:
        """The rows of the tokens that have a query."""
        if not any(match.left_out):
            return new
        before, after = self._left_out(match)
        sizes = [before, self._size(match.node, match.query, 2), after]
        pieces = self._emit(match.node, torch.ops.aten.split_with_sizes.default, new, sizes, 2)
        return self._emit(match.node, operator.getitem, pieces, 1)

    def _left_out(self, match: AttentionMatch) -> tuple[Any, Any]:
        return match.left_out

    def _masks(self, match: AttentionMatch) -> tuple[fx.Node | None, fx.Node | None]:
        """A mask of keys, ``[B or 1, H or 1, S]``, and one of queries, ``[B or 1, H or 1, S, 1]``."""
        like = match.node
        if match.mask_factors is not None:
            keys = self._all_of(like, match.mask_factors.keys, match.key)
            queries = self._all_of(like, match.mask_factors.queries, match.query)
            return keys, queries and self._emit(like, torch.ops.aten.unsqueeze.default, queries, -1)
        if match.key_mask is None:
            return None, None
        return self._along(like, MaskFactor(match.key_mask, -1)), None

    def _all_of(self, like: fx.Node, factors: Iterable[MaskFactor], of: fx.Node) -> fx.Node | None:
        nodes = [self._along(like, factor) for factor in sorted(factors, key=lambda f: (f.node.name, f.axis))]
        if not nodes:
            return None
        mask = functools.reduce(lambda a, b: self._emit(like, torch.ops.aten.logical_and.default, a, b), nodes)
        return self._emit(like, torch.ops.aten.expand.default, mask, [-1, -1, self._size(like, of, 2)])

    def _size(self, like: fx.Node, node: fx.Node, dim: int) -> Any:
        """The size of a tensor, as an argument."""
        size = node.meta["example_value"].shape[dim]
        known = fixed(size)
        return size if known is None else known

    def _along(self, like: fx.Node, factor: MaskFactor) -> fx.Node:
        """A mask that broadcasts to ``[B, H, queries, keys]`` and varies along one of the last two: ``[B, H, S]``."""
        mask = factor.node
        while mask.meta["example_value"].dim() < 4:
            mask = self._emit(like, torch.ops.aten.unsqueeze.default, mask, 0)
        return self._emit(like, torch.ops.aten.select.int, mask, 2 if factor.axis == -1 else 3, 0)

    def _where(self, like: fx.Node, query_mask: fx.Node | None, new: fx.Node) -> fx.Node:
        """A query that may see nothing gives 0, as SDPA has it."""
        if query_mask is None:
            return new
        return self._emit(like, torch.ops.aten.where.ScalarOther, query_mask, new, 0)

    def _restride(self, old: fx.Node, new: fx.Node) -> fx.Node:
        """Give the replacement the memory layout that the rest of the graph was traced with."""
        was, now = old.meta["example_value"], new.meta["example_value"]
        assert (was.dtype, was.device) == (now.dtype, now.device), (was, now)
        assert self._plain(was.shape) == self._plain(now.shape), (was, now)
        if self._plain(was.stride()) == self._plain(now.stride()):
            return new
        sizes = [(hint_of(was.stride(dim)), hint_of(was.shape[dim])) for dim in range(was.dim())]
        order = sorted(range(was.dim()), key=sizes.__getitem__, reverse=True)
        inverse = [order.index(dim) for dim in range(was.dim())]
        for target, argument in (
            (torch.ops.aten.permute.default, order),
            (torch.ops.aten.contiguous.default, None),
            (torch.ops.aten.permute.default, inverse),
        ):
            new = self._emit(old, target, *((new,) if argument is None else (new, argument)))
        return new

    def _plain(self, sizes: Iterable[Any]) -> tuple[Any, ...]:
        """Sizes to compare."""
        return tuple(sizes)


def describe(match: AttentionMatch, tables: BlockTables | None) -> AttentionReport:
    known = AttentionReport(
        name=match.name,
        status="dense" if tables is None else "sparse",
        reason=match.reason,
        grid=match.grid,
        text=match.text,
        heads=match.heads,
        head_dim=match.head_dim,
        tokens=match.tokens,
    )
    if tables is not None:
        known.patterns, known.radii = tables.patterns, tables.radii
        known.densities = tuple(density(of_all, match.tokens or 0, match.keys) for of_all in tables.densities)
    return known


def log_result(matches: list[AttentionMatch], options: Options) -> None:
    """Say what was done; and, once, why attentions that a user would expect to be sparse are not."""
    if not matches:
        return
    sparse = sum(match.reason is None for match in matches)
    logger.info("%d of %d attentions made sparse", sparse, len(matches))
    for match in matches:
        logger.debug("%s: %s", match.name, match.reason or f"sparse, grid {match.grid}, text {match.text}")
    unexpected = [match for match in matches if (match.tokens or 0) >= max(options.min_tokens, 1) and _surprises(match)]
    for reason in dict.fromkeys(str(match.reason) for match in unexpected):
        alike = [match for match in unexpected if match.reason == reason]
        tokens = max(match.tokens or 0 for match in alike)
        warn_once(f"attention over {tokens} tokens stays dense ({len(alike)} in this graph): {reason}")


def _surprises(match: AttentionMatch) -> bool:
    """Not sparse, though nobody asked for that and it is not cross-attention."""
    return match.reason is not None and not match.reason.startswith(("cross-attention", DENSE_BY_OPTION))


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)
