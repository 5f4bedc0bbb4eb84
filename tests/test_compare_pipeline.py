# SPDX-License-Identifier: Apache-2.0
"""The comparison of a pipeline's dense and sparse videos, on a tiny random pipeline in a folder."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import compare_pipeline
import similarity
from diffusers import WanPipeline
from tiny_pipeline import CALL, tiny_pipeline

SIZE = ["--steps=2", "--height=96", "--width=128", "--frames=9", "--call=max_sequence_length=16", "--device=cpu"]
SPARSE = ["--option=min_tokens=0", "--error=1", "--sparsity=(0.5, 0.3)"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline."""
    path = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def compare(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """The script's `main` on the pipeline, without Inductor."""
    compile_by = torch.compile

    def without_inductor(model: Any, *, backend: str, **how: Any) -> Any:
        return compile_by(model, **({"backend": "eager"} if backend == "inductor" else {"backend": backend, **how}))

    monkeypatch.setattr(torch, "compile", without_inductor)
    torch._dynamo.reset()

    def main(*arguments: str, prompts: tuple[str, ...] = ("a cat",)) -> list[dict[str, Any]]:
        return compare_pipeline.main(
            [str(folder), "--prompts", *prompts, "--out", str(tmp_path / "out"), *SIZE, *arguments]
        )

    return main


def test_both_videos_and_the_figures_of_every_prompt_are_written(
    compare: Callable[..., Any], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = compare(*SPARSE, prompts=("a cat", "cat | cat"))
    out, printed = tmp_path / "out", capsys.readouterr().out
    for number in ("01", "02"):
        names = {path.stem: path.stat().st_size for path in (out / number).iterdir()}
        assert set(names) == {"dense", "sparse", "dense_and_sparse", "report"}
        assert min(names.values()) > 100
        report = json.loads((out / number / "report.json").read_text())["attentions"]
        sparse = [entry for entry in report if entry["status"] == "sparse"]
        assert {entry["name"] for entry in sparse} == {"blocks.0.attn1", "blocks.1.attn1"}
        assert all(entry["grid"] == [3, 12, 16] for entry in sparse)
        assert sum(entry["calls"] for entry in sparse) == 8  # guidance: two in each of two steps
    table = (out / "table.md").read_text()
    assert table in printed
    assert "PSNR" in table
    assert "grid 3x12x16, " in printed
    assert "\nblocks.1.attn1 " in printed
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["a cat", "cat / cat", "mean"]
    for row in rows:
        assert row["density"] < 0.9
        assert 10 < row["psnr_db"] < 70
        assert 0 < row["ssim"] < 1
    result = json.loads((out / "result.json").read_text())
    assert [row["psnr_db"] for row in result["prompts"]] == [row["psnr_db"] for row in rows]
    assert result["mean"]["psnr_db"] == pytest.approx(sum(row["psnr_db"] for row in rows) / 2)
    assert rows[1]["step_speedup"] > 0  # of the first prompt, all steps were first ones
    assert result["prompts"][0]["step_speedup"] is None
    assert all(len(seconds) == 2 for seconds in result["first_steps_s"].values())


def test_the_dense_video_is_what_the_pipeline_makes_and_dropping_nothing_keeps_it(
    compare: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.Tensor] = []
    generate = compare_pipeline.generate

    def kept(*inputs: Any) -> torch.Tensor:
        made.append(generate(*inputs))
        return made[-1]

    monkeypatch.setattr(compare_pipeline, "generate", kept)
    (row,) = compare("--option", "min_tokens=0", "--error", "0", "--seed", "3")
    assert row["psnr_db"] > 80
    assert row["density"] == 1
    pipe = WanPipeline.from_pretrained(folder)
    video = pipe("a cat", generator=torch.Generator().manual_seed(3), output_type="pt", **CALL).frames[0]
    assert similarity.psnr(video.transpose(0, 1) * 2 - 1, made[1]) > 80


def test_blocks_are_compiled_by_themselves_and_lpips_told_where_it_is_installed(
    compare: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        assert one.shape == other.shape == (1, 3, 96, 128)
        return (one - other).abs().mean() + 2

    lpips = types.ModuleType("lpips")
    lpips.__spec__ = compare_pipeline.importlib.util.spec_from_loader("lpips", None)
    lpips.LPIPS = lambda net, verbose: distance
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    (row,) = compare(*SPARSE, "--blocks", "--guidance", "1")
    assert row["density"] < 0.9
    assert 2 < row["lpips"] < 3
    assert "LPIPS" in (tmp_path / "out" / "table.md").read_text()


def test_a_pipeline_that_stays_dense_is_an_error_that_says_why(compare: Callable[..., Any]) -> None:
    with pytest.raises(SystemExit, match=r"NO ATTENTION BECAME SPARSE(.|\n)*576 tokens(.|\n)*min_tokens"):
        compare()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--option sparsty=0.5", "unknown option 'sparsty' (did you mean 'sparsity'?)"),
        ("--error 5", "error must be a number in [0, 1]; got 5"),
        ("--error much", "error must be a number in [0, 1]; got 'much'"),
        ("--error 0.1 --option error=0.2", "--option: error is given more than once"),
        ("--option 0.1", "must be name=value; got '0.1'"),
        ("--call num_frame=9", "WanPipeline is not to be given 'num_frame' here; it takes negative_prompt, height"),
        ("--call prompt=cat", "WanPipeline is not to be given 'prompt' here"),
        ("--call height=96", "--height and --call height=... are the same; give one of them"),
        ("--components unet", "'unet' is no module of WanPipeline; it has ['vae', 'text_encoder', 'transformer', "),
        ("--components vae --blocks", "`_repeated_blocks`"),
        ("--offload", "--offload moves models off a GPU"),
        ("--fps 0", "--fps must be at least 1; got 0"),
    ],
)
def test_wrong_arguments_are_named(
    compare: Callable[..., Any], capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare(*arguments.split())
    assert message in capsys.readouterr().err


def test_calls_stand_for_steps_where_no_pipeline_tells_of_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    model = torch.nn.Linear(2, 2)
    denoisers = compare_pipeline.Denoisers([model], {}, torch.device("cpu"), every_call=True)
    for _ in range(2):
        with denoisers.running("sparse"):
            for _ in range(3):
                model(torch.ones(2))
            denoisers.end_step(None, 0, None, {})  # of another model: none of ours was called
    assert [len(denoisers.first["sparse"]), len(denoisers.steps["sparse"])] == [1, 3]
    assert min(denoisers.steps["sparse"]) > 0
    assert denoisers.steps["dense"] == []


def test_what_offloading_puts_on_a_denoiser_stays_outside_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    compile_by, graphs = torch.compile, []

    def counted(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_by(model, backend=counted, fullgraph=True))
    model, given = torch.nn.Linear(2, 2), torch.ones(2)
    wanted = model(given)
    denoisers = compare_pipeline.Denoisers([model], {}, torch.device("cpu"))
    for _ in range(2):  # as pipelines do, from call to call
        cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
        for kind in ("sparse", "dense"):
            with denoisers.running(kind):
                assert torch.equal(model(given), wanted)
                denoisers.end_step(None, 0, None, {})
        remove_hook_from_module(model)
    assert [len(denoisers.first[kind]) for kind in ("sparse", "dense")] == [1, 1]
    assert [len(denoisers.steps[kind]) for kind in ("sparse", "dense")] == [1, 1]
    assert graphs
