# SPDX-License-Identifier: Apache-2.0
"""Images are videos of one frame: a window and a checkerboard of it, no first-frame sink, no spatial pattern.

Shrunk, unmodified diffusers classes. SD3 shows its grid; packed latents do not, but may come with their positions. Else
they stay dense until a grid is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import ModelCase, randn
from whole_models import SPARSE, ReferenceAttention, check_found, run, sample

from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.layout import VideoLayout

ROWS, COLUMNS, TEXT = 30, 37, 7
GRID = (1, ROWS, COLUMNS)


def sd3(*, dual: bool = False) -> ModelCase:
    """2-D convolution, text after; `dual`: a second attention over the image alone."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=64,
        dual_attention_layers=(0,) if dual else (),
    )
    inputs = {
        "hidden_states": randn(2, 4, 2 * ROWS, 2 * COLUMNS),
        "encoder_hidden_states": randn(2, TEXT, 32, seed=1),
        "pooled_projections": randn(2, 16, seed=2),
        "timestep": torch.full((2,), 500),
        "return_dict": False,
    }
    return ModelCase(model, inputs, GRID, (0, TEXT), video=3 if dual else 2, dense=0)


def flux() -> ModelCase:
    """Packed latents with positions as an input, text before, dual and single blocks."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    rows, columns = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    inputs = {
        "hidden_states": randn(2, ROWS * COLUMNS, 16),
        "encoder_hidden_states": randn(2, TEXT, 32, seed=1),
        "pooled_projections": randn(2, 16, seed=2),
        "timestep": torch.full((2,), 0.5),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float(),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }
    return ModelCase(model, inputs, GRID, (TEXT, 0), video=2, dense=0)


def qwen_image() -> ModelCase:
    """Packed latents, rotary tables looked up for the image's shape, text before."""
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    inputs = {
        "hidden_states": randn(2, ROWS * COLUMNS, 16),
        "encoder_hidden_states": randn(2, TEXT, 32, seed=1),
        "encoder_hidden_states_mask": torch.ones(2, TEXT),
        "timestep": torch.full((2,), 0.5),
        "img_shapes": [[(1, ROWS, COLUMNS)]] * 2,
        "return_dict": False,
    }
    return ModelCase(model, inputs, GRID, (TEXT, 0), video=2, dense=0)


CASES: dict[str, tuple[Callable[[], ModelCase], dict[str, Any]]] = {
    "sd3": (sd3, {}),
    "flux": (flux, {"grid": GRID, "text": (TEXT, 0)}),
    "qwen_image": (qwen_image, {"grid": GRID, "text": (TEXT, 0)}),
}


@pytest.mark.parametrize("text", [(0, 0), (512, 0)])
@pytest.mark.parametrize("sparsity", [0.5, 0.64, 0.8])
@pytest.mark.parametrize("arm", ["error", "recall"])
def test_densities_of_images_come_near_to_what_is_asked(arm: str, sparsity: float, text: tuple[int, int]):
    tables = Options(sparsity=sparsity, arm=arm).tables(VideoLayout((1, 64, 96), text))  # type: ignore[arg-type]
    assert {"temporal", "textural"} <= set(tables.patterns)
    assert "spatial" not in tables.patterns, "of one frame it keeps all"
    unavoidable = 1 - (64 * 96 / tables.layout.tokens) ** 2  # what text sees and what sees text
    near = 0.08 if arm == "recall" else 0.12  # strata that a window touches are read whole, and an image is small
    for density in tables.densities:
        assert abs(density - max(1 - sparsity, unavoidable)) < near, tables.densities


@pytest.mark.parametrize("name", CASES)
def test_sparsity_zero_equals_the_dense_model(name: str):
    make, options = CASES[name]
    case = make()
    out, attentions = run(case, sparsity=0.0, **options)
    check_found(case, attentions)
    with torch.no_grad():
        torch.testing.assert_close(out, sample(case.model(**case.inputs)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("fixed_phases")
def test_sparse_model_equals_the_reference_under_the_same_block_mask(name: str):
    make, options = CASES[name]
    case = make()
    out, attentions = run(case, **SPARSE, **options)
    check_found(case, attentions)
    assert all(density < 0.8 for entry in attentions for row in entry["density"] for density in row)
    with torch.no_grad():
        dense = sample(case.model(**case.inputs))
        with ReferenceAttention(attentions, SPARSE):
            expected = sample(case.model(**case.inputs))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert (out - dense).abs().max() > 10 * (out - expected).abs().max()


def test_attention_over_the_image_alone_has_no_text():
    _, attentions = run(sd3(dual=True), sparsity=0.0)
    assert [(tuple(entry["grid"]), entry["text"]) for entry in attentions] == [
        (GRID, [0, TEXT]),
        (GRID, [0, 0]),
        (GRID, [0, TEXT]),
    ]


def test_packed_latents_show_their_grid_in_their_positions():
    case = flux()
    _, attentions = run(case)
    check_found(case, attentions)
    shuffled = torch.randperm(ROWS * COLUMNS, generator=torch.Generator().manual_seed(0))
    case.inputs["img_ids"] = case.inputs["img_ids"][shuffled]
    _, attentions = run(case)
    assert [entry["status"] for entry in attentions] == ["dense", "dense"]


def test_packed_latents_without_positions_stay_dense_and_say_why():
    _, attentions = run(qwen_image())
    assert [entry["status"] for entry in attentions] == ["dense", "dense"]
    assert all("give options grid=(T, H, W)" in entry["remedy"] for entry in attentions)


def test_a_given_grid_that_does_not_fit_packed_latents():
    _, attentions = run(qwen_image(), grid=(1, ROWS + 1, COLUMNS), text=(TEXT, 0))
    assert [entry["status"] for entry in attentions] == ["dense", "dense"]
    assert all("do not fit" in entry["reason"] for entry in attentions)
