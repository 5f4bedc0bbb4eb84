# SPDX-License-Identifier: Apache-2.0
"""Which launches run a kernel that is compiled already, and that they give it what Triton's launcher would."""

from types import SimpleNamespace

import pytest
import torch

from rainfusion_compile.kernels.gpu.launch import launch


class Compiled:
    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *values: self.launches.append((grid, values))


class Kernel:
    """Stands in for a jitted function ``(x, mask, count, scale, WIDTH, ROWS)``."""

    def __init__(self, specialized=()):
        self.compiled = []
        names = ("x", "mask", "count", "scale", "WIDTH", "ROWS")
        self.params = [
            SimpleNamespace(name=name, is_constexpr=name.isupper(), do_not_specialize=name not in specialized)
            for name in names
        ]

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return run

    @property
    def launches(self):
        return [launched for compiled in self.compiled for launched in compiled.launches]


def call(kernel, x, mask=None, count=3, **constants):
    launch(kernel, (2, 1, 1), x, mask, count, 0.5, **({"ROWS": 8, "WIDTH": 4, "num_warps": 1} | constants))


def test_the_same_kind_of_launch_is_compiled_once_and_gets_addresses_and_constants_in_order():
    kernel, x, y = Kernel(), torch.zeros(16), torch.zeros(4, 8)
    for tensor, count in ((x, 3), (y, 7), (x, 1)):
        call(kernel, tensor, count=count)
    assert len(kernel.compiled) == 1
    expected = [((2, 1, 1), (y.data_ptr(), None, 7, 0.5, 4, 8)), ((2, 1, 1), (x.data_ptr(), None, 1, 0.5, 4, 8))]
    assert kernel.launches == expected


def test_another_kind_of_launch_is_compiled_by_itself():
    kernel, x = Kernel(), torch.zeros(16)
    kinds = [
        lambda: call(kernel, x),
        lambda: call(kernel, x.half()),
        lambda: call(kernel, x, mask=x > 0),
        lambda: call(kernel, x, WIDTH=8),
        lambda: call(kernel, x, num_warps=4),
    ]
    for _ in range(2):
        for kind in kinds:
            kind()
    assert len(kernel.compiled) == len(kinds)
    assert all(len(compiled.launches) == 1 for compiled in kernel.compiled)


@pytest.mark.parametrize("change", [{"x": torch.zeros(17)[1:]}, {"count": 2**31}, {"count": -(2**31) - 1}])
def test_what_triton_compiles_another_kernel_for_is_left_to_its_launcher(change):
    kernel = Kernel()
    for _ in range(2):
        call(kernel, **({"x": torch.zeros(16)} | change))
    assert len(kernel.compiled) == 2
    assert not kernel.launches


def test_an_integer_that_triton_would_specialize_on_is_an_error_of_ours():
    with pytest.raises(AssertionError, match="count is specialized"):
        call(Kernel(specialized=("count",)), torch.zeros(16))
