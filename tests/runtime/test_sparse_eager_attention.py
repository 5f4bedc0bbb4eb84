# SPDX-License-Identifier: Apache-2.0
"""Attention outside all graphs: what it equals, where its context counts, and that compiled graphs notice nothing."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager_attention import GRID, HALF, N, call, entries, operands, sdpa
from models import randn
from small_video import Block, Video
from torch import Tensor, nn

import rainfusion_compile
from rainfusion_compile import changed_options, dense_first_steps, observe, sparse_eager_attention
from rainfusion_compile.passes.attention_match import DenseReason

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
TURNED, TEXT = (6, 16, 12), (0, 9)
EVERYTHING: dict[str, Any] = {"min_tokens": 0, "sparsity": 0.0}


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Dense, in float64, by hand."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1) @ v


def statuses(report: rainfusion_compile.Report) -> list[tuple[str, int]]:
    return [(entry["status"], entry["calls"]) for entry in entries(report)]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_it_is_the_function_attention() -> None:
    q, k, v = operands()
    out, (entry,) = call(sdpa, q, k, v, **HALF)
    assert torch.equal(out, rainfusion_compile.attention(q, k, v, grid=GRID, sparsity=0.5, error=1.0))
    assert (entry["status"], entry["grid"], entry["tokens"], entry["calls"]) == ("sparse", [*GRID], N, 1)
    assert entry["eager"]
    assert entry["mean_density"] < 0.9
    dense = sdpa(q, k, v)
    assert out.stride() == dense.stride()
    assert not torch.allclose(out, dense, atol=1e-3)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "keys": lambda seen: seen[:, None, None],
    "keys of all samples": lambda seen: seen[:1, None, None],
    "keys, two dimensions": lambda seen: seen[:1],
    "expanded": lambda seen: seen[:, None, None].expand(-1, 2, seen.shape[1], -1),
    "additive": lambda seen: seen[:, None, None].float().log(),
    "bias": lambda seen: randn(*seen.shape, seed=7)[:, None, None],
}


@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_everything_kept_equals_dense_attention(kind: str | None, kv_heads: int) -> None:
    q, k, v = operands(N + sum(TEXT), kv_heads=kv_heads)
    seen = torch.arange(N + sum(TEXT)) < torch.tensor([[N + 4], [N + 7]])
    mask = None if kind is None else MASKS[kind](seen)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, mask, scale=0.2, enable_gqa=kv_heads == 1)

    out, (entry,) = call(attend, q, k, v, text=TEXT, **EVERYTHING)
    assert (entry["status"], entry["text"]) == ("sparse", [*TEXT])
    torch.testing.assert_close(out.double(), reference(q, k, v, mask, 0.2), rtol=1e-4, atol=1e-5)


def test_modes_of_torch_change_nothing() -> None:
    q, k, v = operands()
    want = rainfusion_compile.attention(q, k, v, grid=GRID, sparsity=0.5, error=1.0)
    for mode in (torch.inference_mode(), torch.device("meta"), torch.enable_grad(), torch.no_grad()):
        with sparse_eager_attention(GRID, **HALF), mode:
            assert torch.equal(sdpa(q, k, v), want)
    with torch.autocast("cpu", torch.bfloat16), sparse_eager_attention(GRID, **HALF):
        out = sdpa(q, k, v)
    half = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, rainfusion_compile.attention(*half, grid=GRID, sparsity=0.5, error=1.0))


# --- the context ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsty": 0.5}, r"unknown option 'sparsty' \(did you mean 'sparsity'\?\)"),
        ({"error": 2}, r"error must be a number in \[0, 1\]"),
        ({"text": (1,)}, "text must be 2 integers"),
        ({"dense_steps": 0.1}, "dense_steps is no option of attention outside of graphs: .*dense_first_steps"),
        ({"dense_layers": 1}, "dense_layers is no option"),
        ({"inductor_mode": "max-autotune"}, "inductor_mode is no option .* nothing is compiled"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), sparse_eager_attention(GRID, **options):
        pass
    with pytest.raises(ValueError, match="grid must be 3 integers"), sparse_eager_attention((6, 12)):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="grid must be told"), sparse_eager_attention(None):  # type: ignore[arg-type]
        pass


def test_the_innermost_context_counts_and_exceptions_leave_nothing() -> None:
    q, k, v = operands()
    dense = sdpa(q, k, v)
    with torch.no_grad(), sparse_eager_attention(GRID, **HALF):
        half = sdpa(q, k, v)
        others = []

        def fails() -> None:
            with sparse_eager_attention(TURNED, **HALF):
                others.append(sdpa(q, k, v))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fails()
        assert torch.equal(sdpa(q, k, v), half)
    assert not torch.equal(half, others[0])
    assert torch.equal(sdpa(q, k, v), dense)


def test_threads_have_their_own_contexts() -> None:
    q, k, v = operands()
    outs: dict[str, Tensor] = {}

    def elsewhere() -> None:
        outs["plain"] = sdpa(q, k, v)
        with sparse_eager_attention(TURNED, **HALF):
            outs["other"] = sdpa(q, k, v)

    thread = threading.Thread(target=elsewhere)
    with sparse_eager_attention(GRID, **HALF):
        thread.start()
        thread.join()
        outs["here"] = sdpa(q, k, v)
    assert torch.equal(outs["plain"], sdpa(q, k, v))
    for name, grid in (("other", TURNED), ("here", GRID)):
        assert torch.equal(outs[name], rainfusion_compile.attention(q, k, v, grid=grid, sparsity=0.5, error=1.0))


def test_options_change_from_call_to_call() -> None:
    q, k, v = operands()
    dense = sdpa(q, k, v)
    with torch.no_grad(), observe() as report, sparse_eager_attention(GRID, **HALF):
        with dense_first_steps(1):
            torch.testing.assert_close(sdpa(q, k, v), dense)
        with changed_options(error=0.0):
            torch.testing.assert_close(sdpa(q, k, v), dense)
        half = sdpa(q, k, v)
    assert not torch.allclose(half, dense, atol=1e-3)
    assert [entry["density_by_call"][0] for entry in entries(report)[:2]] == [1.0, 1.0]
    assert entries(report)[2]["mean_density"] < 0.9


def test_a_report_tells_how_many_calls_a_place_makes() -> None:
    q, k, v = operands()
    with torch.no_grad(), observe() as report, sparse_eager_attention(GRID, **HALF):
        for _ in range(3):
            sdpa(q, k, v)
    (entry,) = entries(report)
    assert f"\n{entry['name']}, 3 calls  " in str(report)


def test_kinds_of_calls_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from rainfusion_compile.runtime import sparse_eager_attention as module

    monkeypatch.setattr(module, "MAX_KINDS", 2)
    q, k, v = operands()
    with torch.no_grad(), observe() as report, sparse_eager_attention(GRID, **HALF):
        for scale in (0.1, 0.2, 0.3, 0.4, 0.1):
            assert not torch.equal(sdpa(q, k, v, scale=scale), sdpa(q, k, v, attn_mask=None, scale=scale + 1))
    assert sum(entry["calls"] for entry in entries(report)) == 10


# --- beside compiled graphs -------------------------------------------------------------------------------------------


def latents(*grid: int) -> Tensor:
    t, h, w = grid or GRID
    return randn(1, 3, t, 2 * h, 2 * w)


@pytest.mark.parametrize("first", ["inside", "outside"])
def test_a_compiled_model_is_not_compiled_again(first: str, compiled_count: list[bool]) -> None:
    model = torch.compile(Video().eval(), backend="rainfusion", options=HALF)
    outs, found = [], []
    orders = {"inside": (True, False, True), "outside": (False, True, False)}
    for inside in orders[first]:
        with torch.no_grad(), observe() as report:
            if inside:
                with sparse_eager_attention(GRID, **EVERYTHING):
                    outs.append(model(latents()))
            else:
                outs.append(model(latents()))
        found.append(statuses(report))
    assert compiled_count == [True]
    assert found == [[("sparse", 1), ("sparse", 1)]] * 3
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "rainfusion"])
def test_nothing_is_taken_inside_of_graphs(backend: str) -> None:
    options = {"options": {"min_tokens": 10_000}} if backend == "rainfusion" else {}
    model = Video().eval()
    compiled = torch.compile(model, backend=backend, **options)
    out, found = call(compiled, latents(), **HALF)
    assert [entry["status"] for entry in found if entry["eager"]] == []
    with torch.no_grad():
        torch.testing.assert_close(out, model(latents()))
        assert torch.equal(out, compiled(latents()))


class Aside(nn.Module):
    """A compiled model whose attention is a function that is kept from the compiler."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.patch = attend, nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, video: Tensor) -> Tensor:
        return self.layer(self.layer(self.patch(video).flatten(2).transpose(1, 2)))

    def layer(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


@torch.compiler.disable
def disabled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


def left_to_python(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    for _ in range(1):
        torch._dynamo.graph_break()  # in a loop: the whole frame
        q = sdpa(q, k, v)
    return q


@pytest.mark.parametrize("attend", [disabled, left_to_python])
def test_what_the_compiler_leaves_out_is_sparse(attend: Callable[..., Tensor], compiled_count: list[bool]) -> None:
    model = Aside(attend).eval()
    compiled = torch.compile(model, backend="rainfusion", options=HALF)
    with torch.no_grad():
        dense = model(latents())
        torch.testing.assert_close(compiled(latents()), dense)
        graphs = len(compiled_count)
        out, found = call(compiled, latents(), **HALF)
        (entry,) = (entry for entry in found if entry["eager"])
        assert (entry["status"], entry["calls"]) == ("sparse", 2)
        assert "runtime/test_sparse_eager_attention.py:" in entry["name"]
        assert not torch.allclose(out, dense, atol=1e-4)
        torch.testing.assert_close(call(compiled, latents(), **EVERYTHING)[0], dense)
    assert len(compiled_count) == graphs, "something was compiled again"
    looked_at = [code() for code in torch._dynamo.convert_frame.input_codes.seen]  # by Dynamo
    assert any(code is not None and code.co_name == "layer" for code in looked_at)
    assert not any(code is not None and "/rainfusion_compile/" in code.co_filename for code in looked_at)


def test_export_and_transforms_of_graphs_see_what_they_saw() -> None:
    model, video = Video().eval(), latents()
    with torch.no_grad(), sparse_eager_attention(GRID, **HALF):
        program = torch.export.export(model, (video,))
        traced = torch.fx.experimental.proxy_tensor.make_fx(model)(video)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("aten.scaled_dot_product_attention.default") == 2
    assert not any("rainfusion" in str(node.target) for node in (*program.graph.nodes, *traced.graph.nodes))


# --- reports ----------------------------------------------------------------------------------------------------------


def test_attention_outside_all_graphs_is_told() -> None:
    compiled = torch.compile(Aside(disabled).eval(), backend="rainfusion", options=HALF)
    report = rainfusion_compile.explain(Aside(disabled).eval(), latents(), options=HALF)
    with torch.no_grad(), observe() as watched:
        compiled(latents())
    for one in (report, watched):
        (entry,) = entries(one)
        assert (entry["status"], entry["calls"], entry["remedy"]) == ("dense", 2, DenseReason.OUTSIDE.remedy)
        assert entry["pairs_by_call"] == [2 * N**2] * 2
        text = str(one)
        assert "rainfusion: 0 of 1 video self-attentions sparse" in text
        assert f"{N} tokens, outside all graphs (runtime/test_sparse_eager_attention.py:" in text
        assert ", 2 calls; open `with rainfusion_compile.sparse_eager_attention(grid=(T, H, W)):`" in text
        assert one.to_dict()["graphs"] == 0


def test_of_an_eager_model_enough_tokens_are_told_and_that_it_is_eager() -> None:
    q, k, v = (randn(1, 1, 8192, 16) for _ in range(3))
    with torch.no_grad(), observe() as report:
        sdpa(q, k, v)
        sdpa(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])
    assert [entry["tokens"] for entry in entries(report)] == [8192]
    assert "no graph of this backend ran" in str(report)


def test_what_is_as_long_as_a_known_video_is_told() -> None:
    """Attention beside compiled graphs, over fewer tokens than `min_tokens`."""
    compiled = torch.compile(Block(32, 2).eval(), backend="rainfusion", options={"min_tokens": 10_000, "grid": GRID})
    with torch.no_grad(), observe() as report, rainfusion_compile.video_layout(GRID):
        sdpa(*operands())
        sdpa(*operands(N - 1))
        compiled(randn(1, N, 32))
    assert [entry["tokens"] for entry in entries(report) if entry["eager"]] == []
    with torch.no_grad(), observe() as report:
        sdpa(*operands())
        sdpa(*operands(N - 1))
        torch.compile(Video().eval(), backend="rainfusion", options={"min_tokens": N})(latents())
    assert [entry["tokens"] for entry in entries(report) if entry["eager"]] == [N]


def test_what_no_context_could_make_sparse_is_not_told() -> None:
    q, k, v = operands(head_dim=16)
    report = rainfusion_compile.explain(nn.Linear(4, 4), torch.ones(4), options=EVERYTHING)
    assert entries(report) == []
    with torch.no_grad(), observe() as report:
        report.min_tokens = 0
        sdpa(q, k, v, is_causal=True)
        sdpa(q, k[:, :, :9], v[:, :, :9])
        sdpa(*(x.double() for x in (q, k, v)))
        rainfusion_compile.attention(q, k, v, grid=GRID, sparsity=0.5)
    assert entries(report) == []


def test_reports_hear_the_threads_that_they_listen_to() -> None:
    q, k, v = operands()

    def elsewhere() -> None:
        with torch.no_grad(), sparse_eager_attention(GRID, **HALF):
            sdpa(q, k, v)

    with observe(all_threads=True) as everywhere, observe() as here:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert statuses(everywhere) == [("sparse", 1)]
    assert statuses(here) == []
    assert here.missed == 1


def test_a_report_of_eager_attention_can_be_saved(tmp_path: Any) -> None:
    q, k, v = operands()
    with torch.no_grad(), observe() as report, sparse_eager_attention(GRID, **HALF):
        sdpa(q, k, v)
    for ending in ("html", "json", "csv"):
        report.save(tmp_path / f"report.{ending}")
        assert "test_sparse_eager_attention.py:" in (tmp_path / f"report.{ending}").read_text()


def test_sparse_attention_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = operands()
    with caplog.at_level(logging.INFO, "rainfusion_compile"):
        call(lambda: [sdpa(q, k, v) for _ in range(3)], **HALF)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "py:" in record.message
    assert record.message.endswith("1 of 1 video self-attentions sparse (grid 6x12x16)")
