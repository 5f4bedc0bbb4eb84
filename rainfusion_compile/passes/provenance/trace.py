# SPDX-License-Identifier: Apache-2.0
"""Axis provenance: what the tokens of each attention in a Dynamo graph are made of.

The graph is run once more on fake tensors, each dimension of which carries the axes that it is made of; a dispatch
mode sees every ATen operator below the graph's nodes and applies its rule (`rules`). Sizes are concrete: in a graph
with symbolic sizes, those of the call that is being compiled, or of another one (`symbolic_sizes`). Nothing here reads
a symbolic size as a number, so Dynamo's guards stay as they are.
"""

from __future__ import annotations

import itertools
import logging
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from rainfusion_compile.passes.graph.mutation import mutated, written_arguments
from rainfusion_compile.passes.graph.nodes import bind, example_of, is_sdpa
from rainfusion_compile.passes.graph.symbolic_sizes import hint_of, learn, stand_in
from rainfusion_compile.passes.provenance import rules_compute, rules_views  # noqa: F401  (register their rules)
from rainfusion_compile.passes.provenance.aliases import Aliases
from rainfusion_compile.passes.provenance.axis import Axis, Dim, Dims, Source
from rainfusion_compile.passes.provenance.known_tokens import Carried, dims_from
from rainfusion_compile.passes.provenance.lineage import Lineage, lineage_of, set_lineage, union_of
from rainfusion_compile.passes.provenance.rules import (
    dims_of,
    fresh_dims,
    lost_dims,
    mesh_dims,
    propagate,
    set_dims,
    tensors_in,
)

logger = logging.getLogger(__name__)

# Functions that change a state of the process, not a tensor: autocast, grad mode, SDPA backends.
_STATE = re.compile(r"_*(enter|exit|set|push|pop|sdpa|backend|manual)_")
# Functions that check a number, and have no result.
_CHECKS = re.compile(r"_*(assert|check)_")
_MESHES = ("meshgrid",)
# Attentions that were not understood: their output runs over the tokens of their first operand all the same.
_ATTENTIONS = ("multi_head_attention_forward", "flex_attention")


class _Unknown:
    """A value that only a run could tell."""


UNKNOWN = _Unknown()


class RuleError(RuntimeError):
    """A provenance rule failed: a bug of this package, not of the graph."""


@dataclass
class Tokens:
    """Dims of an attention's operands; None where not even their sizes are known."""

    query: Dims | None
    key: Dims | None
    value: Dims | None
    lineage: tuple[Lineage, Lineage, Lineage]


@dataclass
class Trace:
    """The dims of query, key and value of each SDPA node that stands in the graph itself, and of its ends.

    Of the outputs, also the names of their lineage.
    """

    tokens: dict[fx.Node, Tokens]
    inputs: list[Dims | None]
    outputs: list[tuple[Dims, tuple[Any, ...]] | None]


def trace(gm: fx.GraphModule, carried: Carried = ()) -> Trace:
    """Follow the axes through a graph whose inputs carry what is known of them from other graphs.

    Args:
        gm: a Dynamo graph.
        carried: for each input.

    Raises:
        RuleError: if a rule fails.
    """
    watch = _Watch()
    tracer = _Tracer(gm, carried, watch.aliases)
    # tensors of inference mode do not know what they are a view of
    with torch.inference_mode(False), torch.no_grad(), tracer.fakes, watch:
        tracer.run()
    return Trace(tracer.tokens, tracer.inputs, tracer.outputs)


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
            for item in tensors_in((out,)):
                self.aliases.add(item)
            for item, dims, lineage in before:
                self.aliases.wrote(item, dims, lineage)
        except Exception as error:
            raise RuleError(f"axis provenance of {func} failed: {error}") from error
        return out


