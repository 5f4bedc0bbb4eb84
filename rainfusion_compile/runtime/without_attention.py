# SPDX-License-Identifier: Apache-2.0
"""Models of which no graph attends over a video, as Dynamo left that to Python: told when they run a second time.

By then all their graphs are known. What runs outside of these is not heard of, unless a report is open.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from rainfusion_compile.passes.attention_match import DenseReason
from rainfusion_compile.passes.graph.symbolic_sizes import shape_of
from rainfusion_compile.passes.rewrite.analysis import Plan
from rainfusion_compile.passes.rewrite.notices import Notices
from rainfusion_compile.passes.rewrite.summary import category
from rainfusion_compile.runtime.eager_calls import is_taken

_models: WeakIdKeyDictionary = WeakIdKeyDictionary()  # what the graphs of each hold, for as long as it lives


def without_attention(plan: Plan) -> Callable[[], None] | None:
    """Hear of a graph that is compiled for a model. If it is the model's first, returns what is to be told of its runs.

    That one, most often, runs once in each call of the model. Blocks that are compiled one by one may share it: then
    the first of them has run.
    """
    model = plan.tell.whole()
    if model is None:
        return None
    graphs: _Graphs = _models.setdefault(model, _Graphs())
    is_first = graphs.add(plan)
    return _Runs(graphs, Notices(model), plan.options.min_tokens) if is_first and not graphs.attends else None


class _Graphs:
    """What is known of the graphs of one model: how many, of how many tokens in a row, and whether any attends."""

    def __init__(self) -> None:
        self.count, self.tokens, self.attends = 0, 0, False

    def add(self, plan: Plan) -> bool:
        """Whether it is the first."""
        self.count += 1
        self.attends |= any(
            category(match, plan.options.min_tokens) == "video self-attention" for match in plan.matches
        )
        if not self.attends:
            self.tokens = max([self.tokens, *map(_tokens, plan.gm.graph.nodes)])
        return self.count == 1


class _Runs:
    """Counts the runs of a model's first graph."""

    def __init__(self, graphs: _Graphs, tell: Notices, min_tokens: int) -> None:
        self.graphs, self.tell, self.min_tokens, self.count = graphs, tell, min_tokens, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count != 2 or self.graphs.attends or self.graphs.tokens < max(self.min_tokens, 1) or is_taken():
            return
        self.tell(
            f"none of its {self.graphs.count} graphs attends over a video; if it does so outside of them, "
            f"{DenseReason.OUTSIDE.remedy}; rainfusion_compile.explain tells where"
        )


def _tokens(node: fx.Node) -> int:
    """How many tokens a node holds if it is ``[B, S, C]``, as models have them between layers; else 0."""
    shape = shape_of(node)
    return shape[1] or 0 if len(shape) == 3 else 0
