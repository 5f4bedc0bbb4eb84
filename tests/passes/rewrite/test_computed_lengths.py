# SPDX-License-Identifier: Apache-2.0
"""Text whose length the graph itself computes, so that its size is known at run time only."""

import models
import pytest
import torch
from resolutions import CLOSE, EVERYTHING, GRIDS, Video, by_function, call, compiled_by_us, latents, plain_compilations
from torch import Tensor

pytestmark = pytest.mark.usefixtures("fixed_phases")


class Prompted(Video):
    """Only the valid tokens of the text take part, before or after the video, as Mochi has it."""

    def __init__(self, how: str) -> None:
        super().__init__(layers=1)
        self.how = how

    def forward(self, video: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        x = self.patch(video)
        size = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        count = valid.sum().item() if "count" in self.how else None
        if self.how == "nonzero":
            parts = [x, text[:, torch.nonzero(valid).flatten()]]
        elif self.how == "nonzero before":
            parts = [text[:, torch.nonzero(valid).flatten()], x]
        elif self.how == "count":
            parts = [x, text[:, :count]]
        elif self.how == "both counts":
            parts = [text[:, :count], x, text[:, torch.nonzero(valid).flatten()]]
        elif self.how == "count of video":
            torch._check(count <= x.shape[1])
            parts = [x[:, :count], text]
        else:
            raise ValueError(self.how)
        x = torch.cat(parts, dim=1)
        x = x + self.blocks[0](x)
        return x.sum(1), size


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("how", ["nonzero", "nonzero before", "count"])
def test_text_whose_length_the_graph_computes(how, dynamic, compilations):
    torch.manual_seed(0)
    model = Prompted(how).eval()
    calls = [
        ((latents(grid), models.randn(1, 9, 32, seed=1), torch.arange(9) < length), grid, length)
        for grid in (GRIDS[:2] if dynamic else GRIDS[:1])
        for length in (4, 7, 2)
    ]
    usual = plain_compilations(model, [(args, {}) for args, *_ in calls], dynamic)
    function = compiled_by_us(model, dynamic=dynamic)
    for args, grid, length in calls:
        (got, _), found = call(function, *args)
        text = (length, 0) if "before" in how else (0, length)
        assert [(a["status"], a["grid"], a["text"]) for a in found] == [("sparse", list(grid), list(text))]
        expected, _ = by_function(model, *args, grid=grid, text=text)
        torch.testing.assert_close(got, expected, **CLOSE)
    assert len(compilations) == usual < len(calls)


@pytest.mark.inductor
def test_through_inductor_with_text_whose_length_the_graph_computes():
    model = Prompted("nonzero").eval()
    function = compiled_by_us(model, options=EVERYTHING)
    for grid, length in zip(GRIDS[:3], (4, 7, 2), strict=True):
        args = latents(grid), models.randn(1, 9, 32, seed=1), torch.arange(9) < length
        (got, _), found = call(function, *args)
        with torch.no_grad():
            torch.testing.assert_close(got, model(*args)[0], **CLOSE)
        assert [(a["grid"], a["text"]) for a in found] == [(list(grid), [0, length])]


@pytest.mark.parametrize("how", ["both counts", "count of video"])
def test_what_only_a_run_could_tell_stays_dense(how, compilations):
    model = Prompted(how).eval()
    function = compiled_by_us(model, dynamic=False)
    for length in (4, 7):
        args = latents(GRIDS[0]), models.randn(1, 9, 32, seed=1), torch.arange(9) < length
        (got, _), found = call(function, *args)
        with torch.no_grad():
            torch.testing.assert_close(got, model(*args)[0], **CLOSE)
        assert [a["status"] for a in found] == ["dense"]


def test_mochi():
    """Text by `nonzero`, one sequence for each sample, in one graph."""
    pytest.importorskip("diffusers")
    from benchmarks.zoo.conv import mochi

    case = mochi()
    function = torch.compile(case.model, backend="rainfusion", fullgraph=True, options=EVERYTHING)
    for padding in (2, 4):
        inputs = {**case.inputs, "return_dict": False, "encoder_attention_mask": torch.arange(9)[None] < 9 - padding}
        (got, *_), found = call(function, **inputs)
        with torch.no_grad():
            torch.testing.assert_close(got, case.model(**inputs)[0], **CLOSE)
        video = [(a["grid"], a["text"]) for a in found if a["name"].endswith("attn1")]
        assert video == [(list(case.grid), [0, 9 - padding])] * 2
