# SPDX-License-Identifier: Apache-2.0
"""Runs the transformer of Open-Sora-Plan v1.2, its authors' own code, under this backend.

It breaks the graph in every block (it looks into its masks) and repeats its masks for every head. This shows, for a
shrunk configuration with random weights and a ragged grid, that all its attention over the video becomes sparse across
the breaks, in as many graphs as Dynamo makes anyway, and that ``sparsity=0`` gives the output of the dense model.

Their code is no part of this repository. Check it out beside it, and give it an environment of its own, for it pins
old versions::

    git clone --branch v1.2.0 https://github.com/PKU-YuanGroup/Open-Sora-Plan
    python3 -m venv open-sora && open-sora/bin/pip install -e . \\
        torch==2.13.0 numpy pillow einops==0.7.0 diffusers==0.28.0 transformers==4.40.1 huggingface_hub==0.23.4
    open-sora/bin/python -m benchmarks.models.open_sora_plan Open-Sora-Plan

Exits 1 if something is not as said above.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rainfusion_compile

HEADS, HEAD_DIM, CHANNELS, TEXT, TEXT_CHANNELS = 3, 24, 4, 11, 32
TOLERANCE = 1e-4
"""How far outputs may be apart, relative to the dense one's largest value."""

Grid = tuple[int, int, int]


def transformer_class(checkout: Path) -> Callable[..., nn.Module]:
    """The class, without what its packages import beside it (the VAE, text encoders, training)."""
    if not (checkout / "opensora" / "models" / "diffusion" / "opensora").is_dir():
        raise SystemExit(f"{checkout} is no checkout of Open-Sora-Plan v1.2")
    sys.path.insert(0, str(checkout))
    for name in ("opensora.models", "opensora.models.diffusion"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    writer = types.ModuleType("torch.utils.tensorboard")  # imported by their helpers, not used here
    writer.SummaryWriter = None  # type: ignore[attr-defined]
    sys.modules.setdefault(writer.__name__, writer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("opensora.models.diffusion.opensora.modeling_opensora")
    return module.OpenSoraT2V


def build(make: Callable[..., nn.Module], grid: Grid, layers: int, *, rotary: bool) -> nn.Module:
    """Their ROPE-L/122 configuration, narrower and with fewer layers."""
    frames, rows, columns = grid
    torch.manual_seed(0)
    return make(
        num_layers=layers,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        cross_attention_dim=HEADS * HEAD_DIM,
        caption_channels=TEXT_CHANNELS,
        sample_size=(2 * rows, 2 * columns),
        sample_size_t=frames,
        patch_size=2,
        patch_size_t=1,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        interpolation_scale_t=1.0,
        interpolation_scale_h=1.0,
        interpolation_scale_w=1.0,
        attention_mode="math",  # the other modes forbid what CPUs use
        use_rope=rotary,
    ).eval()


def inputs(grid: Grid, batch: int, *, hidden: bool) -> dict[str, Any]:
    """One forward's; the right half of the last sample is padding if ``hidden``, as in batches of several sizes."""
    frames, height, width = grid[0], 2 * grid[1], 2 * grid[2]
    generator = torch.Generator().manual_seed(0)
    seen = torch.ones(batch, frames, height, width)
    if hidden:
        seen[-1, :, :, width // 2 :] = 0
    return {
        "hidden_states": torch.randn(batch, CHANNELS, frames, height, width, generator=generator),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 1, TEXT, TEXT_CHANNELS, generator=generator),
        "attention_mask": seen,
        "encoder_attention_mask": torch.ones(batch, 1, TEXT),
        "return_dict": False,
    }


@dataclass
class Run:
    """One compiled forward: its output, how many graphs Dynamo made, and what attentions did."""

    out: Tensor
    graphs: int
    attentions: list[dict[str, Any]]


def run(model: nn.Module, given: dict[str, Any], **compile_options: Any) -> Run:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch.no_grad(), rainfusion_compile.observe() as report:
        (out,) = torch.compile(model, **compile_options)(**given)
    return Run(out, counters["stats"]["unique_graphs"], report.to_dict()["attentions"])


def problems(model: nn.Module, grid: Grid, batch: int, *, hidden: bool, sparsity: float) -> list[str]:
    """Run it, print what happened, and return what is not as it should be."""
    given = inputs(grid, batch, hidden=hidden)
    layers = len(model.transformer_blocks)  # type: ignore[arg-type]
    with torch.no_grad():
        (dense,) = model(**given)
    plain = run(model, given, backend="inductor")
    found = []
    for wanted in (0.0, sparsity):
        options = {"min_tokens": 0, "sparsity": wanted, "arm": "recall", "recall_target": 0.3, "min_recall": 0.0}
        ours = run(model, given, backend="rainfusion", options=options)
        sparse = [entry for entry in ours.attentions if entry["status"] == "sparse" and entry["grid"] == list(grid)]
        calls = sum(entry["calls"] for entry in sparse)
        density = sum(entry["mean_density"] * entry["calls"] for entry in sparse) / max(calls, 1)
        error = float((ours.out - dense).abs().max() / dense.abs().max())
        print(
            f"  sparsity {wanted}: {calls} of {layers} attentions over the video sparse, density {density:.3f},"
            f" {ours.graphs} graphs (Inductor alone: {plain.graphs}), relative distance from dense {error:.1e}"
        )
        if calls != layers:
            found.append(f"{calls} of {layers} attentions sparse")
        if ours.graphs != plain.graphs:
            found.append(f"{ours.graphs} graphs instead of {plain.graphs}")
        if wanted == 0 and error > TOLERANCE:
            found.append(f"sparsity=0 is {error:.1e} from dense")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of Open-Sora-Plan, tag v1.2.0")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--grid", type=int, nargs=3, default=(5, 13, 19), metavar=("T", "H", "W"), help="in tokens")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.7)
    options = parser.parse_args()
    torch._dynamo.config.automatic_dynamic_local_pgo = False  # what earlier processes saw is not to count here
    make = transformer_class(options.checkout)
    frames, rows, columns = options.grid
    failed = False
    for rotary in (True, False):
        model = build(make, (frames, rows, columns), options.layers, rotary=rotary)
        for hidden in (False, True):
            print(f"{'rotary' if rotary else 'absolute'} positions, {'with' if hidden else 'without'} padding:")
            grid = frames, rows, columns
            for problem in problems(model, grid, options.batch, hidden=hidden, sparsity=options.sparsity):
                print(f"  NOT AS IT SHOULD BE: {problem}")
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
