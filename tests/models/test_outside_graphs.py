# SPDX-License-Identifier: Apache-2.0
"""What keeps the compiler away from a model of diffusers: reports tell of it, and attention can be sparse all the same.

A shrunk, unmodified class with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import ModelCase
from torch import Tensor

import rainfusion_compile
from rainfusion_compile.passes.attention_match import DenseReason

GRID = (6, 12, 16)
OPTIONS: dict[str, Any] = {"min_tokens": 0, "sparsity": 0.5, "error": 1.0}


def with_mag_cache(case: ModelCase) -> None:
    from diffusers import MagCacheConfig

    case.model.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=2))


def with_leaf_offload(case: ModelCase) -> None:
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(case.model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def uncompiled(case: ModelCase) -> None:
    torch.compiler.set_stance("force_eager")


@pytest.fixture(autouse=True)
def _usual_stance(fresh_dynamo):
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("prepare", [with_mag_cache, with_leaf_offload, uncompiled])
def test_outside_all_graphs_attention_is_told_and_can_be_sparse(prepare: Callable[[ModelCase], None]) -> None:
    case = models.wan(GRID, 2)
    prepare(case)
    compiled = torch.compile(case.model, backend="rainfusion", options=OPTIONS)

    def run(model: Any) -> Tensor:
        with torch.no_grad(), case.model.cache_context("cond"):
            return model(**case.inputs)[0]

    def watched(**options: Any) -> tuple[Tensor, dict[str, Any]]:
        with rainfusion_compile.observe() as report:
            report.min_tokens = 0  # as `explain` has it
            if not options:
                out = run(compiled)
            else:
                with rainfusion_compile.sparse_eager_attention(GRID, **options):
                    out = run(compiled)
        found = [entry for entry in report.to_dict()["attentions"] if entry["category"] == "video self-attention"]
        assert len(found) == 1
        return out, found[0]

    dense = run(case.model)
    out, entry = watched()
    assert (entry["status"], entry["calls"], entry["remedy"]) == ("dense", case.video, DenseReason.OUTSIDE.remedy)
    torch.testing.assert_close(out, dense)
    out, entry = watched(**{**OPTIONS, "sparsity": 0.0})
    assert (entry["status"], entry["calls"], entry["grid"]) == ("sparse", case.video, [*GRID])
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)
    out, entry = watched(**OPTIONS)
    assert (entry["status"], entry["calls"]) == ("sparse", case.video)
    assert entry["mean_density"] < 0.9
    assert not torch.allclose(out, dense, rtol=1e-3, atol=1e-3)
