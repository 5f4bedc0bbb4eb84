# SPDX-License-Identifier: Apache-2.0
"""Exported programs: sparse, in files and packages too, and told about where they cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import randn, wan
from small_video import Video
from torch import nn

import rainfusion_compile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
# no samples, which would depend on the bits of queries
OPTIONS: dict[str, Any] = {
    "sparsity": 0.8, "min_tokens": 0, "patterns": ("spatial",), "arm": "recall", "min_recall": 0.0
}  # fmt: skip
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
GRID = (5, 9, 11)


def video(layers: int = 2) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Video(layers=layers).eval(), randn(1, 3, 5, 18, 22)


def compiled(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return torch.compile(model, backend="rainfusion", options=OPTIONS)(*args, **kwargs)


def test_an_exported_model_computes_what_the_compiled_one_does():
    model, x = video()
    program = rainfusion_compile.export(model, (x,), options=OPTIONS)
    assert [str(node.target) for node in program.graph.nodes].count("rainfusion.block_sparse_attention.default") == 2
    out = program.module()(x)
    torch.testing.assert_close(out, compiled(model, x), **CLOSE)
    assert not torch.allclose(out, model(x), **CLOSE)


def test_a_model_of_diffusers_is_exported():
    case = wan()
    inputs = {name: value for name, value in case.inputs.items() if value is not None}
    program = rainfusion_compile.export(case.model, kwargs=inputs, options={**OPTIONS, "sparsity": 0.5})
    assert str(program.graph).count("rainfusion.block_sparse_attention") == case.video
    with torch.no_grad():
        want = case.model(**inputs)
    dense = rainfusion_compile.export(case.model, kwargs=inputs, options={**OPTIONS, "sparsity": 0.0})
    torch.testing.assert_close(dense.module()(**inputs), want, **CLOSE)


LOAD = """
import sys
import torch
import rainfusion_compile.kernels.operators
path, package = sys.argv[1:]
x, want = torch.load(path + ".tensors")
if package == "package":
    out = torch._inductor.aoti_load_package(path)(x)
else:
    out = torch.export.load(path).module()(x)
torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.inductor
@pytest.mark.parametrize("kind", ["file", "package"])
def test_another_process_loads_it(tmp_path, kind):
    model, x = video(layers=1)
    program, path = rainfusion_compile.export(model, (x,), options=OPTIONS), str(tmp_path / "model.pt2")
    if kind == "file":
        torch.export.save(program, path)
    else:
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    torch.save((x, compiled(model, x)), f"{path}.tensors")
    done = subprocess.run([sys.executable, "-c", LOAD, path, kind], cwd=Path.cwd(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_function_is_exported_with_its_tables():
    class Attends(nn.Module):
        def forward(self, q):
            return rainfusion_compile.attention(q, q * 0.5, q, grid=(4, 8, 10), error=1.0)

    q = randn(1, 2, 320, 32)
    with torch.no_grad():
        program = torch.export.export(Attends(), (q,))
        want = Attends()(q)
    assert "rainfusion.block_sparse_attention" in str(program.graph)
    assert torch.equal(program.module()(q), want)


def test_dynamic_shapes_and_hidden_timesteps_are_refused():
    model, x = video(layers=1)
    sizes = ({3: 2 * torch.export.Dim("height", min=2, max=64)},)
    with pytest.raises(ValueError, match="dynamic shapes: export it once for each resolution"):
        rainfusion_compile.export(model, (x,), options=OPTIONS, dynamic_shapes=sizes)
    with pytest.raises(ValueError, match=r"dense_steps.*does not show which input is the timestep"):
        rainfusion_compile.export(model, (x,), options={**OPTIONS, "dense_steps": 0.1})


class ByHand(nn.Module):
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2).unflatten(-1, (2, -1)).transpose(1, 2)
        return F.softmax(tokens @ tokens.transpose(-1, -2), -1) @ tokens


@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("spelling", ["sdpa", "by hand"])
def test_attention_in_operators_of_aten_is_told(spelling, decomposed):
    model, x = video(layers=1) if spelling == "sdpa" else (ByHand(), randn(1, 16, 4, 6, 8))
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        module = program.run_decompositions().module() if decomposed else program.module()
        report = rainfusion_compile.explain(module, x, options=OPTIONS)
    (attention,) = report.to_dict()["attentions"]
    if spelling == "sdpa" and not decomposed:
        assert attention["status"] == "sparse"
    else:
        assert "without run_decompositions()" in attention["reason"]
        assert attention["tokens"] == (495 if spelling == "sdpa" else 192)
