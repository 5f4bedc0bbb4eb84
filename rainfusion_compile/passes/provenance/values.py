# SPDX-License-Identifier: Apache-2.0
"""Values of small tensors that are made of nothing but numbers, as masks over frames are: computed where asked for."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

_MOST, _DEEPEST = 1024, 32
"""Elements of what is remembered, and operators that made it, one after the other."""
_NEW = ("arange", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros")


class _Made(NamedTuple):
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    depth: int


def remember(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Remember how what an operator returned was made, if its value follows from the call alone."""
    if not isinstance(out, Tensor) or out.numel() > _MOST or any(map(_is_unknown, args)):
        return
    operands = _tensors(args, kwargs)
    made = [_made(one) for one in operands]
    name = func._schema.name.removeprefix("aten::")
    if not (all(made) if operands else name in _NEW):
        return
    depth = 1 + max((one.depth for one in made if one), default=0)
    random = torch.Tag.nondeterministic_seeded in func.tags
    if not (random or func._schema.is_mutable or "empty" in name or depth > _DEEPEST):
        out._rainfusion_made = _Made(func, args, kwargs, depth)  # type: ignore[attr-defined]


def _is_unknown(value: Any) -> bool:
    return isinstance(value, Tensor) and not hasattr(value, "_rainfusion_made")


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among an operator's arguments, and in lists of such."""
    each = (value if isinstance(value, (list, tuple)) else (value,) for value in (*args, *kwargs.values()))
    return [item for values in each for item in values if isinstance(item, Tensor)]


def _made(tensor: Tensor) -> _Made | None:
    made: _Made | None = getattr(tensor, "_rainfusion_made", None)
    return made if made is None or tensor._version == 0 else None  # else it was written into


def values_of(tensor: Tensor) -> list[Any] | None:
    """The values of a tensor's elements; None if they are not known."""
    with suppress(RuntimeError), _disable_current_modes():
        return None if _made(tensor) is None else _value_of(tensor, {}).flatten().tolist()
    return None


def _value_of(tensor: Tensor, known: dict[int, Tensor]) -> Tensor:
    if id(tensor) not in known:
        made = _made(tensor)
        if made is None:
            raise RuntimeError("an operand was written into")
        args, kwargs = tree_map_only(Tensor, lambda one: _value_of(one, known), (made.args, made.kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        known[id(tensor)] = made.func(*args, **kwargs)
    return known[id(tensor)]
