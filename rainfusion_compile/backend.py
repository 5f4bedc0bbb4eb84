# SPDX-License-Identifier: Apache-2.0
"""The backend: ``torch.compile(model, backend="rainfusion")``.

An entry point of the group ``torch_dynamo_backends``, so the name works wherever the package is installed. Our passes
run on Dynamo's graph, before AOTAutograd; then Inductor gets the graph as it would have without us. Working before
Inductor, rather than in its pass hooks, keeps its caches sound: the rewritten graph is what they key on, and the passes
run on every compilation, warm cache or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from rainfusion_compile.options import Options


def rainfusion(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Sequence[Any]]:
    """Compile a Dynamo graph: video self-attention made sparse, everything by Inductor.

    Args:
        gm, example_inputs: as Dynamo hands them to a backend.
        mode: Inductor's mode, from ``torch.compile(mode=...)``.
        options: see :class:`rainfusion_compile.Options`.

    Raises:
        ValueError: on an unknown or impossible option.
    """
    from rainfusion_compile.passes.rewriting import rewrite
    from rainfusion_compile.runtime import ObservedGraph

    settings = Options.parse(options, mode)
    report = rewrite(gm, settings)
    inductor: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")
    compiled = inductor(gm, example_inputs, config_patches=_inductor_config(settings, rewritten=bool(report.sparse)))
    return ObservedGraph(compiled, report) if report.attentions else compiled


def _inductor_config(settings: Options, *, rewritten: bool) -> dict[str, Any]:
    """The user's Inductor options; and, for a graph we changed, what its cache entries depend on besides the graph."""
    from torch import _inductor

    config: dict[str, Any] = {}
    if settings.inductor_mode is not None and settings.inductor_mode != "default":
        config |= _inductor.list_mode_options(settings.inductor_mode)
    config |= {name.replace("-", "_"): value for name, value in settings.inductor.items()}
    if rewritten:
        from rainfusion_compile import __version__
        from rainfusion_compile.kernels.operators import fingerprint

        # Inductor's and AOTAutograd's caches see our operators' names, not what they return. This setting exists to say
        # that an operator is cacheable, as ours are anyway; its value is part of both caches' keys.
        name = "unsafe_marked_cacheable_functions"
        already = config.get(name, getattr(_inductor.config, name))
        config[name] = {**already, "torch.ops.rainfusion": f"{__version__} {fingerprint()} {settings!r}"}
    return config


def _reset() -> None:
    """What ``torch._dynamo.reset`` does for Inductor: forget CUDA graphs."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


rainfusion.reset = _reset  # type: ignore[attr-defined]
