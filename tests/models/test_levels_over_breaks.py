# SPDX-License-Identifier: Apache-2.0
"""Models of diffusers that break into graphs: all are dense at the noise levels that are to be, or at all of them.

Shrunk, unmodified classes with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import models
import pytest
import torch

import rainfusion_compile
from benchmarks.zoo import conv, wan
from benchmarks.zoo.case import ModelCase

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {"min_tokens": 60, "error": 1.0, "sparsity": 0.6, "dense_steps": 0.25}


def kinds(case: ModelCase, compiled: Any, timestep: int, noise: float = 0.0) -> list[bool]:
    """Of each attention over the video, whether it was dense."""
    inputs = {**case.inputs, "timestep": torch.full_like(case.inputs["timestep"], timestep)}
    if noise:
        inputs["hidden_states"] = inputs["hidden_states"] * noise
    with torch.no_grad(), rainfusion_compile.observe() as report:
        compiled(**inputs)
    entries = [one for one in report.to_dict()["attentions"] if one["category"] == "video self-attention"]
    assert all(one["status"] == "sparse" for one in entries)
    heads = [{head == "dense" for sample in one["patterns"] for head in sample} for one in entries]
    return [one == {True} for one, entry in zip(heads, entries, strict=True) for _ in range(entry["calls"])]


@pytest.mark.parametrize("build", [conv.hunyuan_video_15, conv.hunyuan_video_framepack])
def test_the_condition_reaches_all_blocks(build: Callable[[], ModelCase], compiled_count, caplog):
    case = build()
    model = torch.compile(case.model, backend="rainfusion", options=OPTIONS)
    graphs = 0
    for timestep in (999, 760, 740, 200, 900, 500):
        found = kinds(case, model, timestep)
        assert found == [timestep >= 750] * 2, timestep
        graphs = graphs or len(compiled_count)
    assert len(compiled_count) == graphs
    assert "dense_steps" not in caplog.text


@pytest.mark.parametrize("build", [models.wan, models.cogvideox])
def test_a_first_block_cache(build: Callable[..., ModelCase]):
    """Breaks a model after its first block, whose difference from the last step tells whether the others are run."""
    torch.manual_seed(0)
    case = build((4, 6, 8), 1)
    case.model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
    model: Any = torch.compile(case.model, backend="rainfusion", options={**OPTIONS, "min_tokens": 0})
    with case.model.cache_context("cond"):
        counts = []
        for step, timestep in enumerate((999, 900, 760, 700, 500, 300)):
            found = kinds(case, model, timestep, 1 - 0.3 * step)
            assert set(found) == {timestep >= 750}
            counts.append(len(found))
    assert {*counts} == {1, 2}  # some steps skip, some do not


def test_where_it_reaches_none_they_are_dense(caplog):
    case = wan.wan_animate_2_extract()
    model = torch.compile(case.model, backend="rainfusion", options=OPTIONS)
    for timestep in (999, 200):
        assert {*kinds(case, model, timestep)} == {True}
    assert "does not show which input is the timestep" in caplog.text
