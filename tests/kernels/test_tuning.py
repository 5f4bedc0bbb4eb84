# SPDX-License-Identifier: Apache-2.0
"""Tuned launch configurations: what is kept, found again and ignored. The GPU and the clock are made up."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

import triton

from rainfusion_compile.kernels.gpu import tuning
from rainfusion_compile.kernels.gpu.configs import LaunchConfig, attention_config

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("RAINFUSION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "device_limits", lambda index: ((8, 0), 108))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    tuning.tuned_config.cache_clear()
    yield
    tuning.tuned_config.cache_clear()


def test_the_fastest_candidate_is_kept_for_its_gpu_head_dim_and_dtype():
    wanted = tuning.candidates(128, torch.bfloat16, (8, 0))[3]
    assert tuning.tuned_config(128, torch.bfloat16, 0) is None
    times = tuning.tune(128, torch.bfloat16, GPU, lambda config: 1.0 if config == wanted else 2.0)
    assert len(times) == len(set(tuning.candidates(128, torch.bfloat16, (8, 0))))
    assert tuning.tuned_config(128, torch.bfloat16, 0) == wanted
    for other in ((64, torch.bfloat16, 0), (128, torch.float16, 0), (128, torch.bfloat16, 1)):
        assert tuning.tuned_config(*other) is None
    tuning.tune(64, torch.bfloat16, GPU, lambda config: float(config.tile_k))
    assert tuning.tuned_config(128, torch.bfloat16, 0) == wanted, "tuning one head_dim forgot another"
    assert os.listdir(tuning.cache_file().parent) == [tuning.cache_file().name]


def test_a_configuration_without_room_is_partial_queries():
    def time_ms(config: LaunchConfig) -> float:
        if config.tile_k > 64:
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return float(config.tile_k)

    times = tuning.tune(128, torch.bfloat16, GPU, time_ms)
    assert times
    assert all(config.tile_k <= 64 for config in times)
    with pytest.raises(RuntimeError, match="broken"):  # any other error is no reason to go on
        tuning.tune(128, torch.bfloat16, GPU, lambda config: (_ for _ in ()).throw(RuntimeError("broken")))


def test_what_was_tuned_for_other_kernels_is_ignored(monkeypatch: pytest.MonkeyPatch):
    tuning.tune(128, torch.bfloat16, GPU, lambda config: float(config.tile_k))
    assert tuning.tuned_config(128, torch.bfloat16, 0) is not None
    monkeypatch.setattr(tuning, "_kernels", lambda: "others")
    tuning.tuned_config.cache_clear()
    assert tuning.tuned_config(128, torch.bfloat16, 0) is None


@pytest.mark.parametrize("text", ["{", '{"GPU": {"128 bfloat16": {"tile": 1}}}', "[]"])
def test_a_file_that_cannot_be_read_warns_and_is_ignored(text: str):
    tuning.cache_file().write_text(text.replace("GPU", tuning._machine(0)))
    with pytest.warns(UserWarning, match="launch_configs.json cannot be read"):
        assert tuning.tuned_config(128, torch.bfloat16, 0) is None


def test_candidates_start_with_the_default_and_are_few():
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        for head_dim in (64, 96, 128, 256):
            found = tuning.candidates(head_dim, torch.bfloat16, capability)
            assert found[0] == attention_config(head_dim, torch.bfloat16, capability)
            assert len(found) == len(set(found)) <= 11
            found = tuning.candidates(head_dim, torch.float32, capability)
            assert found[0] == attention_config(head_dim, torch.float32, capability)
            assert len(found) == len(set(found)) <= 10
            assert {config.precision for config in found} == ({"ieee", "tf32x3"} if head_dim <= 128 else {"ieee"})
    hopper = tuning.candidates(128, torch.bfloat16, (9, 0))
    assert {config.num_stages for config in hopper if config.warp_specialized} == {2, 3}
    assert {config.bounds_scores for config in hopper if config.warp_specialized} == {False, True}
