# SPDX-License-Identifier: Apache-2.0
"""``bench``: its table, at a size that measures nothing."""

from __future__ import annotations

import json
from statistics import mean

import pytest

from rainfusion_compile.commands import bench, main
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS

TINY = ["bench", "--device", "cpu", "--grid", "2x4x6", "--text", "3+1", "--heads", "3", "--head-dim", "32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_sparsity_has_density_time_speed_up_and_share_of_the_probe(capsys, dtype):
    assert main([*TINY, "--dtype", dtype, "--sparsity", "0.3", "0.8", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["tokens"], found["dtype"], [*found["dense_ms"]]) == (52, dtype, ["SDPA"])
    for row, sparsity in zip(found["rows"], (0.3, 0.8), strict=True):
        tables = Options(sparsity=sparsity, patterns=PATTERNS).tables(VideoLayout((2, 4, 6), (3, 1)))
        choice = [head % len(tables.patterns) for head in range(3)]
        assert row["density"] == pytest.approx(mean(tables.densities[number] for number in choice))
        assert row["speedup"] == pytest.approx(found["dense_ms"]["SDPA"] / row["sparse_ms"])
        assert row["probe_share_of_dense"] == pytest.approx(row["probe_ms"] / found["dense_ms"]["SDPA"])
    assert "sparsity 0.8: attention ..." in said.err


def test_the_table_is_against_the_fastest_dense_kernel(capsys, monkeypatch):
    times = {"one": 4.0, "other": 2.0}
    monkeypatch.setattr(bench, "dense_times", lambda q, k, v: times)
    monkeypatch.setattr(bench, "_median_ms", lambda q, call: 1.0)
    assert main([*TINY, "--sparsity", "0.5"]) == 0
    size, dense, header, row = capsys.readouterr().out.splitlines()
    assert size.endswith("2x4x6 and text 3+1, 52 tokens, 3 heads of 32, bfloat16")
    assert dense == "dense: one 4 ms, other 2 ms"
    assert header.split() == ["sparsity", "density", "time,", "ms", "over", "other", "ARM", "/", "dense"]
    assert row.split()[0] == "0.5"
    assert row.split()[2:] == ["1", "2.00x", "50.0%"]


def test_without_any_dense_kernel_there_is_nothing_to_compare_with(capsys, monkeypatch):
    def refuses(*tensors):
        raise RuntimeError("no available kernel")

    monkeypatch.setattr(bench, "dense_kernels", lambda q: {"one": refuses})
    with pytest.raises(SystemExit):
        main(TINY)
    said = capsys.readouterr().err
    assert "one does not run: no available kernel" in said
    assert "no dense kernel takes [1, 3, 52, 32]" in said
