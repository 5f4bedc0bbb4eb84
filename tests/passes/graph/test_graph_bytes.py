# SPDX-License-Identifier: Apache-2.0
"""A graph that went through bytes is analysed as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import hunyuan_video, ltx, wan
from small_video import Video
from torch import fx

from rainfusion_compile.options import Options
from rainfusion_compile.passes.graph.graph_bytes import dump_graph, load_graph
from rainfusion_compile.passes.graph.nodes import copy_graph
from rainfusion_compile.passes.provenance.known_tokens import NOTHING
from rainfusion_compile.passes.rewrite.analysis import Plan, analyse
from rainfusion_compile.passes.rewrite.summary import summarize

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = Options(min_tokens=0)


def plans(model: Any, *args: Any, **kwargs: Any) -> list[tuple[Plan, Plan]]:
    """Of each graph of a model: what becomes of it, and of what was loaded again."""
    found = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        copy = copy_graph(gm)
        found.append(
            (analyse(copy, OPTIONS, lambda: NOTHING), analyse(load_graph(dump_graph(gm)), OPTIONS, lambda: NOTHING))
        )
        return gm

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=kwargs.pop("dynamic", None))(*args, **kwargs)
    return found


@pytest.mark.parametrize(("make", "dynamic"), [(wan, True), (hunyuan_video, False), (ltx, True)])
@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 cannot save all that graphs of any size hold")
def test_models_are_understood_as_before(make, dynamic):
    case = make()
    for one, other in plans(case.model, dynamic=dynamic, **case.inputs):
        assert summarize(one) == summarize(other)
        assert one.any_size == other.any_size
        assert one.first.carried == other.first.carried


def test_other_sizes_get_the_layouts_they_had():
    ((one, other),) = plans(Video(layers=1), torch.randn(1, 3, 5, 18, 22), dynamic=True)
    assert one.any_size
    places = tuple(one.sizes.hints.values())
    swapped = tuple({18: 22, 22: 18}.get(number, number) for number in places)
    layouts = [plan.at(swapped, NOTHING) for plan in (one, other)]
    assert layouts[0].shown == layouts[1].shown != one.first.shown
    assert torch.equal(layouts[0].inputs[0], layouts[1].inputs[0])


def test_what_cannot_be_kept_is_named():
    graph = fx.Graph()
    graph.placeholder("x").meta["example_value"] = torch.ones(2)  # no fake tensor: who knows what it stands for
    graph.output(())
    with pytest.raises(TypeError, match="x has a Tensor"):
        dump_graph(fx.GraphModule({}, graph))
