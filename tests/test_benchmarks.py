# SPDX-License-Identifier: Apache-2.0
"""What benchmarks say where they cannot run, or take long."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.quality import rounding, video_quality


def test_one_that_needs_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["rounding", "demo"])
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        rounding.main()


def test_one_that_takes_long_on_a_cpu_says_so(monkeypatch, capsys):
    def stopped(*_):
        raise InterruptedError

    monkeypatch.setattr(video_quality, "SUBJECTS", {"demo": stopped})
    monkeypatch.setattr(sys, "argv", ["video_quality", "demo", "--device", "cpu"])
    with pytest.raises(InterruptedError):
        video_quality.main()
    assert "on the CPU, where each rule takes long" in capsys.readouterr().err
