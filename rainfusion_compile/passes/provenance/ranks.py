# SPDX-License-Identifier: Apache-2.0
"""Groups of ranks that a graph's collectives are over, and tokens of which each rank has a part.

A graph is one rank's. What it says of the others rests on an assumption: the ranks of a group run the same program on
the same inputs, and only their numbers differ. That each of them has the part of its number is not assumed: they ask
one another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import distributed, fx
from torch._ops import OpOverload, OpOverloadPacket

from rainfusion_compile.passes.graph.nodes import arguments, example_of, parameters
from rainfusion_compile.passes.provenance.axes import resolve, slice_of, take
from rainfusion_compile.passes.provenance.axis import Axis, Cut, Dim, find, long, size_of

PATIENCE = 60.0  # seconds that a rank waits for what others say; collectives wait for minutes


@dataclass
class Group:
    """A group of ranks, by their numbers in the whole world, and this one's number in it.

    ``axes`` are of the ranks' numbers, by what each is called. `grace`: seconds for ranks that lag behind.
    """

    rank: int
    members: tuple[int, ...]
    grace: float = 1.0
    axes: dict[str, Axis] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.members)

    def part(self, dim: Dim) -> tuple[Dim, int] | None:
        """What a dim is one of as many equal parts of as there are ranks, and which one; None if it is no such."""
        whole, start, _ = slice_of(dim) or ((), 0, 0)
        size = size_of(dim)
        return (whole, start // size) if size and size_of(whole) == size * self.size and start % size == 0 else None

    def axis(self, what: str, *, permuted: bool = False, lost: bool = False) -> Axis:
        """The ranks' numbers as an axis of what is called so: the same one for all tokens, as these are the same ranks.

        Tokens are in no order along it, or in none that is known, which was `lost` at `what`.
        """
        new = Axis(self.size, permuted=permuted, lost=what if lost else None, ranks=True)
        return self.axes.setdefault(what, new)

    def each_has_its_own(self, part: int, shape: torch.Size) -> bool | None:
        """Whether all ranks have the parts of their numbers of what they exchange in a shape; this one has `part`.

        None if some do not say. Each says so in the store by which they met, whenever it comes here, and waits for the
        others: long for those that never said it, once, and a little for those that did not say it as often as this
        one, for ranks need not analyse their graphs equally often. Who ever had another's part is not asked again.
        """
        store, us = distributed.distributed_c10d._get_default_store(), f"rainfusion/{self.members}"
        here, late = f"{us}/{tuple(shape)}", f"{us}/late/{self.rank}"
        if part != self.rank:
            store.set(f"{here}/no", "")
        often, patience = store.add(f"{here}/{self.rank}", 1), self.grace if store.check([late]) else PATIENCE
        begin = time.monotonic()
        while not store.check([f"{here}/no"]):
            least = min(store.add(f"{here}/{number}", 0) for number in range(self.size))
            waited = time.monotonic() - begin
            if least >= often or (least and waited > self.grace):
                self.grace = self.grace if least >= often else 0.0
                return not store.check([f"{here}/no"])  # which comes before the count of who says it
            if waited > patience:
                store.set(late, "")
                return None
            time.sleep(0.01)
        return False


_groups: ContextVar[Mapping[str, Group]] = ContextVar("rainfusion_groups", default=MappingProxyType({}))


@contextmanager
def groups_of(gm: fx.GraphModule) -> Iterator[None]:
    """Let `group_of` and `own_part` answer for the collectives of a graph, in this thread."""
    token = _groups.set({name: Group(*place) for name, place in places_in(gm).items()})
    try:
        yield
    finally:
        _groups.reset(token)


def places_in(gm: fx.GraphModule) -> dict[str, tuple[int, tuple[int, ...]]]:
    """This process's number in the groups of a graph's collectives, and their ranks."""
    given = [arguments(node)["group_name"] for node in gm.graph.nodes if _collective(node)]
    names = {_name(example_of(group) if isinstance(group, fx.Node) else group) for group in given}
    return {name: place for name in names if (place := _place(name)) is not None}


def group_of(name: Any) -> Group | None:
    """The group of a collective, by its name or as it is; None if this process is in none such."""
    return _groups.get().get(_name(name))


def own_part(dim: Dim) -> tuple[Dim, int] | None:
    """What this rank has its own part of, and where that begins: where its number says, in a group of the graph."""
    for group in _groups.get().values():
        whole, number = group.part(dim) or ((), None)
        if number == group.rank and group.size > 1:
            return whole, group.rank * size_of(dim)
    return None


def take_part(dim: Dim, start: int, stop: int, step: int = 1) -> Dim:
    """What `take` takes. Of a concatenation it is remembered, if it is a rank's part in a group of the graph.

    Its pieces alone would not tell: some rank may have nothing but a run of the video between two texts.
    """
    outer, *inner = long(resolve(dim)) or [Axis(1)]
    each = size_of(inner)
    piece, ends = take(dim, start, stop, step) or (), (start // each, stop // each)
    size = ends[1] - ends[0]
    groups = [group for group in _groups.get().values() if group.size > 1]
    even = any(size * group.size == outer.size for group in groups) and ends[0] % size == 0
    if not outer.parts or step != 1 or start % each or stop % each or not even:
        return piece
    part = take((outer,), *ends) or ()
    parts = part[0].parts if len(part) == 1 and part[0].parts else (part,)
    return (Axis(size, parts=parts, run=Cut(find(outer), *ends, step)), *inner)


def collectives_above(node: fx.Node) -> dict[fx.Node, str]:
    """The collectives that hand tokens on and that a node is computed from, the last first, and how to call them."""
    found, todo, seen = dict[fx.Node, str](), [node], set[fx.Node]()
    while todo:
        one = todo.pop(0)
        if one not in seen:
            seen.add(one)
            todo += one.all_input_nodes
            if (name := _collective(one)) is not None and "reduce" not in name:
                found[one] = f"{one.name} ({name})"
    return found


def _collective(node: fx.Node) -> str | None:
    """The name of the collective that a node starts."""
    packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    name = packet._qualified_op_name if isinstance(packet, OpOverloadPacket) else ""
    starts = name.startswith("_c10d_functional") and "group_name" in parameters(packet)
    return name.split("::")[1] if starts else None


def _name(group: Any) -> str:
    """The name of a group, which newer versions of PyTorch hand on as it is."""
    return str(getattr(group, "group_name", group))


def _place(name: str) -> tuple[int, tuple[int, ...]] | None:
    """This process's number in a group, and its ranks; None if it is in no such group."""
    try:
        resolved: Any = distributed.distributed_c10d._resolve_process_group
        group = resolved(name)
        return group.rank(), tuple(distributed.get_process_group_ranks(group))
    except (AttributeError, KeyError, RuntimeError, ValueError):  # PyTorch without it, or nobody of this name
        return None
