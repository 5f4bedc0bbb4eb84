# SPDX-License-Identifier: Apache-2.0
"""Without a GPU, Triton kernels run under Triton's interpreter. It must be told before anything imports Triton."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # pytest-xdist's workers use all cores already
os.environ.setdefault("RAINFUSION_ORDERS_SEED", str(random.randrange(10_000)))  # pytest-xdist's workers inherit it
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _teach_the_interpreter_bfloat16_products() -> None:
    """Triton's interpreter keeps bfloat16 as its 16 bits and multiplies those as integers (3.6 to 3.7.1)."""
    import numpy as np
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widen(x: Any) -> Any:
        bits = x.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == bfloat16 and a.data.dtype == np.uint16:
            a, b = widen(a), widen(b)
        return plain(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _teach_the_interpreter_bfloat16_products()

settings.register_profile("default", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


def pytest_report_header() -> str:
    return f"random token orders: RAINFUSION_ORDERS_SEED={os.environ['RAINFUSION_ORDERS_SEED']}"


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    """`torch.set_default_dtype`, undone after the test."""
    usual = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(usual)
