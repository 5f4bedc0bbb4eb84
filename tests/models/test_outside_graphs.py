# SPDX-License-Identifier: Apache-2.0
"""What keeps the compiler away from a model of diffusers: users are told, and attention can be sparse all the same.

Shrunk, unmodified classes with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import models
import pytest
import torch
from models import ModelCase
from torch import Tensor, nn

import rainfusion_compile
from benchmarks.zoo import conv
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


TOLD = "MochiTransformer3DModel: none of its 11 graphs attends over a video"


def test_a_model_that_attends_outside_its_graphs_is_told_of_once(caplog):
    case = conv.mochi()
    compiled = torch.compile(case.model, backend="rainfusion", options={"min_tokens": 60})
    with torch.no_grad():
        compiled(**case.inputs)
        assert TOLD not in caplog.text
        for _ in range(3):
            compiled(**case.inputs)
    assert caplog.text.count(TOLD) == 1


@pytest.mark.parametrize("way", ["few tokens", "made sparse", "in one graph"])
def test_nothing_is_told_where_that_surprises_nobody(way: str, caplog):
    case = conv.mochi()
    options = {"min_tokens": 10_000 if way == "few tokens" else 60, "sparsity": 0.5, "error": 1.0}
    compiled = torch.compile(case.model, backend="rainfusion", options=options, fullgraph=way == "in one graph")
    sparse = rainfusion_compile.sparse_eager_attention(case.grid, case.text, min_tokens=60)
    with torch.no_grad(), sparse if way == "made sparse" else nullcontext():
        for _ in range(3):
            compiled(**case.inputs)
    assert "none of its" not in caplog.text


@pytest.mark.parametrize("whole", [False, True])
def test_of_a_model_whose_blocks_attend_nothing_is_told(whole: bool, caplog):
    case = models.wan(GRID, 2)
    if whole:
        case.model.compile(backend="rainfusion", options=OPTIONS)
    else:
        case.model.compile_repeated_blocks(backend="rainfusion", options=OPTIONS)
    with torch.no_grad():
        for _ in range(3):
            case.model(**case.inputs)
    assert "none of its" not in caplog.text


def test_a_model_without_rows_of_tokens_is_no_surprise(caplog):
    decoder = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 3, 3, padding=1))
    compiled = torch.compile(decoder, backend="rainfusion", options={"min_tokens": 0})
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.randn(1, 4, 3, 8, 8))
    assert "none of its" not in caplog.text
