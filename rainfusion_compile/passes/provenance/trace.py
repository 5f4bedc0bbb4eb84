# SPDX-License-Identifier: Apache-2.0
"""Axis provenance: what the tokens of each attention in a Dynamo graph are made of.

The graph is run once more on fake tensors, each dimension of which carries the axes that it is made of; a dispatch
mode sees every ATen operator below the graph's nodes and applies its rule (`rules`). Sizes are concrete: in a graph
with symbolic sizes, those of the call that is being compiled, or of another one (`symbolic_sizes`). Nothing here reads
a symbolic size as a number, so Dynamo's guards stay as they are.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from rainfusion_compile.passes.graph.mutation import mutated, written_arguments
from rainfusion_compile.passes.graph.nodes import bind, example_of, is_sdpa, tensor_at
from rainfusion_compile.passes.graph.symbolic_sizes import hint_of, learn, shape_of, stand_in

# these register their rules
from rainfusion_compile.passes.provenance import rules_collectives, rules_compute, rules_rows  # noqa: F401
from rainfusion_compile.passes.provenance.aliases import Aliases
from rainfusion_compile.passes.provenance.axis import Axis, Dims, Source
from rainfusion_compile.passes.provenance.known_tokens import Carried, dims_from, laid_out
from rainfusion_compile.passes.provenance.lineage import Lineage, lineage_of, union_of
from rainfusion_compile.passes.provenance.ranks import groups_of
from rainfusion_compile.passes.provenance.rules import dims_of, fresh_dims, propagate, set_dims, set_mesh, tensors_in
from rainfusion_compile.passes.provenance.rules_dtensor import between_ranks, is_between_ranks
from rainfusion_compile.passes.provenance.values import remember

logger = logging.getLogger(__name__)

# Functions that change a state of the process, not a tensor (autocast, grad mode, SDPA backends), or check a number.
_NO_RESULT = re.compile(r"_*(enter|exit|set|push|pop|sdpa|backend|manual|assert|check)_")
# Attentions that were not understood: their output runs over the tokens of their first operand all the same.
_ATTENTIONS = ("multi_head_attention_forward", "flex_attention")
_UNKNOWN = object()
"""A value that only a run could tell."""


class RuleError(Exception):
    """A provenance rule failed: a bug of this package, not of the graph."""


@dataclass
class Tokens:
    """Dims and lineage of an attention's operands, if their sizes are known."""

    query: Dims
    key: Dims
    value: Dims
    lineage: tuple[Lineage, ...]


@dataclass
class Trace:
    """What SDPA nodes of the graph itself attend to, and dims of its ends; of outputs also their lineage's names."""

    tokens: dict[fx.Node, Tokens]
    inputs: list[Dims | None]
    outputs: list[tuple[Dims, tuple[Any, ...]] | None]


def trace(gm: fx.GraphModule, carried: Carried = (), *, remember: bool = True) -> Trace:
    """Follow the axes through a Dynamo graph, each of whose inputs may carry what is known from other graphs.

    ``remember``: whether torch may keep, for good, what operators return for these sizes.

    Raises:
        RuleError: if a rule fails.
    """
    watch, fakes = _Watch(), FakeTensorMode()
    fakes.cache_enabled &= remember
    tracer = _Tracer(gm, carried, watch.aliases)
    # tensors of inference mode do not know what they are a view of
    with torch.inference_mode(False), torch.no_grad(), fakes, groups_of(gm), watch:
        tracer.run(enable_io_processing=False)
    return tracer.found


class _Watch(TorchDispatchMode):
    """Gives what every ATen operator returns and writes its dims."""

    def __init__(self) -> None:
        super().__init__()
        self.aliases = Aliases()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = list(tensors_in(written_arguments(func, args, kwargs)))
        before = [(item, dims_of(item), lineage_of(item)) for item in written]
        out = func(*args, **kwargs)
        try:
            propagate(func, args, kwargs, out, written)
            remember(func, args, kwargs, out)
            for item in tensors_in((out,)):
                self.aliases.add(item)
            for item, dims, lineage in before:
                self.aliases.wrote(item, dims, lineage)
        except Exception as error:
            raise RuleError(f"axis provenance of {func} failed: {error}") from error
        return out


