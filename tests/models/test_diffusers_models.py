# SPDX-License-Identifier: Apache-2.0
"""Real, unmodified diffusers classes, compiled with ``fullgraph=True`` by the whole backend; one by Inductor, too.

Random weights: this shows integration, never quality.
"""

import models
import pytest
import torch
from whole_models import SPARSE, ReferenceAttention, check_found, run, sample

CASES = {
    "wan": lambda grid: models.wan(grid, 2),
    "hunyuan_video": lambda grid: models.hunyuan_video(grid, 2),
    "cogvideox": lambda grid: models.cogvideox(grid, 2, rotary=True),
    "allegro": lambda grid: models.allegro(grid, 2, mask=True),
    "ltx": lambda grid: models.ltx(grid, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_sparsity_zero_equals_the_dense_model(name):
    case = CASES[name]((3, 5, 7))
    out, attentions = run(case, sparsity=0.0)
    check_found(case, attentions)
    with torch.no_grad():
        torch.testing.assert_close(out, sample(case.model(**case.inputs)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.inductor] * (name == "hunyuan_video")) for name in CASES]
)
@pytest.mark.usefixtures("fixed_phases")
def test_sparse_model_equals_the_reference_under_the_same_block_mask(name):
    case = CASES[name]((5, 11, 13))
    out, attentions = run(case, **SPARSE)
    check_found(case, attentions)
    sparse = [entry for entry in attentions if entry["status"] == "sparse"]
    assert all(density < 0.9 for entry in sparse for row in entry["density"] for density in row)
    with torch.no_grad():
        dense = sample(case.model(**case.inputs))
        with ReferenceAttention(sparse, SPARSE):
            expected = sample(case.model(**case.inputs))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert (out - dense).abs().max() > 10 * (out - expected).abs().max()  # sparse is not dense
