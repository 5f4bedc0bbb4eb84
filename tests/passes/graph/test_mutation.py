# SPDX-License-Identifier: Apache-2.0
"""What a graph writes into."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import capture
from torch import Tensor

from rainfusion_compile.passes.graph.mutation import repeatable


def add_to_zeros(row: Tensor) -> Tensor:
    out = torch.zeros_like(row)
    out += row
    return out


@pytest.mark.parametrize(("of_row", "expected"), [(add_to_zeros, True), (lambda row: row.add_(1) * 2, False)])
def test_what_is_written_under_vmap(of_row: Callable[[Tensor], Tensor], expected: bool) -> None:
    (graph,) = capture(lambda x: torch.vmap(of_row)(x) + 1, torch.randn(3, 4))
    assert repeatable(graph.graph) is expected
