# SPDX-License-Identifier: Apache-2.0
"""The node for ComfyUI, beside a stand-in of what it calls there: the same arguments, and `torch.compile` of them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import comfyui_node
import pytest
import torch
from small_video import Video
from torch import nn

import rainfusion_compile


class Patcher:
    """What the node sees of ComfyUI's `ModelPatcher`: a copy shares the model, and keeps its own compiled one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.compiled = model, None

    def clone(self) -> Patcher:
        return Patcher(self.model)


@pytest.fixture(autouse=True)
def torch_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_torch_compile_wrapper(model: Any, backend: str, options: Any = None, mode: Any = None) -> None:
        model.compiled = torch.compile(model=model.model, backend=backend, options=options, mode=mode)

    helpers = ModuleType("comfy_api.torch_helpers")
    helpers.set_torch_compile_wrapper = set_torch_compile_wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.torch_helpers", helpers)


def test_the_node_compiles_a_copy_by_what_its_inputs_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINFUSION_OPTIONS", '{"min_tokens": 0, "inductor_mode": "default"}')
    (node,) = comfyui_node.NODE_CLASS_MAPPINGS.values()
    inputs = node.INPUT_TYPES()["required"]
    chosen = {"preset": inputs["preset"][0][0], "dense_steps": inputs["dense_steps"][1]["default"]}
    assert {*inputs} == {"model", *chosen}
    given = Patcher(Video().eval())
    (made,) = getattr(node(), node.FUNCTION)(given, **chosen)
    assert given.compiled is None
    assert made.model is given.model
    with torch.no_grad(), rainfusion_compile.observe() as report:
        video = torch.randn(1, 3, 5, 20, 24)
        torch.testing.assert_close(made.compiled(video), given.model(video), rtol=0.2, atol=0.2)
    told = [entry for entry in report.to_dict()["attentions"] if entry["grid"]]
    assert [(entry["status"], entry["grid"]) for entry in told] == [("sparse", [5, 10, 12])] * 2


@pytest.mark.parametrize("preset", comfyui_node.RainFusionCompile.INPUT_TYPES()["required"]["preset"][0])
def test_every_preset_it_offers_is_one(preset: str) -> None:
    assert rainfusion_compile.Options(preset=preset).preset == preset
