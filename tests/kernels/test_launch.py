# SPDX-License-Identifier: Apache-2.0
"""Which launches run a kernel that is compiled already, and that they give it what Triton's launcher would."""

from types import SimpleNamespace

import pytest
import torch

from rainfusion_compile.kernels.gpu.launch import Launch


class Compiled:
    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *values: self.launches.append((grid, values))


class Kernel:
    """Stands in for a jitted function ``(x, mask, count, scale, WIDTH, ROWS)``."""

    def __init__(self, specialized=()):
        self.compiled = []
        self.first = []
        names = ("x", "mask", "count", "scale", "WIDTH", "ROWS")
        self.params = [
            SimpleNamespace(name=name, is_constexpr=name.isupper(), do_not_specialize=name not in specialized)
            for name in names
        ]

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.first.append((grid, args, constants))
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run

    @property
    def launches(self):
        return [launched for compiled in self.compiled for launched in compiled.launches]


def planned(kernel, *numbers, **constants):
    return Launch(kernel, (2, 1, 1), *(numbers or (3, 0.5)), **({"ROWS": 8, "WIDTH": 4, "num_warps": 1} | constants))


def test_it_is_compiled_once_and_gets_addresses_numbers_and_constants_in_order():
    kernel, x, y = Kernel(), torch.zeros(16), torch.zeros(4, 8)
    launch = planned(kernel)
    for tensor in (x, y, x):
        launch(tensor, None)
    constants = {"ROWS": 8, "WIDTH": 4, "num_warps": 1, "enable_fp_fusion": True}
    assert kernel.first == [((2, 1, 1), (x, None, 3, 0.5), constants)]
    assert kernel.launches == [((2, 1, 1), (tensor.data_ptr(), None, 3, 0.5, 4, 8)) for tensor in (y, x)]


def test_what_is_no_tensor_is_handed_on_as_it_is():
    kernel, x, descriptor = Kernel(), torch.zeros(16), object()
    launch = planned(kernel)
    launch(x, descriptor)
    launch(x, descriptor)
    assert kernel.launches == [((2, 1, 1), (x.data_ptr(), descriptor, 3, 0.5, 4, 8))]


@pytest.mark.parametrize("unaligned_first", [True, False])
def test_tensors_that_are_not_aligned_are_left_to_tritons_launcher(unaligned_first):
    kernel, aligned, unaligned = Kernel(), torch.zeros(16), torch.zeros(17)[1:]
    launch = planned(kernel)
    tensors = (unaligned, aligned, aligned) if unaligned_first else (aligned, unaligned, aligned)
    for tensor in tensors:
        launch(tensor, None)
    assert [values[0] is unaligned for _, values, _ in kernel.first] == [unaligned_first, not unaligned_first]
    assert kernel.launches == [((2, 1, 1), (aligned.data_ptr(), None, 3, 0.5, 4, 8))]


def test_an_integer_that_triton_would_specialize_on_is_an_error_of_ours():
    with pytest.raises(AssertionError, match="count is specialized"):
        planned(Kernel(specialized=("count",)))(torch.zeros(16), None)


def test_too_few_tensors_or_numbers_are_an_error_of_ours():
    with pytest.raises(AssertionError, match="mask, count, scale"):
        planned(Kernel())(torch.zeros(16))
    with pytest.raises(AssertionError, match="count, scale"):
        planned(Kernel(), 3)(torch.zeros(16), None)
