# SPDX-License-Identifier: Apache-2.0
"""Which inputs a value is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import capture
from torch import Tensor, nn

from rainfusion_compile.passes.graph.made_of import inputs_of_nodes


def made_of(model: Callable[..., Any], *args: Tensor) -> list[set[str]]:
    """Of each output, the names of its inputs."""
    (graph,) = capture(model, *args)
    inputs, (output,) = graph.graph.find_nodes(op="placeholder"), graph.graph.find_nodes(op="output")
    found = inputs_of_nodes(graph.graph)
    return [{inputs[number].name for number in found[node]} for node in output.args[0]]


def written_late(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    row = torch.zeros(4, 4)
    view = row[:2].relu()
    row[0] = x[0]
    return row[1:] + 0, view.add_(y.sum()) + 1


def written_through_a_view(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    whole = torch.zeros(4, 4)
    first = whole.view(-1)
    first[:4].copy_(y[0])
    return whole * x, first.sin()


MODELS: dict[str, tuple[Callable[..., Any], list[set[str]]]] = {
    "sums": (lambda x, y: (x + 1, x * y, torch.zeros(4) + y), [{"l_x_"}, {"l_x_", "l_y_"}, {"l_y_"}]),
    "no values": (lambda x, y: (x.type_as(y), x[:1].expand_as(y), x.to(y)), [{"l_x_"}] * 3),
    "written late": (written_late, [{"l_x_"}, {"l_x_", "l_y_"}]),  # into what the other was made of: by then, or not
    "written through a view": (written_through_a_view, [{"l_x_", "l_y_"}, {"l_y_"}]),
}


@pytest.mark.parametrize(("model", "expected"), MODELS.values(), ids=MODELS)
def test_inputs(model: Callable[..., Any], expected: list[set[str]]) -> None:
    assert made_of(model, torch.randn(4, 4), torch.randn(4, 4).double()) == expected


def test_parameters_are_left_out() -> None:
    (names,) = made_of(nn.Linear(4, 4), torch.randn(4, 4))
    assert len(names) == 1
    assert not any("weight" in name or "bias" in name for name in names)
