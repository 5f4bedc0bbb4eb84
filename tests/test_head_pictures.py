# SPDX-License-Identifier: Apache-2.0
"""The picture of what heads attend to shows what the operators read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import randn

from benchmarks.quality import head_pictures
from rainfusion_compile.kernels import reference
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS

LAYOUT = VideoLayout((6, 12, 16), (5, 3))


@pytest.mark.parametrize("pattern", sorted({*PATTERNS} - {"textural"}))  # which is nothing but a sample here
def test_keys_that_are_read_are_those_that_the_operator_reads(pattern: str) -> None:
    tables = Options(arm="recall", sparsity=0.5, patterns=(pattern,)).tables(LAYOUT)
    q, k = randn(2, LAYOUT.tokens, 16).unbind(0)
    mass, read = head_pictures.Sparsest(tables, 0.1).shown(q, k, k, 0)
    assert mass.shape == read.shape == LAYOUT.grids[0]
    assert 0 < mass.sum() < 1  # the rest is text's
    assert set(read.unique().tolist()) == {0.0, 1.0}
    values = torch.ones(LAYOUT.tokens, 1)  # of every key but those of the video that are not read
    values[5:-3, 0] = read.flatten()
    choice = torch.zeros(1, 1, dtype=torch.int32)
    operands = (one[None, None] for one in (q, k, values.expand(-1, 16)))
    out = reference.block_sparse_attention(*operands, choice, None, tables.attention_arguments, 0.25)
    query = 5 + (3 * 12 + 6) * 16 + 8
    torch.testing.assert_close(out[0, 0, query], torch.ones(16, dtype=torch.float64))


def test_keys_that_stand_for_others_are_grey() -> None:
    tables = Options(sparsity=0.7, patterns=("temporal",)).tables(LAYOUT)
    q, k = randn(2, LAYOUT.tokens, 16).unbind(0)
    _, read = head_pictures.Sparsest(tables, 0.1).shown(q, k, k, 0)
    assert bool(((read > 0) & (read < 1)).any())


def test_heads_are_found_in_a_run_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sparsest = head_pictures.Sparsest(Options(sparsity=0.5).tables(LAYOUT), 1.0)
    look = head_pictures.Look(sparsest)
    x = randn(1, 2, LAYOUT.tokens, 16)
    with look:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        look.on = True
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert sparsest.layer == 1
    assert all(head.layer == 0 and head.density < 1 for head in sparsest.found.values())
    head_pictures.draw(list(sparsest.found.values()), "heads", tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 2000