class _Tracer(fx.Interpreter):
    """Runs a graph node by node, forgetting each value after its last use."""

    def __init__(self, gm: fx.GraphModule, carried: Carried, aliases: Aliases) -> None:
        super().__init__(gm)
        self.aliases = aliases
        self.carried = carried
        self.identities = laid_out(carried)
        self.found = Trace({}, [], [])

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "output":
            for value in tree_leaves(args):
                known = (dims_of(value), lineage_of(value).names()) if isinstance(value, Tensor) else None
                self.found.outputs.append(known)
            return None
        value = self._run(n, args, kwargs)
        made_by = _name(n) if n.op.startswith("call") else "an input of the graph, of which no other graph tells"
        where = f"{n.name} ({made_by})"
        for axis in chain(*chain(*map(dims_of, tensors_in((value,))))):
            axis.origin = axis.origin or where
        return value

    def _run(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return _fake(self.fetch_attr(str(node.target)), node)
        if is_sdpa(node):
            return self._attention(node)
        name, functorch = _name(node), "functorch" in (getattr(node.target, "__module__", None) or "")
        if node.op == "call_function" and _NO_RESULT.match(name) and not functorch and tensor_at(node) is None:
            return None
        opaque = functorch or node.op == "call_module" or isinstance(node.target, HigherOrderOperator)
        if opaque or name in _ATTENTIONS or any(value is _UNKNOWN for value in tree_leaves((args, kwargs))):
            return self._opaque(node)
        if is_between_ranks(node, name) and isinstance(value := self._example(node), Tensor):
            set_dims(value, between_ranks(node, name, dims_of(args[0]), value.shape), lineage_of(args[0]))
            return value
        try:
            value = self._call(node, args, kwargs)
        except RuleError:
            raise
        except Exception as error:
            # data-dependent shapes, mostly
            logger.debug("axes lost at %s: %s", node.format_node(), error)
            return self._opaque(node)
        if name == "meshgrid":
            set_mesh(list(tensors_in((value,))))
        example = example_of(node)
        learn(example, value)
        if not isinstance(value, Tensor) or not isinstance(example, Tensor):
            return value
        if tuple(value.shape) != shape_of(node):
            logger.debug("axes lost at %s: shape %s", node.format_node(), tuple(value.shape))
            return self._opaque(node)
        return value if value.dtype == example.dtype else value.to(example.dtype)  # as autocast decided

    def _input(self, node: fx.Node) -> Any:
        value, number = self._example(node), len(self.found.inputs)
        known = self.carried[number] if number < len(self.carried) else None
        if known is not None and isinstance(value, Tensor):
            names = frozenset(name for dim in known if dim for name in dim.lineage)
            dims, lineage = dims_from(known, value.shape, self.identities), Lineage(names)
            for dim in known:
                if dim is not None and dim.run is not None:
                    lineage = lineage.cut(self.identities[dim.identity], dim.run.start, dim.run.stop)
            set_dims(value, dims, lineage if names else None)
        self.found.inputs.append(dims_of(value) if isinstance(value, Tensor) else None)
        return value

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = getattr(self, node.op)
        try:
            return call(node.target, args, kwargs)
        except RuntimeError:
            # autocast, which is not on here, may have joined operands of several types
            dtype = getattr(example_of(node), "dtype", None)
            if dtype is None or not dtype.is_floating_point or mutated(node):
                raise

            def cast(item: Tensor) -> Tensor:
                return item.to(dtype) if item.is_floating_point() else item

            return call(node.target, *tree_map_only(Tensor, cast, (args, kwargs)))

    def _attention(self, node: fx.Node) -> Any:
        given = bind(node)
        operands = [self.env.get(given[name]) for name in ("query", "key", "value")]
        if len(known := list(tensors_in(operands))) == 3:
            query, key, value = map(dims_of, known)
            self.found.tokens[node] = Tokens(query, key, value, tuple(map(lineage_of, known)))
        return self._opaque(node, operands)

    def _opaque(self, node: fx.Node, operands: Sequence[Any] = ()) -> Any:
        """A node that is not run. Of what it returns only what it is computed from is known, the operands.

        What it may write into is lost as well. The first output of an attention runs over the tokens of the query.
        """
        name, attention = _name(node), bool(operands) or _name(node) in _ATTENTIONS
        operands = operands or [self.env.get(item) for item in node.all_input_nodes]
        lineage = union_of(tensors_in(operands))
        for written in [] if attention else map(self.env.get, mutated(node)):
            if isinstance(written, Tensor):
                before = dims_of(written), lineage_of(written)
                set_dims(written, fresh_dims(written.shape, lost=name), lineage)
                self.aliases.wrote(written, *before)
        value = self._example(node)
        outs = list(tensors_in((value,)))
        for item in outs:
            set_dims(item, fresh_dims(item.shape, lost=name), lineage)
        query = operands[0] if attention and operands else None
        if outs and isinstance(query, Tensor) and outs[0].shape[:-1] == query.shape[:-1]:
            dims = (*dims_of(query)[:-1], *fresh_dims(outs[0].shape[-1:]))
            set_dims(outs[0], dims, lineage_of(query)._replace(inputs=lineage.inputs))
        return value

    def _example(self, node: fx.Node) -> Any:
        """The node's example value, with concrete sizes and fresh axes."""
        value = example_of(node)
        if value is None and node.op != "placeholder" and node.target is not operator.setitem:
            return _UNKNOWN
        stand_in(value)
        return tree_map(lambda item: _fake(item, node), value)


def _fake(value: Any, node: fx.Node) -> Any:
    """A value with concrete sizes, and as an input has it, if the node is one or a parameter."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        hint = value.node.hint if isinstance(value, torch.SymFloat) else hint_of(value)
        return _UNKNOWN if hint is None else hint
    if not isinstance(value, Tensor):
        return value
    shape: Any = tuple(map(hint_of, value.shape))
    strides: Any = tuple(map(hint_of, value.stride())) if value.layout == torch.strided else (None,)
    if None in shape:
        return _UNKNOWN
    kind: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    fake = torch.empty(shape, **kind) if None in strides else torch.empty_strided(shape, strides, **kind)
    if node.op not in ("placeholder", "get_attr"):
        return fake
    # exported graphs tell by their inputs' names which belong to the model, and not to a call
    exported = "val" in node.meta and node.name.startswith("p_")
    parameter = node.op == "get_attr" or isinstance(value, torch.nn.Parameter) or exported
    source, dims = Source(node.name, len(shape), parameter), dims_of(fake)
    if len(shape) > 2:
        dims = tuple((Axis(size, sources=frozenset({(source, dim)})),) for dim, size in enumerate(shape))
    set_dims(fake, dims, None if parameter else Lineage(frozenset({node.name})))
    return fake


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", None) or str(target)
