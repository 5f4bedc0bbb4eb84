# SPDX-License-Identifier: Apache-2.0
"""Caches of diffusers that skip what changes little from step to step: what they still compute is sparse.

A shrunk, unmodified class with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import models
import pytest
import torch
from models import ModelCase
from torch import Tensor

import rainfusion_compile
from benchmarks.zoo.case import Builder

GRID = (4, 6, 8)
STEPS = 4
TIMES = [0]  # the timestep that a pipeline would be at


def first_block(model: Any) -> None:
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))


def broadcast(model: Any) -> None:
    """Pyramid attention broadcast."""
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks.*attn1",),
        current_timestep_callback=lambda: TIMES[0],
    )
    model.enable_cache(config)


def taylor(model: Any) -> None:
    config = diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, cache_identifiers=["blocks.*attn1"]
    )
    model.enable_cache(config)


def faster(model: Any) -> None:
    config = diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 800),  # not the first steps
        spatial_attention_block_identifiers=("blocks.*attn1",),
        current_timestep_callback=lambda: TIMES[0],
        is_guidance_distilled=True,
    )
    model.enable_cache(config)


def case_of(build: Builder) -> ModelCase:
    """The same weights every time."""
    torch.manual_seed(0)
    return build(GRID, 1)


def run(case: ModelCase, model: Any) -> tuple[list[Tensor], dict[str, int]]:
    """All steps' outputs, and how many video self-attentions ran sparse and dense."""
    outs = []
    with torch.no_grad(), rainfusion_compile.observe() as report, case.model.cache_context("cond"):
        report.min_tokens = 0
        for step in range(STEPS):
            noise = case.inputs["hidden_states"] * (1 - 0.02 * step)
            TIMES[0] = 999 - 120 * step
            timestep = torch.full_like(case.inputs["timestep"], TIMES[0])
            outs.append(model(**{**case.inputs, "hidden_states": noise, "timestep": timestep})[0])
    entries = [one for one in report.to_dict()["attentions"] if one["category"] == "video self-attention"]
    assert all(one["grid"] == [*GRID] for one in entries if one["status"] == "sparse")
    counts = {status: sum(one["calls"] for one in entries if one["status"] == status) for status in ("sparse", "dense")}
    return outs, counts


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("build", "cache", "blocks"),
    [
        (models.wan, first_block, False),
        (models.wan, first_block, True),
        (models.cogvideox, first_block, False),  # its frame is left to Python, and takes text and video apart there
        (models.wan, broadcast, True),
        (models.wan, taylor, False),
        (models.wan, faster, False),
    ],
)
def test_what_a_cache_still_computes_is_sparse(build: Builder, cache: Callable[[Any], None], blocks: bool) -> None:
    """As often as without a compiler, and with everything kept the output is the same."""
    case = case_of(build)
    cache(case.model)
    expected, counts = run(case, case.model)
    computed = counts["dense"]  # outside all graphs
    assert 0 < computed < STEPS * case.video

    case = case_of(build)
    options: dict[str, Any] = {"min_tokens": 0, "sparsity": 0.0}
    cache(case.model)
    model: Any = case.model
    if blocks:
        model.compile_repeated_blocks(backend="rainfusion", options=options)
    else:
        model = torch.compile(model, backend="rainfusion", options=options)
    outs, counts = run(case, model)
    assert counts == {"sparse": computed, "dense": 0}
    for out, want in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
