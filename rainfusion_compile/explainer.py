# SPDX-License-Identifier: Apache-2.0
"""``explain``: compile, run once, and tell what happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rainfusion_compile.backend import rainfusion
from rainfusion_compile.options import Options
from rainfusion_compile.report import Report
from rainfusion_compile.runtime.observe import observe


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Options | Mapping[str, Any] | None = None,
    fullgraph: bool | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Report:
    """Compile ``model`` with this backend, call it once on ``args`` and ``kwargs`` without gradients, and report.

    ``options``, ``fullgraph`` and ``dynamic`` are those of ``torch.compile``. A model already compiled with
    ``backend="rainfusion"`` is run as it is, under the options it was compiled with. The report prints as a table and
    has ``to_dict()``: every attention, sparse or dense, with the reason; for the sparse ones what each head took, and
    its error, recall and realised density.

    Raises:
        ValueError: on wrong options; for a model that is already compiled, on any, and if it is not by this backend.
    """
    marks = ("_torchdynamo_orig_callable", "_compiled_call_impl")  # of what torch.compile and Module.compile leave
    compiled = isinstance(model, torch._dynamo.OptimizedModule)
    compiled |= any(getattr(model, mark, None) is not None for mark in marks)
    if compiled:
        if (options, fullgraph, dynamic) != (None, None, None):
            raise ValueError("this model is already compiled; its options are those it was compiled with")
    else:
        given: Any = Options.parse(options)
        model = torch.compile(model, backend=rainfusion, options=given, fullgraph=bool(fullgraph), dynamic=dynamic)
    with torch.no_grad(), observe() as report:
        report.min_tokens = None if compiled else given.min_tokens
        model(*args, **kwargs)
    if compiled and report.why_empty:
        raise ValueError(f"this model is already compiled, but {report.why_empty}")
    return report
