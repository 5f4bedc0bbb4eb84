# SPDX-License-Identifier: Apache-2.0
"""Launching Triton kernels in about half of the time that Triton's own launcher takes a CPU.

That one finds out on every launch what each argument is, of which width and how aligned, to know for which of these
the kernel has been compiled. Most of it is known here: integers are not specialized on, and what PyTorch allocates is
aligned. A launch for which both hold asks for dtypes alone, then runs the kernel that Triton compiled for the first
such launch. Any other launch is Triton's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_ALIGNED = 16  # bytes: what Triton specializes pointers on
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], Any]] = {}
"""For each kind of launch what was compiled, the constants that follow its arguments, and the jitted function, which
keeps the ``id`` of the key its own. As many as Triton compiles."""


def launch(kernel: Any, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the current device, which is that of the first argument.

    Args:
        kernel: a jitted function whose integer arguments are all ``do_not_specialize``.
        args: the arguments that are no ``constexpr``: tensors, None, TMA descriptors, integers, floats.
        constants: the others, and Triton's options.
    """
    kinds: list[Any] = []
    values: list[Any] = []
    addresses = 0
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            addresses |= address
            kinds.append(arg.dtype)
            values.append(address)
        elif type(arg) is int:
            if not -(2**31) <= arg < 2**31:
                addresses = 1  # 64 bits: a kernel of its own
            values.append(arg)
        else:
            kinds.append((arg.base.dtype, *arg.block_shape) if hasattr(arg, "block_shape") else type(arg))
            values.append(arg)
    if addresses % _ALIGNED:
        kernel[grid](*args, **constants)
        return
    key = (id(kernel), args[0].get_device(), *kinds, *constants.items())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        if compiled is not None:  # as Triton's interpreter gives
            _compiled[key] = compiled, _constants(kernel, args, constants), kernel
        return
    compiled, rest, _ = found
    compiled[grid](*values, *rest)


def _constants(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """Values of the parameters after the arguments. What Triton would specialize on besides is an error of ours."""
    names = [parameter.name for parameter in kernel.params[len(args) :]]
    for arg, parameter in zip(args, kernel.params, strict=False):
        assert not parameter.is_constexpr, f"{kernel}: {parameter.name} is no argument"
        assert parameter.do_not_specialize or type(arg) is not int, f"{kernel}: {parameter.name} is specialized"
    return tuple(constants[name] for name in names)
