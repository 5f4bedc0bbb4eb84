# SPDX-License-Identifier: Apache-2.0
"""Attention that runs outside all graphs: hearing of each call, and letting somebody else answer it.

It is heard of at the operator `aten::scaled_dot_product_attention`, whose kernel is wrapped when this is first needed,
in the way that `torch.library.get_kernel` is for; for good, as other threads may be inside of it at any time. Who takes
calls is said by a context, in its thread.

- A `TorchFunctionMode` would do as well, but Dynamo guards on the stack of these: a model that was compiled outside of
  the context would be compiled again inside, and trace the mode.
- A `TorchDispatchMode` does not disturb Dynamo, but (outside of inference mode) it hears of the kernels only that the
  operator is made of, which depend on the device. Graphs of AOTAutograd and Inductor call these kernels, too, and would
  be changed from within. And every operator has to go through it.
- Names, such as `torch.nn.functional.scaled_dot_product_attention`, are those of all threads. Dynamo guards on what
  they stand for, and models have other references to it.

Graphs of AOTAutograd and Inductor never call the operator, for tracing decomposes it, on tensors that are passed
through. So is what FX's code calls, which is how other backends run a graph, and what our own kernels call.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import skip_code
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import FakeTensor

from rainfusion_compile.kernels.checks import check_operands
from rainfusion_compile.passes.attention_match import DenseReason, Reason
from rainfusion_compile.report import AttentionReport
from rainfusion_compile.runtime.open_reports import listening, open_reports


@dataclass(frozen=True)
class EagerCall:
    """One call of `scaled_dot_product_attention`, with its arguments and the place in a file that it comes from."""

    where: str
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def tokens(self) -> int | None:
        """Of a self-attention, as far as sizes tell; None of any other."""
        sizes = [item.shape[2] for item in (self.query, self.key, self.value) if item.dim() == 4]
        return sizes[0] if len(sizes) == 3 and len({*sizes}) == 1 and isinstance(sizes[0], int) else None

    @property
    def could_be_sparse(self) -> bool:
        """Whether it is one that our operators take; attention of an autoencoder, for one, most often is none."""
        try:
            check_operands(self.query, self.key, self.value, None)
        except (ValueError, NotImplementedError):
            return False
        return not self.is_causal


Taker = Callable[[EagerCall], Tensor | None]
"""Answers a call, or leaves it dense; it tells the open reports of it if it has had a look."""

_taker: ContextVar[tuple[Taker, bool] | None] = ContextVar("rainfusion_taker", default=None)
_lock = threading.Lock()


@contextmanager
def taking(taker: Taker, *, fake: bool = False) -> Iterator[None]:
    """Let eager calls in this context, in this thread, be answered; of several contexts the innermost counts.

    ``fake``: on tensors without contents, too, which are not those of a compilation.
    """
    hear_eager_calls()
    token = _taker.set((taker, fake))
    try:
        yield
    finally:
        _taker.reset(token)


def is_taken() -> bool:
    """Whether eager calls in this context are answered by somebody."""
    return _taker.get() is not None


def hear_eager_calls() -> None:
    """Wrap the operator's kernel, the first time that this is called."""
    with _lock:
        _wrap()


@functools.cache
def _wrap() -> torch.library.Library:
    library, name = torch.library.Library("aten", "IMPL"), "scaled_dot_product_attention"
    dense = torch.library.get_kernel(f"aten::{name}", "CPU")  # one for all keys: it is made of other operators

    def attend(keys: Any, *args: Any, **kwargs: Any) -> Tensor:
        if (_taker.get() is not None or open_reports) and (taken := _taken(*args, **kwargs)) is not None:
            return taken
        return dense.call_boxed(keys, *args, **kwargs)

    # Frames that Dynamo left to Python call this, and it would look into it. All below is C, or disabled by itself.
    skip_code(attend.__code__)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is replaced
        library.impl(name, attend, "CompositeImplicitAutograd", with_keyset=True, allow_override=True)
    return library


@torch._dynamo.disable
def _taken(*args: Any, **kwargs: Any) -> Tensor | None:
    """What somebody answers instead of the operator."""
    (taker, fake), reports = _taker.get() or (None, False), listening(note=False)
    compiles = CompileContext.try_get() is not None if fake else torch._C._len_torch_dispatch_stack() > 0
    if compiles or any(isinstance(x, Tensor) and _is_odd(x, fake) for x in args):
        return None
    if (taker is None and not reports) or (where := _caller()) is None:
        return None
    call = EagerCall(where, *args, **kwargs)
    if taker is not None:
        with torch._C.DisableTorchFunction():
            return taker(call)
    if (attention := overheard(call)) is not None:
        for report in reports:
            report.overhear(attention, call.query.shape[0])
    return None


def _is_odd(x: Tensor, fake: bool) -> bool:
    """Whether it holds nothing, if it may not be ``fake``, or has no sizes as other tensors have them."""
    return (isinstance(x, FakeTensor) and not fake) or x.is_nested or x.layout != torch.strided


def overheard(call: EagerCall) -> AttentionReport | None:
    """What a report says of a call that nobody takes; None if no context could make it sparse."""
    if not call.could_be_sparse:
        return None
    _, heads, tokens, head_dim = call.query.shape
    reason = Reason(DenseReason.OUTSIDE, f"{tokens} tokens, outside all graphs ({call.where})")
    return AttentionReport(
        call.where, "dense", reason, reason.kind.remedy, heads=heads, head_dim=head_dim, tokens=tokens, eager=True
    )


def _caller() -> str | None:
    """The file and line, outside of torch, that call attention; None if a graph's code does, or a kernel of ours."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        file, module = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
        if file.startswith("<eval_with_key>") or module.startswith("rainfusion_compile.kernels"):
            return None
        if module.partition(".")[0] != "torch" and module != __name__:
            return "/".join([*Path(file).parts[-2:]]) + f":{frame.f_lineno}"
    return None
