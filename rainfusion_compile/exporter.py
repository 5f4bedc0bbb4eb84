# SPDX-License-Identifier: Apache-2.0
"""``export``: a model with sparse attention as an ExportedProgram, for files and for AOTInductor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from rainfusion_compile.options import Options
from rainfusion_compile.passes.rewrite.exported import rewrite_exported


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    options: Options | Mapping[str, Any] | None = None,
    **settings: Any,
) -> ExportedProgram:
    """``torch.export.export(model, args, kwargs, **settings)``, its video self-attentions sparse, for these sizes.

    Block tables and limits are buffers of the program, which takes and returns what the model does. Whoever loads it,
    by ``torch.export.load`` or from a package of AOTInductor, imports ``rainfusion_compile.kernels.operators`` first.
    What heads chose is not reported, and :func:`rainfusion_compile.changed_options` changes nothing.

    Args:
        options: as of ``torch.compile``.
        settings: further arguments of ``torch.export.export``, such as ``strict``.

    Raises:
        ValueError: on wrong options, and on dynamic shapes: tables are those of one resolution.
    """
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, **settings)
        gm: Any = program.module(check_guards=False)
        assert isinstance(gm, fx.GraphModule)
        rewrite_exported(gm, Options.parse(options))
        return torch.export.export(gm, args, kwargs)
