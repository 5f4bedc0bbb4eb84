# SPDX-License-Identifier: Apache-2.0
"""A Dynamo graph as bytes, with what the analysis asks of it: so that a compiled graph can be loaded elsewhere.

Nodes keep the names of their modules and what sizes, strides and types their values have. That, and not the fake
tensors themselves, for these hold on to all that the process knows of its shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._graph_pickler import GraphPickler
from torch.fx._graph_pickler import Options as PicklerOptions
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._pytree import tree_leaves, tree_map

from rainfusion_compile.passes.graph.nodes import copy_graph, example_of

_EXAMPLE, _STACK = "example_value", "nn_module_stack"


@dataclass(frozen=True)
class _Size:
    """A symbolic size: its expression, and its number in the call that was compiled, if that is known."""

    expression: sympy.Expr
    hint: int | None


@dataclass(frozen=True)
class _Value:
    """What is known of a tensor."""

    shape: tuple[int | _Size, ...]
    strides: tuple[int | _Size, ...]
    dtype: torch.dtype
    device: torch.device
    parameter: bool
    requires_grad: bool


def dump_graph(gm: fx.GraphModule) -> bytes:
    """A graph as bytes. Raises TypeError, naming the node, on what cannot be kept, such as a tensor of a subclass."""
    return GraphPickler.dumps(_bare(gm), PicklerOptions(ops_filter=None, node_metadata_key_filter=None))


def load_graph(data: bytes) -> fx.GraphModule:
    """What `dump_graph` was given, for the analysis: Dynamo and Inductor find nothing that they know in it."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    gm: Any = GraphPickler.loads(data, mode)
    graphs = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    metas = [node.meta for graph in graphs for node in graph.graph.nodes]
    hints = {size.expression: size.hint for meta in metas for size in _sizes_in(meta[_EXAMPLE])}
    revive = _reviver(mode, hints)
    for meta in metas:
        meta[_EXAMPLE] = tree_map(revive, meta[_EXAMPLE])
    for graph in graphs:
        graph.recompile()
    return gm


def _bare(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes hold what is kept of them only; and so those of the graphs inside it."""
    copy = copy_graph(gm)
    copy.meta, copy._param_name_to_source = {}, {}  # type: ignore[assignment]
    for node in copy.graph.nodes:
        stack = node.meta.get(_STACK) or {}
        path = {"": (str(next(reversed(stack.values()))[0]), "")} if stack else {}
        node.meta = {_EXAMPLE: tree_map(lambda value, node=node: _kept(value, node), example_of(node)), _STACK: path}
    for name, child in list(copy.named_children()):
        if isinstance(child, fx.GraphModule):
            copy.add_module(name, _bare(child))
    return copy


def _kept(value: Any, node: fx.Node) -> Any:
    if isinstance(value, torch.SymInt):
        return _Size(value.node.expr, value.node.hint)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return value.node.hint
    if not isinstance(value, Tensor):
        return value
    if type(value) not in (FakeTensor, torch.nn.Parameter) or value.layout != torch.strided:
        raise TypeError(f"{node.name} has a {type(value).__name__} of layout {value.layout}, which cannot be saved")
    shape, strides = (tuple(_kept(size, node) for size in sizes) for sizes in (value.shape, value.stride()))
    parameter = isinstance(value, torch.nn.Parameter)
    return _Value(shape, strides, value.dtype, value.device, parameter, value.requires_grad)


def _sizes_in(value: Any) -> Iterator[_Size]:
    for leaf in tree_leaves(value):
        sizes = (*leaf.shape, *leaf.strides) if isinstance(leaf, _Value) else (leaf,)
        yield from (size for size in sizes if isinstance(size, _Size))


def _reviver(mode: FakeTensorMode, hints: Mapping[sympy.Expr, int | None]) -> Callable[[Any], Any]:
    """What makes values of what was kept, with symbols of their own. `hints`: numbers of expressions, by which symbols
    that no input shows are told from others.
    """
    env: Any = mode.shape_env
    symbols: dict[sympy.Symbol, sympy.Expr] = {}

    def symbol(name: sympy.Symbol) -> sympy.Expr:
        if name not in symbols:
            if (hint := hints.get(name)) is None:
                symbols[name] = env.create_unbacked_symint().node.expr
            else:
                source = ConstantSource(f"rainfusion_{name}")
                dynamic: Any = {"dynamic_dim": DimDynamic.DYNAMIC, "do_not_specialize_zero_one": True}
                symbols[name] = env.create_symbol(hint, source, **dynamic)
        return symbols[name]

    def revive(value: Any) -> Any:
        if isinstance(value, _Size):
            own = {name: symbol(name) for name in value.expression.free_symbols}
            return env.create_symintnode(value.expression.xreplace(own), hint=value.hint)
        if not isinstance(value, _Value):
            return value
        shape, strides = (tuple(map(revive, sizes)) for sizes in (value.shape, value.strides))
        with mode, torch.inference_mode(False), torch.no_grad():
            tensor = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
            if value.parameter:
                return torch.nn.Parameter(tensor, value.requires_grad)
            return tensor.requires_grad_(value.requires_grad)

    return revive
