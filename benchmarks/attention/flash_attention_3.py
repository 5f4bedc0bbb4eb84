# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-3 as a baseline, where it can be imported: the fastest dense kernel on Hopper GPUs that people run.

    pip install --no-deps fa3-fwd      # a wheel for CUDA 13 and torch's stable ABI; or FlashAttention's own build

Nothing of ours depends on it. A benchmark that runs without it says so, in its output and in its file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
MISSING = "none: it could not be imported"


@functools.cache
def _function() -> Callable[..., Any] | None:
    """Its ``flash_attn_func`` of ``[B, S, H, D]``, or None where there is none or it does not load."""
    for module, config in (("flash_attn_interface", None), ("fa3_fwd_interface", "fa3_fwd_config")):
        try:
            if config is not None:  # the wheel looks for its build flags under the name they have in the original
                sys.modules.setdefault("flash_attn_config", importlib.import_module(config))
            function: Callable[..., Any] = importlib.import_module(module).flash_attn_func
        except (ImportError, OSError) as error:
            if not isinstance(error, ModuleNotFoundError):
                print(f"FlashAttention-3: {str(error).splitlines()[0][:150]}", flush=True)
            continue
        return function
    return None


def available() -> bool:
    return _function() is not None


def version() -> str:
    """What a result records: the package and its version."""
    if not available():
        return MISSING
    for package in ("flash_attn_3", "fa3-fwd"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Dense attention over ``[B, H, S, D]``, bfloat16, or float8 (e4m3, scales of one) with a bfloat16 result.

    Raises:
        RuntimeError: it is not here, or takes no such tensors; it takes no mask.
    """
    function = _function()
    if function is None:
        raise RuntimeError("FlashAttention-3 cannot be imported")
    if mask is not None:
        raise RuntimeError("FlashAttention-3 takes no mask")
    if q.dtype not in (torch.bfloat16, FP8):
        raise RuntimeError(f"FlashAttention-3 takes bfloat16, not {q.dtype}")
    out = function(*(x.transpose(1, 2) for x in (q, k, v)))
    out = out[0] if isinstance(out, tuple) else out  # older builds also return the log-sum-exp
    result: Tensor = out.transpose(1, 2)
    return result


@torch.library.custom_op("rainfusion_benchmarks::flash_attention_3", mutates_args=())
def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` in a graph that is compiled."""
    return attention(q, k, v)


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
