# SPDX-License-Identifier: Apache-2.0
"""Launching Triton kernels in a fraction of the time that Triton's own launcher takes a CPU.

That one finds out on every launch what each argument is, of which width and how aligned, to know for which of these
the kernel has been compiled. Here all that shapes tell is said once, in a :class:`Launch`, of which every planner
keeps one for each kind of call; a call brings its tensors, of which nothing is asked but whether they are aligned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_ALIGNED = 16  # bytes: what Triton specializes pointers on


class Launch:
    """A kernel on a grid, with the numbers and constants of one kind of call, to be called with its tensors.

    Tensors are the kernel's first parameters, and have the same dtypes in every call, or are None in every call. All
    lie on the current device, the same in every call.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], *numbers: float, **constants: Any) -> None:
        """
        Args:
            kernel: a jitted function whose integer arguments are all ``do_not_specialize``, so that it is compiled
                once for all of them.
            numbers: its integers and floats, which follow the tensors.
            constants: what is ``constexpr``, and Triton's options.
        """
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        self._compiled: Callable[..., None] | None = None
        self._after: tuple[Any, ...] = ()

    def __call__(self, *tensors: Any) -> None:
        """Launch it. Unaligned tensors go through Triton's own launcher, as the first aligned ones do."""
        addresses: list[Any] = []
        any_address = 0
        for tensor in tensors:  # or None, or a TMA descriptor
            if isinstance(tensor, Tensor):
                tensor = tensor.data_ptr()
                any_address |= tensor
            addresses.append(tensor)
        if self._compiled is not None and not any_address % _ALIGNED:
            self._compiled(*addresses, *self._after)
            return
        # Multiply-adds are to be fused: Triton's default so far, and, as 3.9 warns, not for ever.
        compiled = self._kernel[self._grid](*tensors, *self._numbers, enable_fp_fusion=True, **self._constants)
        if compiled is not None and not any_address % _ALIGNED:  # Triton's interpreter compiles nothing
            self._after = self._after_tensors(len(tensors))
            self._compiled = compiled[self._grid]

    def _after_tensors(self, tensors: int) -> tuple[Any, ...]:
        """Values of all other parameters, in order."""
        rest = self._kernel.params[tensors:]
        numbers = [parameter for parameter in rest if not parameter.is_constexpr]
        names = ", ".join(parameter.name for parameter in numbers)
        assert len(numbers) == len(self._numbers), f"{self._kernel} takes {names} after {tensors} tensors"
        for parameter, number in zip(numbers, self._numbers, strict=True):
            fixed = parameter.do_not_specialize or type(number) is not int
            assert fixed, f"{self._kernel}: {parameter.name} is specialized"
        return *self._numbers, *(self._constants[parameter.name] for parameter in rest if parameter.is_constexpr)
