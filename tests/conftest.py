# SPDX-License-Identifier: Apache-2.0
"""What all tests share: Triton's interpreter where there is no GPU, and a stand-in for Inductor.

Triton must be told of the interpreter before anything imports it. Inductor's C++ compiler is most of what a test that
compiles costs, so only those marked ``inductor`` wait for it.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors gain nothing by more, and pytest-xdist's workers wait
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's, which Triton's interpreter multiplies with

import torch
from hypothesis import HealthCheck, settings
from torch import fx

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # pytest-xdist's workers use all cores already
os.environ.setdefault("RAINFUSION_ORDERS_SEED", "1")  # which random models are drawn: any number will do
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


def _patch_the_language_once_a_launch() -> None:
    """At every call of a device function, Triton's interpreter looks through all of `triton.language` for what to
    replace (3.6 to 3.7.1): a third of what a test takes, and after the first call nothing is left to replace."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_once(fn: Any) -> Any:
        seen = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if seen and seen <= patched:
            return interpreter._LangPatchScope()
        patched.update(seen)
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


def _look_for_overflows(on: bool) -> None:
    """Whether the interpreter looks at every sum and product of integers, which takes it a third of a test's time."""
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=on)


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _teach_the_interpreter_bfloat16_products()
    _patch_the_language_once_a_launch()
    _look_for_overflows(False)


def _leave_guards_untimed() -> None:
    """After every compilation, Dynamo empties the processor's caches to time guards for its log (2.11 to 2.13)."""
    import torch._dynamo.guards

    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


_leave_guards_untimed()
gc.set_threshold(20_000, 20, 20)  # what Dynamo makes stays for a while: looking for garbage seldom frees as much
settings.register_profile("default", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture(scope="module")
def overflows_are_errors() -> Iterator[None]:
    """Integers of 32 bits that do not fit any more are errors in Triton's interpreter."""
    _look_for_overflows(True)
    yield
    _look_for_overflows(False)


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    """`torch.set_default_dtype`, undone after the test."""
    usual = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(usual)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing that was compiled before, nor left to what comes after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled_count(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each graph that was compiled, whether it was rewritten."""
    from rainfusion_compile.runtime import compiled_graphs

    rewritten: list[bool] = []
    compile_one = compiled_graphs.compile_with_inductor

    def counted(*args: Any, **kwargs: Any) -> Any:
        rewritten.append(kwargs["rewritten"])
        return compile_one(*args, **kwargs)

    monkeypatch.setattr(compiled_graphs, "compile_with_inductor", counted)
    return rewritten


@pytest.fixture
def fixed_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of keys by sample and head alone: by the bits of queries, which rounding changes, no two runs compare."""

    def draws(q: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(q))[:, None] * 7 + torch.arange(q.shape[1]) * 3

    for engine in ("cpu", "reference"):
        monkeypatch.setattr(f"rainfusion_compile.kernels.{engine}.draws", draws)


def pytest_configure(config: pytest.Config) -> None:
    """One cache of compiled code for all workers, and for the next run."""
    if config.pluginmanager.has_plugin("cacheprovider"):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(config.cache.mkdir("inductor")))
        os.environ.setdefault("TRITON_CACHE_DIR", str(config.cache.mkdir("triton")))


LONGEST = (
    "test_offline_compile.py",
    "test_sequence_parallel.py",
    "test_caches.py",
    "test_provenance.py",
    "test_parallel_kinds.py",
    "test_dynamic_shapes.py",
    "test_triton_properties.py",
    "test_saved_graphs.py",
    "test_random_orders.py",
    "test_step_caches.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take a minute or more start first, so that no worker of pytest-xdist waits for another one's."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _operators_one_by_one(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor would compile runs operator by operator, as the pass wrote it."""
    if request.node.get_closest_marker("inductor"):
        return
    lookup = torch._dynamo.lookup_backend

    def stand_in(gm: fx.GraphModule, inputs: list[Any], **config: Any) -> Callable[..., Any]:
        return gm.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: stand_in if name == "inductor" else lookup(name))


def pytest_report_header() -> str:
    return f"random token orders: RAINFUSION_ORDERS_SEED={os.environ['RAINFUSION_ORDERS_SEED']}"
