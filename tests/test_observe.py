# SPDX-License-Identifier: Apache-2.0
"""What a report hears, and says where it heard nothing; and `explain`."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from small_video import Video
from torch import nn

import rainfusion_compile
from rainfusion_compile import Options, explain, observe

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EVERYTHING = {"sparsity": 0.0, "min_tokens": 0}
ALONE = "2 cross-attentions and 1 other self-attention over few tokens left alone"


@pytest.fixture
def video():
    return torch.randn(1, 3, 5, 12, 14)


@pytest.fixture
def compiled():
    return torch.compile(Video().eval(), backend="rainfusion", options=EVERYTHING)


def calls(report):
    return [entry["calls"] for entry in report.to_dict()["attentions"]]


def in_a_thread(function, *args):
    with torch.no_grad():
        thread = threading.Thread(target=torch.no_grad()(function), args=args)
        thread.start()
        thread.join()


def test_every_open_report_hears_every_call(compiled, video):
    with torch.no_grad(), observe() as outer:
        with observe() as inner:
            compiled(video)
        compiled(video)
    assert (calls(outer), calls(inner)) == ([2, 2], [1, 1])


def test_a_report_for_all_threads(compiled, video):
    with observe(all_threads=True) as everywhere, observe() as here:
        in_a_thread(compiled, video)
    assert calls(everywhere) == [1, 1]
    assert calls(here) == []
    assert "1 call in others: observe(all_threads=True)" in str(here)
    in_a_thread(compiled, video)
    assert calls(everywhere) == [1, 1]  # it is closed


def test_an_empty_report_says_why(video):
    other = torch.compile(Video().eval(), backend="eager")
    with torch.no_grad(), observe() as report:
        other(video)
    assert "no graph of this backend ran" in str(report)
    assert "another backend" in str(report)
    linear = torch.compile(nn.Linear(4, 4), backend="rainfusion")
    with torch.no_grad(), observe() as report:
        linear(torch.ones(4))
    assert str(report).startswith("rainfusion: 1 graph ran, without any attention")


def test_eager_runs_are_told(compiled, video):
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), observe() as report:
        compiled(video)
    assert "torch.compile is switched off" in str(report)


@pytest.mark.parametrize("way", ["module", "function", "in place"])
def test_a_model_of_another_backend_is_an_error(way, video):
    model = Video().eval()
    if way == "in place":
        model.compile(backend="eager")
    else:
        model = torch.compile(model if way == "module" else model.forward, backend="eager")
    with pytest.raises(ValueError, match=r"already compiled, but no graph of this backend ran: .* another backend"):
        explain(model, video)


def test_what_torch_compile_takes_is_passed_on(video):
    def breaks(video):
        x = model(video)
        torch._dynamo.graph_break()
        return x + 1

    model = Video().eval()
    assert len(explain(breaks, video, options=EVERYTHING).to_dict()["attentions"]) == 2
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        explain(breaks, video, options=EVERYTHING, fullgraph=True)
    torch._dynamo.reset()
    assert "blocks" in str(explain(model, video, options=EVERYTHING, dynamic=True))
    for given in ({"fullgraph": True}, {"dynamic": False}, {"options": EVERYTHING}):
        with pytest.raises(ValueError, match="already compiled; its options"):
            explain(torch.compile(model, backend="rainfusion"), video, **given)


def test_options_may_be_an_object(video):
    options = Options(min_tokens=0, sparsity=0.5, patterns=("temporal",))
    assert Options.parse(options) is options
    model = Video().eval()
    with torch.no_grad(), observe() as report:
        torch.compile(model, backend="rainfusion", options=options)(video)
    torch._dynamo.reset()
    for one in (report, explain(model, video, options=options)):
        assert "2 of 2 video self-attentions sparse" in str(one)
    with pytest.raises(ValueError, match=r"options must be rainfusion_compile.Options or a mapping; got \[1\]"):
        explain(model, video, options=[1])


class TextAndVideo(Video):
    """Self-attention over few tokens of text, and in each block cross-attention to them."""

    def forward(self, video, text):
        text = F.scaled_dot_product_attention(*[text.unflatten(-1, (2, -1)).transpose(1, 2)] * 3)
        x = self.patch(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
            q = x.unflatten(-1, (2, -1)).transpose(1, 2)
            x = x + F.scaled_dot_product_attention(q, text, text).transpose(1, 2).flatten(2)
        return x


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_no_video_self_attention_is_no_failure(video, dynamic):
    args = TextAndVideo().eval(), video, torch.randn(1, 9, 64)
    options = Options(min_tokens=100, sparsity=0.0)
    report = explain(*args, options=options, dynamic=dynamic)
    first, *_ = str(report).splitlines()
    what = f"2 of 2 video self-attentions sparse ({ALONE})"
    assert first == f"rainfusion: {what}"
    assert "2 left alone: cross-attention: 210 queries, 9 keys" in str(report)
    assert report.to_dict()["density"] == 1.0


def test_with_gradients_only_self_attention_is_left_dense(video):
    model = torch.compile(TextAndVideo(), backend="rainfusion", options={"min_tokens": 100})
    with observe() as report:
        model(video, torch.randn(1, 9, 64))
    what = f"0 of 2 video self-attentions sparse ({ALONE})"
    assert str(report).splitlines()[0] == f"rainfusion: {what}"
    assert "2 left dense: needs gradients; call it under torch.no_grad()" in str(report)


def test_sizes_of_a_dense_attention_are_those_of_each_call():
    model = torch.compile(Video().eval(), backend="rainfusion", dynamic=True, options={"min_tokens": 10_000})
    with torch.no_grad(), observe() as report:
        for frames in (5, 3):
            model(torch.randn(1, 3, frames, 12, 14))
    entries = report.to_dict()["attentions"]
    assert [entry["pairs_by_call"] for entry in entries] == [[2 * 210**2, 2 * 126**2]] * 2
    assert [entry["density_by_call"] for entry in entries] == [[1.0, 1.0]] * 2


def test_the_package_shows_what_it_has():
    assert dir(rainfusion_compile) == sorted(rainfusion_compile.__all__)
