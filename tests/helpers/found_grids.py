# SPDX-License-Identifier: Apache-2.0
"""Which grids the attentions of a compiled model were sparse over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rainfusion_compile

GRIDS = ((5, 7, 11), (5, 11, 7))  # as many tokens
OPTIONS = {"min_tokens": 0, "sparsity": 0.5, "error": 1.0}


def call(function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, set[Any]]:
    """The output, and the grids that attention was sparse over, None where it was dense."""
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = function(*args)
    entries = report.to_dict()["attentions"]
    assert entries
    return out, {tuple(entry["grid"]) if entry["status"] == "sparse" else None for entry in entries}
