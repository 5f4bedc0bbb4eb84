# SPDX-License-Identifier: Apache-2.0
"""What Inductor is told besides the graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.autograd import forward_ad

from rainfusion_compile.options import Options


def compile_with_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, *, rewritten: bool
) -> Callable[..., Sequence[Any]]:
    """Compile a graph, which we changed if it is `rewritten`; without Inductor where it would lose derivatives."""
    if forward_ad._current_level >= 0:
        compile_exactly: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")
        return compile_exactly(gm, inputs)
    from torch import _inductor

    mode = options.inductor_mode
    config: dict[str, Any] = {} if mode in (None, "default") else dict(_inductor.list_mode_options(mode))
    config |= {name.replace("-", "_"): value for name, value in options.inductor.items()}
    if rewritten:
        from rainfusion_compile.kernels.operators import source_hash

        # Inductor's and AOTAutograd's caches see our operators' names, not what they return. This setting exists to say
        # that an operator is cacheable, as ours are anyway; its value is part of both caches' keys.
        name = "unsafe_marked_cacheable_functions"
        already = config.get(name, getattr(_inductor.config, name))
        config[name] = {**already, "torch.ops.rainfusion": f"{source_hash()} {options!r}"}
    inductor: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")
    return inductor(gm, inputs, config_patches=config)


def reset() -> None:
    """What ``torch._dynamo.reset`` does for Inductor: forget CUDA graphs, if there can be any.

    Nothing is imported here: Inductor's modules enter themselves in what Dynamo goes through meanwhile.
    """
    if (trees := sys.modules.get("torch._inductor.cudagraph_trees")) is not None:
        trees.reset_cudagraph_trees()
