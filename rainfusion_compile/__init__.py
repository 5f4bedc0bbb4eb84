# SPDX-License-Identifier: Apache-2.0
"""Sparse attention for video diffusion transformers: ``torch.compile(model, backend="rainfusion")``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rainfusion_compile.explainer import explain
    from rainfusion_compile.exporter import export
    from rainfusion_compile.functional import attention
    from rainfusion_compile.options import Options
    from rainfusion_compile.passes.provenance.rules_rows import row_wise
    from rainfusion_compile.report import Report
    from rainfusion_compile.runtime.changed_options import changed_options, dense_first_steps
    from rainfusion_compile.runtime.observe import observe
    from rainfusion_compile.runtime.outside_knowledge import video_layout
    from rainfusion_compile.runtime.sparse_eager_attention import sparse_eager_attention

__all__ = [
    "Options", "Report", "__version__", "attention", "changed_options", "dense_first_steps", "explain", "export",
    "observe", "row_wise", "sparse_eager_attention", "video_layout",
]  # fmt: skip

_HOMES = {
    "Options": "options", "Report": "report", "attention": "functional", "explain": "explainer", "export": "exporter",
    "changed_options": "runtime.changed_options", "dense_first_steps": "runtime.changed_options",
    "observe": "runtime.observe", "row_wise": "passes.provenance.rules_rows",
    "sparse_eager_attention": "runtime.sparse_eager_attention",
    "video_layout": "runtime.outside_knowledge",
}  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Lazily: the package is imported when torch.compile looks up a backend's name, which must stay cheap.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"rainfusion_compile.{_HOMES[name]}"), name)
