# SPDX-License-Identifier: Apache-2.0
"""Attention as one operator: flash-attn's, torch's own kernels, flex_attention, diffusers' backends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import capture, wan
from spelled import GRID, N, Video, check, latents, plain, reasons, reshaped, run, sdpa
from torch import Tensor, nn

from benchmarks.zoo import flash_stand_in
from rainfusion_compile.options import Options
from rainfusion_compile.passes.rewrite.writer import rewrite

# --- flash attention -------------------------------------------------------------------------------------------------


flash_stand_in.define("spellings_test")
flash_forward = torch.ops.spellings_test._flash_attn_forward


@torch.library.custom_op("_spellings_flash_attn_3::_flash_attn_forward", mutates_args=())
def flash_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """The operator that diffusers wraps FlashAttention-3 into."""
    return flash_forward(q, k, v, 0.0, softmax_scale or q.shape[-1] ** -0.5, causal)


@flash_3.register_fake
def _(q, k, v, *rest, **others):
    return torch.empty_like(q), q.new_empty(q.shape[:3])


@torch.compiler.allow_in_graph
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
    assert tensor_layout == "HND"
    return F.scaled_dot_product_attention(q, k, v, scale=sm_scale)


@torch.compiler.allow_in_graph
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    return flash_forward(q, k, v, dropout_p, softmax_scale or q.shape[-1] ** -0.5, causal, *window_size)[0]


@pytest.mark.parametrize("call", ["operator", "overload", "function", "flash_attn_3"])
def test_flash_attention(call):
    spell = {
        "operator": lambda q, k, v: torch.ops.spellings_test._flash_attn_forward(q, k, v, 0.0, 0.25, False)[0],
        "overload": lambda q, k, v: torch.ops.spellings_test._flash_attn_forward.default(
            q, k=k, v=v, dropout_p=0.0, softmax_scale=0.25, causal=False, softcap=0.0, return_softmax=False
        )[0],
        "function": lambda q, k, v: flash_attn_func(q, k, v),
        "flash_attn_3": lambda q, k, v: torch.ops._spellings_flash_attn_3._flash_attn_forward(q, k, v, num_splits=2)[0],
    }[call]
    check(reshaped(spell))
    check(reshaped(spell), lambda q, k, v: sdpa(q, k, v, enable_gqa=True), heads=4, kv_heads=2)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"causal": True}, "causal"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"window_size_left": 16}, "attention operator with window_size_left=16"),
        ({"softcap": 30.0}, "attention operator with softcap=30.0"),
        ({"alibi_slopes": torch.ones(2)}, "attention operator with alibi_slopes="),
    ],
)
def test_flash_attention_but_dense(given, why):
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        default = {"dropout_p": 0.0, "softmax_scale": 0.25, "causal": False}
        return torch.ops.spellings_test._flash_attn_forward(q, k, v, **{**default, **given})[0]

    assert all(str(reason).startswith(why) for reason in reasons(Video(reshaped(attend))))


def test_flash_attention_that_returns_more():
    def more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.ops.spellings_test._flash_attn_forward(q, k, v, 0.0, 0.25, False)
        return out + lse.transpose(1, 2)[..., None]

    assert reasons(Video(reshaped(more))) == ["statistics of the softmax are used elsewhere"] * 2


STARTS: dict[str, Callable[[int, int], Tensor]] = {
    "arange": lambda b, s: torch.arange(0, (b + 1) * s, s, dtype=torch.int32),
    "multiplied": lambda b, s: torch.arange(0, b + 1, dtype=torch.int32) * s,
    "written": lambda b, s: written_starts(b, s),
    "joined": lambda b, s: torch.cat([torch.zeros(1, dtype=torch.int32), torch.tensor([s] * b)]).cumsum(0).int(),
    "padded": lambda b, s: F.pad(torch.cumsum(torch.full((b,), s), 0, dtype=torch.int32), (1, 0)),
}


def written_starts(batch: int, tokens: int) -> Tensor:
    starts = torch.zeros(batch + 1, dtype=torch.int32)
    starts[1:] = torch.cumsum(torch.full((batch,), tokens, dtype=torch.int32), 0)
    return starts


def packed(starts: Callable[[int, int], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """flash-attn on packed sequences, of ``[B, S, H, D]``."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, tokens = q.shape[:2]
        begin = starts(batch, tokens)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        forward = torch.ops.spellings_test._flash_attn_varlen_forward
        return forward(*flat, begin, begin, tokens, tokens, 0.0, 0.25, False)[0].unflatten(0, (batch, tokens))

    return attend


