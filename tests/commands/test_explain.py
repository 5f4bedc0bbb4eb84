# SPDX-License-Identifier: Apache-2.0
"""``explain``: what would be sparse, from classes and functions, without contents."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_attention import Video
from torch import Tensor, nn

from rainfusion_compile.commands import main
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.layout import VideoLayout

SMALL = ["--option", "min_tokens=0"]
GRID = (3, 8, 10)


class Block(nn.Module):
    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_qkv = nn.Linear(heads * head_dim, 3 * heads * head_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Conventional(nn.Module):
    """A transformer whose forward takes what those of videos take."""

    def __init__(
        self, num_layers: int = 2, in_channels: int = 4, text_dim: int = 6, patch_size: int = 2, heads: int = 2
    ) -> None:
        super().__init__()
        width = heads * 16
        self.patch = nn.Conv3d(in_channels, width, (1, patch_size, patch_size), (1, patch_size, patch_size))
        self.text = nn.Linear(text_dim, width)
        self.blocks = nn.ModuleList(Block(heads, 16) for _ in range(num_layers))
        # 16 GB that are never there
        self.large = nn.Parameter(torch.empty(2**32), requires_grad=False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.patch(hidden_states).flatten(2).transpose(1, 2) + timestep[:, None, None]
        x = torch.cat([self.text(encoder_hidden_states), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


class FramesFirst(Conventional):
    """The same of latents ``[B, T, C, H, W]``."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.transpose(1, 2), timestep, encoder_hidden_states)


class Needs(Conventional):
    def forward(self, hidden_states: Tensor, secret_table: Tensor) -> Tensor:  # type: ignore[override]
        return hidden_states + secret_table


class Flat(nn.Module):
    """Tokens that nothing shows to be a video's."""

    def __init__(self, in_channels: int = 32) -> None:
        super().__init__()
        self.block = Block(2, 16)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.block(hidden_states)


class Helped(Conventional):
    """Its last attention is in a function that is not compiled."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = super().forward(hidden_states, timestep, encoder_hidden_states)
        return torch._dynamo.disable(self.blocks[0])(x)


class Pooled(nn.Module):
    """It attends over nothing."""

    def __init__(self, in_channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, 8, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(hidden_states)


class Misshapen(Pooled):
    """Dynamo, and fake tensors, tell at length what is wrong with it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(hidden_states.permute(0, 2, 1, 3, 4)).permute(7, 1, 2, 3, 4)


class Undefined(nn.Module):
    def __init__(self, depth: int | None = None) -> None:
        super().__init__()
        self.layers = range(depth)  # type: ignore[arg-type]


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nonzero()


def contents() -> tuple[nn.Module, dict[str, Any]]:
    return Counts(), {"x": torch.ones(3)}


def video() -> tuple[nn.Module, dict[str, Any]]:
    return Video(), {"latents": torch.randn(1, 4, 4, 16, 20)}


def video_of_arguments() -> tuple[nn.Module, tuple[Tensor], dict[str, Any]]:
    return Video(), (torch.randn(1, 4, 4, 16, 20),), {}


def nothing() -> int:
    return 3


@pytest.fixture(autouse=True)
def _module(monkeypatch, fresh_dynamo):
    """All of this as a module that can be imported by name."""
    module = types.ModuleType("made_up_models")
    classes = (Conventional, FramesFirst, Needs, Flat, Helped, Pooled, Misshapen, Undefined)
    for made in (*classes, video, video_of_arguments, nothing, contents):
        setattr(module, made.__name__, made)
    module.number = 3
    monkeypatch.setitem(sys.modules, "made_up_models", module)


def explain(capsys, name: str, *more: str, status: int = 0) -> str:
    assert main(["explain", f"made_up_models:{name}", *more]) == status
    return capsys.readouterr().out


