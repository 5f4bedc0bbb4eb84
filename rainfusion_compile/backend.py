# SPDX-License-Identifier: Apache-2.0
"""The backend: ``torch.compile(model, backend="rainfusion")``, an entry point of ``torch_dynamo_backends``.

Our passes run on Dynamo's graph, before AOTAutograd; then Inductor gets the graph as it would have without us. Working
before Inductor, rather than in its pass hooks, keeps its caches sound: the rewritten graph is what they key on, and the
passes run on every compilation, warm cache or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from rainfusion_compile.inductor import reset
from rainfusion_compile.options import Options
from rainfusion_compile.torch_version import warn_if_untested


def rainfusion(
    gm: fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Sequence[Any]]:
    """Compile a Dynamo graph: video self-attention made sparse, everything by Inductor.

    ``mode`` is Inductor's, from ``torch.compile(mode=...)``; for ``options`` see :class:`rainfusion_compile.Options`.
    Raises ValueError on an unknown or impossible one.
    """
    warn_if_untested(torch.__version__)  # before all that another version may lack
    # here: importing a backend must stay cheap
    from rainfusion_compile.passes.provenance.ranks import places_in
    from rainfusion_compile.passes.rewrite.analysis import analyse
    from rainfusion_compile.passes.rewrite.notices import Notices, compiled_model, whole_model
    from rainfusion_compile.runtime.compiled_graphs import WaitingGraph, compile_plan
    from rainfusion_compile.runtime.outside_knowledge import Listener
    from rainfusion_compile.runtime.saved_graphs import Original, is_to_be_saved

    # Under this name AOTAutograd would file its part alone, and another process would run that instead of ours. Without
    # it, a package of Dynamo's compiles the graph again; it does not look at options, so it must not be believed.
    vars(gm).pop("_backend_id", None)
    settings, original = Options.parse(options, mode), Original.of(gm)
    outside = Listener(settings, places_in(gm))  # what inputs, tables of positions and contexts say
    # normalize, provenance, match
    tell = Notices(model := compiled_model(), whole=whole_model(model))
    plan = analyse(gm, settings, lambda: outside.listen(example_inputs).wait(), tell)
    if plan.waits:  # only what a call brings can tell the layout
        outside.asks = plan.normalized.asks
        waiting = WaitingGraph.of(plan, outside, original)
        if is_to_be_saved():
            waiting.compile_for(example_inputs)
        return waiting
    return compile_plan(plan, example_inputs, outside, original)  # operators in, other spellings back; then Inductor


rainfusion.reset = reset  # type: ignore[attr-defined]
