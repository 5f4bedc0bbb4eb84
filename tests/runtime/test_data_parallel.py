# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel, which splits graphs by its buckets of gradients, and calls the parts on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_video import Video
from torch.nn.parallel import DistributedDataParallel

import rainfusion_compile
from rainfusion_compile.backend import rainfusion

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
    pytest.mark.usefixtures("fresh_dynamo", "one_rank"),
]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.inductor
def test_attention_is_sparse_in_every_part_of_a_graph_and_each_call_is_told_once() -> None:
    torch.manual_seed(0)
    model, video = Video(layers=3, dim=256).eval(), torch.randn(1, 3, 5, 20, 24)
    splits = DistributedDataParallel(model)
    parts: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        parts.append(gm)
        return rainfusion(gm, inputs, options={"min_tokens": 0, "sparsity": 0.0})

    compiled = torch.compile(splits, backend=backend)
    with torch.no_grad(), rainfusion_compile.observe() as report:
        outputs = [compiled(video) for _ in range(2)]
    entries = report.to_dict()["attentions"]
    assert len(parts) > 1, "DistributedDataParallel has split nothing"
    assert [(entry["status"], entry["grid"], entry["calls"]) for entry in entries] == [("sparse", [5, 10, 12], 2)] * 3
    for output in outputs:
        torch.testing.assert_close(output, model(video), rtol=1e-5, atol=1e-5)