@pytest.mark.parametrize("name", STARTS)
def test_packed_sequences_of_one_for_each_sample(name):
    assert reasons(Video(reshaped(packed(STARTS[name])))) == [None, None]
    if name in ("multiplied", "written"):
        check(reshaped(packed(STARTS[name])))


def written_later(batch: int, tokens: int) -> Tensor:
    starts = written_starts(batch, tokens)
    starts[1].fill_(5)
    return starts


@pytest.mark.parametrize(
    ("starts", "why"),
    [
        (lambda b, s: torch.arange(0, 2 * b + 1, dtype=torch.int32) * (s // 2), "token order: pieces of one axis"),
        (lambda b, s: torch.tensor([0, b * s], dtype=torch.int32), "tokens: 2 x 8 x 8 x 12 are not the axes"),
        (lambda b, s: torch.tensor([0, 5, b * s], dtype=torch.int32), "packed sequences of 1536 tokens, 1531 of"),
        (lambda b, s: torch.tensor([0, 5, s, b * s], dtype=torch.int32), "packed sequences of 768 tokens, 763 of"),
        (lambda b, s: torch.arange(b + 1, dtype=torch.int32).float().mul(s).int(), "packed sequences, whose lengths"),
        (written_later, "packed sequences, whose lengths"),
    ],
)
def test_packed_sequences_but_dense(starts, why):
    found = reasons(Video(reshaped(packed(starts))))
    assert len(found) == 2
    assert all(str(reason).startswith(why) for reason in found), found


def test_packed_sequences_of_lengths_from_outside():
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.video = Video(plain)

        def forward(self, video: Tensor, starts: Tensor) -> Tensor:
            self.video.attend = reshaped(packed(lambda b, s: starts))
            return self.video(video)

    starts = torch.arange(0, 3 * N, N, dtype=torch.int32)
    why = "packed sequences, whose lengths are an input of the graph"
    assert reasons(Given(), latents(), starts) == [why] * 2


def test_sage_attention():
    check(lambda q, k, v: sageattn(q, k, v, sm_scale=0.25))
    assert reasons(Video(lambda q, k, v: sageattn(q, k, v, is_causal=True))) == ["causal"] * 2


# --- torch's own kernels ---------------------------------------------------------------------------------------------

ATEN = {
    "flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=0.25)[0],
    "overload": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v)[0],
    "flash_for_cpu": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
    "math": lambda q, k, v: torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0],
    "efficient": lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0],
    "cudnn": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(
        query=q, key=k, value=v, attn_bias=None, compute_log_sumexp=True, return_debug_mask=False, scale=0.25
    )[0],
    "flash_forward": reshaped(
        lambda q, k, v: torch.ops.aten._flash_attention_forward(q, k, v, None, None, N, N, 0.0, False, False)[0]
    ),
    "efficient_forward": reshaped(
        lambda q, k, v: torch.ops.aten._efficient_attention_forward(q, k, v, None, None, None, None, None, 0.0, 0)[0]
    ),
}


@pytest.mark.parametrize("name", ATEN)
def test_kernels_of_torch(name):
    """Most of them do not run on CPU: what replaces them does, and equals SDPA."""
    out, attentions = run(Video(ATEN[name]).eval(), latents())
    assert [(a.reason, a.grid, a.tokens, a.heads) for a in attentions] == [(None, GRID, N, 2)] * 2
    with torch.no_grad():
        torch.testing.assert_close(out, Video(sdpa).eval()(latents()), rtol=1e-4, atol=1e-5)


def test_masked_kernel_of_torch():
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.zeros(N).masked_fill(torch.arange(N) % 5 == 1, float("-inf")).expand(2, 2, N, N)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False)[0]

    out, attentions = run(Video(attend).eval(), latents())
    assert [a.reason for a in attentions] == [None, None]
    masked = Video(lambda q, k, v: sdpa(q, k, v, attn_mask=(torch.arange(N) % 5 != 1)[None])).eval()
    with torch.no_grad():
        torch.testing.assert_close(out, masked(latents()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (
            lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0],
            "causal",
        ),
        (
            lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False, 0.1)[0],
            "dropout",
        ),
        (
            lambda q, k, v: torch.ops.aten._flash_attention_forward(
                *(x.transpose(1, 2) for x in (q, k, v)), None, None, N, N, 0.0, False, False, window_size_left=64
            )[0].transpose(1, 2),
            "attention operator with window_size_left=64",
        ),
        (
            lambda q, k, v: torch.ops.aten._scaled_dot_product_attention_math(q, k, v, q.new_ones(N).bool()[None])[0],
            "mask of bools, which this operator would add to scores",
        ),
        (
            lambda q, k, v: torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[1] @ v,
            "statistics of the softmax are used elsewhere",
        ),
    ],
)
def test_kernels_of_torch_but_dense(attend, why):
    assert reasons(Video(attend).eval()) == [why] * 2