class _Tracer:
    """Runs a graph node by node, forgetting each value after its last use."""

    def __init__(self, gm: fx.GraphModule, carried: Carried, aliases: Aliases) -> None:
        self.gm = gm
        self.aliases = aliases
        self.carried = carried
        self.identities: dict[Any, Dim] = {}
        self.inputs: list[Dims | None] = []
        self.outputs: list[tuple[Dims, tuple[Any, ...]] | None] = []
        self.fakes = FakeTensorMode()
        self.values: dict[fx.Node, Any] = {}
        self.tokens: dict[fx.Node, Tokens] = {}

    def run(self) -> None:
        last: dict[fx.Node, fx.Node] = {}
        for node in self.gm.graph.nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        for node in self.gm.graph.nodes:
            if node.op == "output":
                values = tree_flatten(fx.node.map_arg(node.args[0], self.values.__getitem__))[0]
                self.outputs = [
                    (dims_of(value), lineage_of(value).names()) if isinstance(value, Tensor) else None
                    for value in values
                ]
                return
            self.values[node] = self._run(node)
            _note_origin(node, self.values[node])
            for used in node.all_input_nodes:
                if last[used] is node:
                    del self.values[used]

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.gm)
            return self._fake(value, node) if isinstance(value, Tensor) else value
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        if is_sdpa(node):
            return self._attention(node)
        module = getattr(node.target, "__module__", None) or ""
        if node.op == "call_module" or isinstance(node.target, HigherOrderOperator) or "functorch" in module:
            return self._opaque(node)
        name = _name(node)
        if node.op == "call_function" and (_STATE.match(name) or _CHECKS.match(name)) and not _is_tensor(node):
            return None
        if name in _ATTENTIONS or any(value is UNKNOWN for value in tree_flatten((args, kwargs))[0]):
            return self._opaque(node)
        try:
            value = self._call(node, args, kwargs)
        except RuleError:
            raise
        except Exception as error:
            # data-dependent shapes, mostly
            logger.debug("axes lost at %s: %s", node.format_node(), error)
            return self._opaque(node)
        if name in _MESHES:
            _set_mesh(value)
        return self._checked(node, value)

    def _input(self, node: fx.Node) -> Any:
        number = len(self.inputs)
        value = self._example(node, source=True)
        known = self.carried[number] if number < len(self.carried) else None
        if known is not None and isinstance(value, Tensor):
            set_dims(value, dims_from(known, value.shape, self.identities))
            names = {name for dim in known if dim for name in dim.lineage}
            if names:
                set_lineage(value, Lineage(frozenset(names)))
        self.inputs.append(dims_of(value) if isinstance(value, Tensor) else None)
        return value

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_method":
            function = getattr(args[0], str(node.target))
            args = args[1:]
        else:
            function = node.target
        try:
            return function(*args, **kwargs)
        except RuleError:
            raise
        except RuntimeError:
            # autocast, which is not on here, may have joined operands of several types
            dtype = getattr(example_of(node), "dtype", None)
            if dtype is None or not dtype.is_floating_point:
                raise
            args, kwargs = tree_map(lambda value: _cast(value, dtype), (args, kwargs))
            return function(*args, **kwargs)

    def _attention(self, node: fx.Node) -> Any:
        given = bind(node)
        operands = [self.values.get(given[name]) for name in ("query", "key", "value")]
        query, key, value = (dims_of(item) if isinstance(item, Tensor) else None for item in operands)
        one, two, three = (lineage_of(item) if isinstance(item, Tensor) else Lineage() for item in operands)
        self.tokens[node] = Tokens(query, key, value, (one, two, three))
        return self._attended(node, operands[0], list(tensors_in(operands)))

    def _attended(self, node: fx.Node, query: Any, operands: list[Tensor]) -> Any:
        """What an attention returns: its first output runs over the tokens of the query."""
        value = self._lost_example(node, operands)
        outs = list(tensors_in((value,)))
        if outs and isinstance(query, Tensor) and outs[0].shape[:-1] == query.shape[:-1]:
            set_dims(outs[0], (*dims_of(query)[:-1], *fresh_dims(outs[0].shape[-1:])))
            set_lineage(outs[0], Lineage(union_of(operands).inputs, lineage_of(query).cuts))
        return value

    def _opaque(self, node: fx.Node) -> Any:
        """A node that is not run: what it returns is lost, and what it may write into."""
        tensors = list(tensors_in(self.values.get(item) for item in node.all_input_nodes))
        name = _name(node)
        if name in _ATTENTIONS and tensors:
            return self._attended(node, tensors[0], tensors)
        for item in mutated(node):
            written = self.values.get(item)
            if isinstance(written, Tensor):
                before = dims_of(written), lineage_of(written)
                set_dims(written, lost_dims(written.shape, name))
                set_lineage(written, union_of(tensors))
                self.aliases.wrote(written, *before)
        return self._lost_example(node, tensors)

    def _lost_example(self, node: fx.Node, operands: list[Tensor]) -> Any:
        """The node's example value, of whose tensors only what they were computed from is known."""
        value = self._example(node)
        for item in tensors_in((value,)):
            set_dims(item, lost_dims(item.shape, _name(node)))
            set_lineage(item, union_of(operands))
        return value

    def _example(self, node: fx.Node, *, source: bool = False) -> Any:
        """The node's example value, with concrete sizes and fresh axes."""
        value = example_of(node)
        if value is None and node.op != "placeholder" and node.target is not operator.setitem:
            return UNKNOWN
        stand_in(value)
        return tree_map(lambda item: self._fake(item, node if source else None), value)

    def _fake(self, value: Any, source: fx.Node | None = None) -> Any:
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            hint = value.node.hint if isinstance(value, torch.SymFloat) else hint_of(value)
            return UNKNOWN if hint is None else hint
        if not isinstance(value, Tensor):
            return value
        shape = _hints(value.shape)
        strides = _hints(value.stride()) if value.layout == torch.strided else None
        if shape is None:
            return UNKNOWN
        if strides is None:
            fake = torch.empty(shape, dtype=value.dtype, device=value.device)
        else:
            fake = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
        if source is not None:
            parameter = _is_parameter(source, value)
            if not parameter:
                set_lineage(fake, Lineage(frozenset({source.name})))
        if source is not None and len(shape) > 2:
            place = Source(source.name, len(shape), parameter)
            set_dims(fake, tuple((Axis(size, sources=[(place, dim)]),) for dim, size in enumerate(shape)))
        return fake

    def _checked(self, node: fx.Node, value: Any) -> Any:
        """The value, if it is what Dynamo saw; with its dtype, where autocast decided on that."""
        example = example_of(node)
        learn(example, value)
        if isinstance(value, Tensor) and isinstance(example, Tensor):
            if tuple(value.shape) != tuple(map(hint_of, example.shape)):
                logger.debug("axes lost at %s: shape %s", node.format_node(), tuple(value.shape))
                return self._opaque(node)
            return value if value.dtype == example.dtype else value.to(example.dtype)
        return value


