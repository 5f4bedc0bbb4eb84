# SPDX-License-Identifier: Apache-2.0
"""The ARM names the pattern of heads whose attention is known."""

import pytest
import torch

from benchmarks.attention.structured import structured_qk
from rainfusion_compile.kernels import operators
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import DENSE, PATTERNS

KINDS = ("spatial", "temporal", "textural", "uniform")


@pytest.mark.parametrize(("grid", "text"), [((9, 14, 18), (0, 0)), ((7, 18, 23), (40, 0)), ((8, 22, 16), (0, 77))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arm_names_the_class_of_structured_heads(grid, text, dtype):
    layout = VideoLayout(grid, text)
    tables = block_tables(layout, sparsity=0.5, patterns=PATTERNS)
    kinds = KINDS * 6
    q, k = structured_qk(layout, kinds, head_dim=64, classes=tables.radii["textural"], batch=2)
    choice, recall = operators.arm_probe(
        q.to(dtype),
        k.to(dtype),
        None,
        *tables.probe_arguments,
        64**-0.5,
        0.95,
        0.8,
    )
    names = (*tables.patterns, DENSE)
    wanted = [DENSE if kind == "uniform" else kind for kind in kinds]
    right = [names[c] == want for sample in choice.tolist() for c, want in zip(sample, wanted, strict=True)]
    assert sum(right) >= 0.95 * len(right), (choice, recall, tables.patterns)