def error(capsys, name: str, *more: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", name, *more])
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_class_gets_inputs_by_the_names_of_its_arguments(capsys):
    printed = explain(capsys, "Conventional", "--grid", "3x8x10", "--text", "5", *SMALL).splitlines()
    assert printed[0] == "2 of 2 video self-attentions would be sparse"
    name, count, grid, text, heads, low, _, high = printed[2].split()
    assert (name, count, grid, text, heads) == ("blocks.*", "2", "3x8x10", "5+0", "2x16")
    densities = Options().tables(VideoLayout(GRID, (5, 0))).densities
    assert (low, high) == (f"{min(densities):.3f}", f"{max(densities):.3f}")


def test_latents_may_lie_frames_first(capsys):
    assert "3x8x10" in explain(capsys, "FramesFirst", "--grid", "3x8x10", *SMALL)


def test_layers_and_configuration_are_taken(capsys):
    more = ["--layers", "3", "--config", "heads=4", "--config", "patch_size=1"]
    printed = explain(capsys, "Conventional", "--grid", "3x8x10", *more, *SMALL)
    assert "3 of 3 video self-attentions" in printed
    assert "4x16" in printed


@pytest.mark.parametrize("name", ["video", "video_of_arguments"])
def test_a_function_makes_model_and_inputs(capsys, name):
    printed = explain(capsys, name, *SMALL)
    assert printed.startswith("1 of 1 video self-attentions would be sparse\n")
    assert "4x8x10" in printed


def test_densities_are_those_of_the_tables_for_the_sparsities_asked_for(capsys):
    printed = explain(capsys, "video", "--sparsity", "(0.7, 0.3)", "--option", "patterns=('spatial',)", *SMALL)
    tables = Options(sparsity=(0.7, 0.3), patterns=("spatial",)).tables(VideoLayout((4, 8, 10)))
    rows = [line.split() for line in printed.split("wanted sparsity:\n")[1].splitlines()[1 : 1 + len(tables.densities)]]
    assert rows == [[f"{s:g}", f"{d:.3f}"] for s, d in zip(tables.sparsities, tables.densities, strict=True)]


def test_attention_outside_all_graphs_is_told_of(capsys):
    small = ["--grid", "3x8x10", "--text", "5", "--layers", "1", *SMALL]
    printed = explain(capsys, "Helped", *small)
    assert printed.startswith("1 of 2 video self-attentions would be sparse\n")
    assert "1 left dense: 245 tokens, outside all graphs (commands/test_explain.py:" in printed
    assert "sparse_eager_attention(grid=(T, H, W))" in printed
    assert main(["explain", "made_up_models:Helped", *small, "--strict"]) == 1
    assert "--strict, but 245 tokens, outside all graphs" in capsys.readouterr().err


def test_json_has_every_attention(capsys):
    found = json.loads(explain(capsys, "Conventional", "--grid", "3x8x10", "--json", *SMALL))
    assert (found["graphs"], found["video"], found["sparse"]) == (1, 2, 2)
    assert [entry["name"] for entry in found["attentions"]] == ["blocks.0", "blocks.1"]
    assert found["attentions"][0]["grid"] == [*GRID]
    assert found["attentions"][0]["text"] == [256, 0]


def test_strict_fails_where_attention_stays_dense_and_says_why(capsys):
    small = ["--grid", "3x8x10"]
    assert "fewer than min_tokens" in explain(capsys, "Conventional", *small)
    assert "0 of 1" in explain(capsys, "Conventional", *small, "--strict", "--layers", "1", status=1)
    explain(capsys, "Conventional", *small, "--strict", *SMALL)
    main(["explain", "made_up_models:Flat", "--grid", "3x8x10", "--option", "strict=True", *SMALL])
    said = capsys.readouterr()
    assert "left dense: " in said.out
    assert "may get it from the contents of inputs" in said.out
    assert "strict=True, but block stays dense" in said.err


def test_strict_fails_where_nothing_would_be_sparse_and_says_why(capsys):
    """Even where the option would not, as below min_tokens."""
    small = ["explain", "made_up_models:Conventional", "--grid", "3x8x10", "--strict"]
    assert main(small) == 1
    few = "--strict, but no attention would be sparse: blocks.0: 496 tokens, fewer than min_tokens=8192; set the option"
    assert few in capsys.readouterr().err
    assert main(["explain", "made_up_models:Pooled", "--grid", "3x8x10", "--strict"]) == 1
    said = capsys.readouterr()
    none = "its graph holds no attention, and none runs outside that could be over a video"
    assert said.out == f"0 of 0 video self-attentions would be sparse\n{none}\n"
    assert f"--strict, but no attention would be sparse: {none}" in said.err


def test_where_no_latents_fit_the_cause_is_told_and_nothing_else(capsys, caplog):
    said = error(capsys, "made_up_models:Misshapen", "--grid", "3x8x10")
    assert "usage" not in said
    assert "Switch off what needs more than these by --config NAME=VALUE, or write a function" in said
    assert (
        "hidden_states [B, C, T, H, W]: RuntimeError: Given groups=1, weight of size [8, 4, 1, 1, 1], expected" in said
    )
    assert "when making fake tensor call" not in said
    assert not [one for one in caplog.records if one.name == "torch._subclasses.fake_tensor"]


def test_the_line_under_a_table_says_what_is_missing(capsys):
    printed = explain(capsys, "Conventional", "--grid", "3x8x10", *SMALL)
    assert "(-, or no row: nothing new comes of it; two numbers: two shares of samples)" in printed


def test_the_example_of_a_function_is_one(capsys, monkeypatch):
    """That of the documentation, of a class that takes more than the usual arguments."""
    pytest.importorskip("diffusers")
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    (code,) = (block for block in page.split("```python\n") if "def ltx2():" in block)
    module = types.ModuleType("my_models")
    exec(code.split("```")[0], vars(module))
    monkeypatch.setitem(sys.modules, "my_models", module)
    assert main(["explain", "my_models:ltx2", "--strict"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1 of 1 video self-attentions would be sparse")
    assert "16x22x38" in printed


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("made_up_models", (), "such as diffusers:WanTransformer3DModel; got 'made_up_models'"),
        ("nowhere_at_all:it", (), "'nowhere_at_all:it' cannot be imported"),
        ("nowhere_at_all.here:it", (), "No module named 'nowhere_at_all'; pip install nowhere_at_all, or"),
        ("made_up_models:Undefined", ("--grid", "1x2x3"), "cannot be made with its defaults: TypeError"),
        ("made_up_models:Undefined", ("--grid", "1x2x3"), "tell what it needs by --config NAME=VALUE, or write"),
        ("made_up_models:contents", (), "run the model under rainfusion_compile.explain in Python"),
        ("made_up_models:absent", (), "'made_up_models:absent' cannot be imported"),
        ("made_up_models:number", (), "must be a class or a function; it is a int"),
        ("builtins:dict", ("--grid", "1x2x3"), "must be a torch.nn.Module"),
        ("made_up_models:Conventional", (), "a class needs --grid TxHxW"),
        ("made_up_models:Flat", ("--grid", "1x2x3", "--layers", "2"), "--layers: made_up_models:Flat takes none of"),
        ("made_up_models:Needs", ("--grid", "1x2x3"), "the argument 'secret_table' of forward cannot be made"),
        ("made_up_models:Conventional", ("--grid", "1x2x3", "--config", "depth=2"), "cannot be made with {'depth': 2}"),
        ("made_up_models:Conventional", ("--grid", "1x2x3", "--config", "heads=0"), "takes none of the inputs"),
        ("made_up_models:video", ("--grid", "1x2x3"), "--grid is for classes; made_up_models:video is a function"),
        ("made_up_models:nothing", (), "must return (model, kwargs) or (model, args, kwargs); got 3"),
    ],
)
def test_what_cannot_be_explained_is_told_by_name(capsys, name, more, said):
    assert said in error(capsys, name, *more)


def test_a_model_of_diffusers_at_the_size_of_a_real_video(capsys):
    pytest.importorskip("diffusers")
    wan = ["explain", "diffusers:WanTransformer3DModel", "--grid", "21x45x80", "--layers", "1", "--sparsity", "0.8"]
    assert main([*wan, "--strict"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1 of 1 video self-attentions would be sparse, 1 cross-attention left alone\n")
    assert "blocks.*.attn1  1         21x45x80  0+0   40x128" in printed