def _hints(sizes: Sequence[int | torch.SymInt]) -> tuple[int, ...] | None:
    hints = [hint_of(size) for size in sizes]
    known = tuple(hint for hint in hints if hint is not None)
    return known if len(known) == len(hints) else None


def _note_origin(node: fx.Node, value: Any) -> None:
    """Let axes that came into being at a node know that."""
    where = f"{node.name} ({_name(node) if node.op.startswith('call') else 'an input of the graph'})"
    for item in tensors_in((value,)):
        for axis in itertools.chain(*dims_of(item)):
            axis.origin = axis.origin or where


def _is_parameter(node: fx.Node, value: Tensor) -> bool:
    """Whether an input belongs to the model, and not to a call. Exported graphs tell by their inputs' names."""
    exported = "val" in node.meta and node.name.startswith("p_")
    return node.op == "get_attr" or isinstance(value, torch.nn.Parameter) or exported


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", None) or str(target)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(example_of(node), Tensor)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _set_mesh(value: Any) -> None:
    """Give the outputs of a `meshgrid` their dims: one axis for each input."""
    tensors = [item for item in value if isinstance(item, Tensor)]
    if tensors:
        dims = mesh_dims(dims_of(tensors[0]))
        for tensor in tensors:
            set_dims(tensor, dims)
