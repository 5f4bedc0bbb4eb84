# SPDX-License-Identifier: Apache-2.0
"""What people do to a model before they compile it does not hide its attention: LoRA, quantised linears, channels-last.

Shrunk, unmodified diffusers classes. LoRA by peft and quantisation by torchao where these are installed; by the few
lines that they come down to in any case.
"""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from models import ModelCase, randn
from torch import Tensor, nn
from whole_models import check_found, run, sample

import rainfusion_compile

GRID = (3, 5, 7)
CASES: dict[str, Callable[[], ModelCase]] = {
    "wan": lambda: models.wan(GRID, 2),
    "cogvideox": lambda: models.cogvideox(GRID, 2, rotary=True),
}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class LoraLinear(nn.Module):
    """A linear layer and a low-rank one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class Int8Linear(nn.Module):
    """Weights as int8 with a scale for each output."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        weight = base.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def with_lora(case: ModelCase) -> None:
    replace_linears(case.model, LoraLinear, PROJECTIONS)


def with_int8(case: ModelCase) -> None:
    replace_linears(case.model, Int8Linear, ("",))


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module], names: tuple[str, ...]) -> None:
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(names)]
    assert found
    for name in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, make(model.get_submodule(name)))  # type: ignore[arg-type]


def with_peft(case: ModelCase) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=list(PROJECTIONS))
    case.model.add_adapter(config)  # type: ignore[operator]
    assert any("lora" in name for name, _ in case.model.named_modules())


def with_torchao(case: ModelCase) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(case.model, quantization.Int8WeightOnlyConfig())
    assert any(type(parameter.data) is not Tensor for parameter in case.model.parameters())


def with_channels_last(case: ModelCase) -> None:
    """Weights of convolutions and latents: of a video `[B, C, T, H, W]`, or of frames `[B, T, C, H, W]`."""
    latents = case.inputs["hidden_states"]
    if any(isinstance(module, nn.Conv3d) for module in case.model.modules()):
        case.model.to(memory_format=torch.channels_last_3d)
        last = latents.to(memory_format=torch.channels_last_3d)
    else:
        case.model.to(memory_format=torch.channels_last)
        last = latents.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, latents.shape[:2])
    assert torch.equal(last, latents)
    assert not last.is_contiguous()
    case.inputs["hidden_states"] = last


CHANGES: dict[str, Callable[[ModelCase], None]] = {
    "lora": with_lora,
    "int8": with_int8,
    "peft": with_peft,
    "torchao": with_torchao,
    "channels_last": with_channels_last,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("change", CHANGES)
def test_attention_is_found_and_sparsity_zero_is_dense(name: str, change: str):
    torch.manual_seed(0)
    case = CASES[name]()
    with torch.no_grad():
        before = sample(case.model(**case.inputs))
        CHANGES[change](case)
        case.model.eval()
        dense = sample(case.model(**case.inputs))
    if change != "channels_last":
        assert not torch.equal(before, dense)  # the change did something
    out, attentions = run(case, sparsity=0.0)
    check_found(case, attentions)
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)


def test_a_switched_adapter_is_not_compiled_in():
    """Weights are inputs of the graph: what is trained or loaded into an adapter later counts."""
    case = CASES["wan"]()
    with_lora(case)
    compiled = torch.compile(case.model.eval(), backend="rainfusion", options={"sparsity": 0.0, "min_tokens": 0})
    for seed in range(2):
        for module in case.model.modules():
            if isinstance(module, LoraLinear):
                module.up.weight.data.copy_(randn(*module.up.weight.shape, seed=seed))
        with torch.no_grad():
            out, dense = sample(compiled(**case.inputs)), sample(case.model(**case.inputs))
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", [False, True])
def test_weights_that_are_cast_layer_by_layer(blocks: bool) -> None:
    """Hooks of diffusers' layerwise casting break the graph around every linear layer."""
    torch._dynamo.reset()
    case = CASES["wan"]()
    case.model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)  # type: ignore[operator]
    model, options = case.model.eval().requires_grad_(False), {"sparsity": 0.0, "min_tokens": 0}
    with torch.no_grad():
        dense = sample(model(**case.inputs))
    if blocks:
        model.compile_repeated_blocks(backend="rainfusion", options=options)  # type: ignore[operator]
    compiled = model if blocks else torch.compile(model, backend="rainfusion", options=options)
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = sample(compiled(**case.inputs))
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)
    video = [entry for entry in report.to_dict()["attentions"] if entry["category"] == "video self-attention"]
    assert [(entry["status"], entry["grid"]) for entry in video] == [("sparse", list(GRID))] * len(video)
    assert sum(entry["calls"] for entry in video) == len(model.blocks)
