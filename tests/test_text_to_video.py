# SPDX-License-Identifier: Apache-2.0
"""The example that makes videos, on the tiny pipeline: every way to run it that it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import text_to_video
from tiny_pipeline import tiny_pipeline

import rainfusion_compile

SPARSE = ["--option", "min_tokens=0", "--error", "1", "--sparsity", "0.5", "--strict", "--device", "cpu"]
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was reported of each video."""
    found: list[dict[str, Any]] = []
    save = rainfusion_compile.Report.save

    def kept(report: rainfusion_compile.Report, path: Path) -> None:
        found.append(report.to_dict())
        save(report, path)

    monkeypatch.setattr(rainfusion_compile.Report, "save", kept)
    return found


def make(out: Path, *more: str) -> list[Path]:
    paths = text_to_video.main(["tiny", "a cat", *SPARSE, "--out", str(out), *more])
    assert all(path.stat().st_size > 100 and path.with_suffix(".html").exists() for path in paths)
    return paths


def sparse(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in report["attentions"] if entry["status"] == "sparse"]


@pytest.mark.parametrize("how", [["--fullgraph"], ["--blocks"]])
def test_a_video_is_made_sparse_whole_or_block_by_block(reports, tmp_path, how):
    assert [path.stem for path in make(tmp_path, *how)] == ["video"]
    assert all(entry["grid"] == [3, 12, 16] for entry in sparse(reports[0]))
    assert reports[0]["density"] < 0.9


def test_two_sizes_are_two_videos_of_their_own_grids(reports, tmp_path):
    assert [path.stem for path in make(tmp_path, "--size", "128x96", "--size", "96x128")] == ["128x96", "96x128"]
    assert [sparse(report)[0]["grid"] for report in reports] == [[3, 12, 16], [3, 16, 12]]


def test_first_steps_stay_dense(reports, tmp_path):
    make(tmp_path, "--dense-first", "1")
    densities = [density for entry in sparse(reports[0]) for density in entry["density_by_call"]]
    assert sorted(density < 1 for density in densities) == [False] * 4 + [True] * 4


def test_quantised_weights_are_made_sparse(reports, tmp_path):
    pytest.importorskip("torchao")
    make(tmp_path, "--torchao", "Int8WeightOnlyConfig", "--blocks")
    assert sparse(reports[0])


def test_a_cache_skips_steps(reports, tmp_path):
    steps = ["--call", "num_inference_steps=6"]
    make(tmp_path, *steps)
    arguments = ("cache_interval=2", "disable_cache_before_step=1", "cache_identifiers=['blocks.*attn1']")
    cache = ["--cache", "TaylorSeerCacheConfig", *(f"--cache-option={argument}" for argument in arguments)]
    make(tmp_path, *steps, *cache)
    all_calls, fewer = (sum(entry["calls"] for entry in sparse(report)) for report in reports)
    assert 0 < fewer < all_calls


def test_a_cache_of_the_first_block_is_in_the_examples_words(reports, tmp_path):
    make(tmp_path, "--blocks", "--cache", "FirstBlockCacheConfig", "--cache-option", "threshold=0.1")
    assert sparse(reports[0])


def test_a_lora_is_fused_into_the_weights(reports, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from diffusers import WanPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = tiny_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = get_peft_model_state_dict(pipe.transformer)
    WanPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    made = tiny_pipeline()
    before = made.transformer.blocks[0].attn1.to_q.weight.clone()
    monkeypatch.setattr(text_to_video, "tiny_pipeline", lambda: made)
    make(tmp_path, "--lora", str(tmp_path / "lora"))
    assert sparse(reports[0])
    assert not torch.equal(before, made.transformer.blocks[0].attn1.to_q.weight)


def test_a_video_that_stays_dense_fails_if_asked_to(tmp_path):
    with pytest.raises(SystemExit, match="no attention became sparse"):
        text_to_video.main(["tiny", "cat", "--strict", "--device", "cpu", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--size 832", "must be WIDTHxHEIGHT in pixels, such as 832x480; got '832'"),
        ("--cache NoCacheConfig", "--cache: diffusers has no 'NoCacheConfig'"),
        ("--option sparsty=0.5", "unknown option 'sparsty' (did you mean 'sparsity'?)"),
        ("--call a=1 --call a=2", "--call: a is given more than once"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        text_to_video.main(["tiny", "cat", *arguments.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("option", "package"), [("--torchao", "torchao"), ("--lora", "peft")])
def test_a_missing_package_is_named(capsys, monkeypatch, option, package):
    monkeypatch.setattr(text_to_video, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        text_to_video.main(["tiny", "cat", option, "something"])
    assert f"{option} needs {package}: pip install {package}" in capsys.readouterr().err