# --- flex_attention --------------------------------------------------------------------------------------------------


def test_plain_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    out, attentions = run(Video(lambda q, k, v: flex_attention(q, k, v, scale=0.25)).eval(), latents())
    assert [(a.reason, a.grid, a.heads) for a in attentions] == [(None, GRID, 2)] * 2
    with torch.no_grad():
        torch.testing.assert_close(out, Video(sdpa).eval()(latents()), rtol=1e-4, atol=1e-5)


def test_flex_attention_but_dense():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, N, N, device="cpu")
    tail = create_block_mask(lambda b, h, i, j: j >= 0, None, None, N, N, device="cpu")
    for given, why in (
        ({"score_mod": lambda score, b, h, i, j: score * 2}, "flex_attention with a score_mod"),
        ({"score_mod": lambda score, b, h, i, j: score + (i - j)}, "flex_attention with a score_mod"),
        ({"block_mask": mask}, "flex_attention with a mask"),
        ({"block_mask": tail}, "flex_attention with a mask"),
    ):
        found = reasons(Video(lambda q, k, v, given=given: flex_attention(q, k, v, **given)).eval())
        assert found == [why] * 2, given


# --- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_attention_backends_of_diffusers(backend):
    pytest.importorskip("diffusers")
    case = wan(GRID, 1)
    case.model.eval().set_attention_backend(backend)
    out, attentions = run(case.model, **case.inputs)
    video = [a for a in attentions if a.reason is None]
    assert [(a.grid, a.tokens) for a in video] == [(GRID, N)] * case.video
    assert len(attentions) == case.video + case.dense
    case.model.set_attention_backend("native")
    with torch.no_grad():
        torch.testing.assert_close(out[0], case.model(**case.inputs)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["flash", "sage"])
def test_attention_backends_of_diffusers_that_call_one_function(backend, monkeypatch):
    """diffusers' own code around a function of the test, which stands for the package's."""
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

    @torch.compiler.allow_in_graph
    def flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size=(-1, -1), return_attn_probs=False):
        return flash_forward(q, k, v, dropout_p, softmax_scale or q.shape[-1] ** -0.5, causal)[0]

    @torch.compiler.allow_in_graph
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
        assert tensor_layout == "NHD"
        return flash_forward(q, k, v, 0.0, sm_scale or q.shape[-1] ** -0.5, is_causal)[0]

    monkeypatch.setattr(dispatch, "flash_attn_func", flash_attn_func)
    monkeypatch.setattr(dispatch, "sageattn", sageattn)
    attend = {"flash": dispatch._flash_attention, "sage": dispatch._sage_attention}[backend]
    check(reshaped(lambda q, k, v: attend(q, k, v)))


def test_the_old_processor_of_diffusers():
    attention_processor = pytest.importorskip("diffusers.models.attention_processor")

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
            processor = attention_processor.AttnProcessor()
            self.attn = attention_processor.Attention(32, heads=2, dim_head=16, processor=processor)

        def forward(self, video: Tensor) -> Tensor:
            return self.attn(self.patch(video).flatten(2).transpose(1, 2))

    model = Old().eval()
    out, attentions = run(model, latents())
    assert [(a.reason, a.grid, a.heads) for a in attentions] == [(None, GRID, 2)]
    with torch.no_grad():
        torch.testing.assert_close(out, model(latents()), rtol=1e-4, atol=1e-5)


def test_subgraphs_stay_dense():
    from torch.utils.checkpoint import checkpoint

    model = Video(plain)
    (graph,) = capture(lambda x: checkpoint(model, x, use_reentrant=False), latents(), grad=True)
    found = [attention.reason for attention in rewrite(graph, Options(min_tokens=0)).attentions]
    assert len(found) == 2
    assert all(str(reason).startswith("inside a higher-order operator") for reason in found)
