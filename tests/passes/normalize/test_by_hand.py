# SPDX-License-Identifier: Apache-2.0
"""Attention written out by hand, in the ways that models do, and what looks like it but is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import capture, randn
from spelled import ALL, GRID, SOME, Attend, N, Video, check, latents, merged, plain, reasons, reshaped, run, sdpa
from torch import Tensor

import rainfusion_compile
from rainfusion_compile.backend import rainfusion
from rainfusion_compile.options import Options
from rainfusion_compile.passes.rewrite.writer import rewrite


def old_diffusers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.25)
    return torch.bmm(scores.float().softmax(dim=-1).to(q.dtype), v)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("b i h d, b j h d -> b h i j", q, k) / 4
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), v)


def einsum_dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...ij,...jd->...id", F.softmax(torch.einsum("...jd,...id->...ij", k, q * 0.25), -1), v)


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q.float() * 0.25, k.float().transpose(2, 3))
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).type_as(v), v)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.matmul(k.mT)
    scores /= 4
    scores = scores.mul_(1.0)
    return F.dropout(F.softmax(scores, -1), 0.1, training=False).matmul(v)


def off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dropout of nothing, and a mask of zeros over queries and keys."""
    scores = q @ k.mT * 0.25
    scores += torch.zeros(*q.shape[:2], N, N)
    return torch.dropout(scores.softmax(-1), p=0, train=True) @ v


def native_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.native_dropout((q @ k.mT * 0.25).softmax(-1), 0.1, False)[0] @ v


def scaled_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q.mul(0.5) @ (0.5 * k).permute(0, 1, 3, 2), -1), 0.0) @ v


def written_zeros(q: Tensor) -> Tensor:
    mask = torch.zeros(*q.shape[:2], N, N)
    mask[..., :9, 9:] = float("-inf")
    return mask


HAND: dict[str, Attend] = {
    "matmul": plain,
    "bmm": merged(lambda q, k, v: torch.bmm(torch.bmm(q / 4, k.mT).softmax(2), v)),
    "baddbmm": merged(old_diffusers),
    "einsum": reshaped(einsum),
    "einsum_dots": einsum_dots,
    "off": off,
    "native_dropout": native_dropout,
    "upcast": upcast,
    "in_place": in_place,
    "scaled_keys": scaled_keys,
}


@pytest.mark.parametrize("name", HAND)
def test_by_hand(name):
    check(HAND[name])


@pytest.mark.parametrize("name", ["matmul", "baddbmm", "upcast", "einsum"])
def test_by_hand_in_bfloat16(name):
    check(HAND[name], dtype=torch.bfloat16)


def test_one_key_head_for_all():
    check(plain, lambda q, k, v: sdpa(q, k, v, enable_gqa=True), heads=4, kv_heads=1)


def test_nothing_of_the_original_stays():
    for name, attend in HAND.items():
        (graph,) = capture(Video(attend), latents())
        with torch.no_grad():
            assert len(rewrite(graph, Options(min_tokens=0)).sparse) == 2
        code = graph.code
        assert "block_sparse" in code, name
        for word in ("softmax", "matmul", "bmm", "einsum", "dropout", "empty", "scaled_dot", "imul", "itruediv"):
            assert word not in code, (name, word)


@pytest.mark.parametrize("batched", [False, True])
def test_masks_by_hand(batched):
    def additive(padded: Tensor, q: Tensor) -> Tensor:
        return torch.zeros(N, dtype=q.dtype).masked_fill(padded, float("-inf")).expand(2, 1, 1, N)

    def added(model: Video) -> Attend:
        return lambda q, k, v: (q @ k.mT / 4 + additive(model.padded, q)).softmax(-1) @ v

    def merged_add(model: Video) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = additive(model.padded, q)[:, 0].repeat_interleave(2, 0)
            return torch.baddbmm(mask, q, k.mT, beta=1, alpha=0.25).softmax(-1) @ v

        return merged(attend)

    def filled(model: Video) -> Attend:
        return lambda q, k, v: (q @ k.mT / 4).masked_fill(model.padded, float("-inf")).softmax(-1) @ v

    def as_sdpa(model: Video) -> Attend:
        return lambda q, k, v: sdpa(q, k, v, attn_mask=additive(model.padded, q))

    models = []
    for spell in (as_sdpa, merged_add) if batched else (as_sdpa, added, filled):
        model = Video(plain).eval()
        model.attend = spell(model)
        models.append(model)
    for options in (ALL, SOME):
        wanted, _ = run(models[0], latents(), options=options)
        for model in models[1:]:
            out, attentions = run(model, latents(), options=options)
            assert [a.reason for a in attentions] == [None, None]
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_autocast():
    for name in ("matmul", "upcast"):
        model = Video(HAND[name]).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, attentions = run(model, latents())
            with torch.no_grad():
                torch.testing.assert_close(out, model(latents()), rtol=3e-2, atol=3e-2)
        assert [a.status for a in attentions] == ["sparse", "sparse"], (name, attentions)


def test_dynamic_shapes_and_inference_mode():
    for name in ("matmul", "baddbmm"):
        model = Video(HAND[name]).eval()
        compiled = torch.compile(model, backend="rainfusion", fullgraph=True, dynamic=True, options=ALL)
        for grid in ((4, 6, 10), (4, 10, 6)):
            video = randn(1, 4, grid[0], 2 * grid[1], 2 * grid[2])
            with torch.inference_mode(), rainfusion_compile.observe() as report:
                torch.testing.assert_close(compiled(video), model(video), rtol=1e-4, atol=1e-5)
            assert [a["grid"] for a in report.to_dict()["attentions"]] == [[*grid]] * 2


def test_gradients_stay_dense():
    model = Video(HAND["upcast"])
    compiled = torch.compile(model, backend="rainfusion", options=ALL)
    with rainfusion_compile.observe() as report:
        compiled(latents()).square().sum().backward()
    assert {a["reason"] for a in report.to_dict()["attentions"]} == {"needs gradients"}
    got = model.patch.weight.grad.clone()
    model.zero_grad()
    model(latents()).square().sum().backward()
    torch.testing.assert_close(got, model.patch.weight.grad, rtol=1e-3, atol=1e-3)


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.sum(-1, keepdim=True)


def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.amax(-1, keepdim=True)


def written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    k.mul_(2)
    return scores.softmax(-1) @ v + k


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (weights_returned, "attention weights are used elsewhere"),
        (scores_returned, "scores are used elsewhere"),
        (written_between, "something is written in place between scores and output"),
        (lambda q, k, v: ((q @ k.mT).tanh() * 5).softmax(-1) @ v, "scores pass through tanh"),
        (lambda q, k, v: ((q @ k.mT + torch.ones(N)) * 2).softmax(-1) @ v, "scores are scaled after the mask"),
        (lambda q, k, v: (q @ k.mT + torch.ones(N) + torch.ones(N)).softmax(-1) @ v, "several masks"),
        (lambda q, k, v: (q @ k.mT + torch.ones(N, N).tril()).softmax(-1) @ v, "mask depends on the query"),
        (lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1) @ v, "dropout"),
        (lambda q, k, v: torch.dropout((q @ k.mT).softmax(-1), 0.1, True) @ v, "dropout"),
        (lambda q, k, v: torch.dropout(F.dropout((q @ k.mT).softmax(-1), 0.1), 0.0, True) @ v, "dropout"),
        (lambda q, k, v: torch.native_dropout((q @ k.mT).softmax(-1), 0.1, True)[0] @ v, "dropout"),
        (lambda q, k, v: (written_zeros(q) + q @ k.mT).softmax(-1) @ v, "mask depends on the query"),
        (lambda q, k, v: (q @ k[:, :, :9].mT).softmax(-1) @ v[:, :, :9], "cross-attention: 768 queries, 9 keys"),
        (lambda q, k, v: (q @ k.flip(2).mT).softmax(-1) @ v, "cross-attention: queries and keys"),
        (lambda q, k, v: ((q[None] @ k[None].mT).softmax(-1) @ v[None])[0], "not 4-D: scores of shape (1, 2, 2, "),
        (
            lambda q, k, v: (q.double() @ k.double().exp().mT).softmax(-1).float() @ v,
            "scores of torch.float64 operands, output in torch.float32",
        ),
    ],
)
def test_by_hand_but_dense(attend, why):
    found = reasons(Video(attend).eval())
    assert len(found) == 2
    assert str(found[0]).startswith(why), found
    model = Video(attend).eval()
    torch.manual_seed(0)
    out, _ = run(model, latents())
    if why != "dropout":
        with torch.no_grad():
            torch.testing.assert_close(out, model(latents()), rtol=1e-4, atol=1e-4)


def test_a_router_is_no_attention():
    weight = randn(32, 4)

    def routed(x: Tensor) -> Tensor:
        gates = torch.einsum("bsd,de->bse", x, weight).softmax(-1)
        return torch.einsum("bse,bsde->bsd", gates, x[..., None].expand(-1, -1, -1, 4))

    assert reasons(routed, randn(2, N, 32)) == []
    assert reasons(lambda x: x.softmax(-1) @ x.mT, randn(2, N, 32)) == []
    assert reasons(lambda x: (((x @ weight).softmax(-1) ** 2) @ weight.mT) @ x.mT, randn(2, N, 32)) == []


def test_queries_written_after_they_were_scaled():
    """The scaled queries are used, as those before have changed since."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scaled = q * 0.25
        q.zero_()
        return (scaled @ k.mT).softmax(-1) @ v + q

    check(attend)


@pytest.mark.parametrize(
    "scores",
    [
        lambda s, hidden: s.masked_fill_(hidden, float("-inf")),
        lambda s, hidden: s.masked_fill(hidden, torch.finfo(torch.float16).min),
        lambda s, hidden: torch.where(hidden, float("-inf"), s),
        lambda s, hidden: torch.where(~hidden, s, -1e9),
        lambda s, hidden: s.where(~hidden, float("-inf")),
    ],
)
def test_ways_to_hide_keys(scores):
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q @ k.mT / 4, torch.arange(N) % 7 == 3).softmax(-1) @ v

    check(masked, lambda q, k, v: sdpa(q, k, v, attn_mask=(torch.arange(N) % 7 != 3)[None]))


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (lambda q, k, v: (q @ k.mT).masked_fill(torch.arange(N) < 9, -5.0).softmax(-1) @ v, "scores pass through"),
        (
            lambda q, k, v: (q @ k.mT).to(torch.int64).float().softmax(-1) @ v,
            "scores or weights are cast to torch.i",
        ),
        (lambda q, k, v: (q @ k.mT).softmax(-1).to(torch.float8_e5m2).float() @ v, "scores or weights are cast to"),
        (
            lambda q, k, v: torch.bmm((q @ k.mT).softmax(-1).flatten(0, 1), v.flatten(0, 1)).view_as(v),
            "attention weights change their shape",
        ),
        (lambda q, k, v: (q @ k.mT * -0.25).softmax(-1) @ v, "scores are scaled by -0.75"),
        (lambda q, k, v: (q @ k.mT * torch.tensor(0.25)).softmax(-1) @ v, "scores pass through mul"),
        (
            lambda q, k, v: ((q @ k.mT).softmax(-1) ** 2) @ v,
            "scores or weights pass through pow",
        ),
        (
            lambda q, k, v: (q @ k.mT).softmax(-1).mul(torch.ones(N)).to(q.dtype) @ v,
            "scores or weights pass through mul",
        ),
        (
            lambda q, k, v: torch.cat([q @ k.mT, torch.zeros(*q.shape[:-1], 1)], -1).softmax(-1)[..., :-1] @ v,
            "scores or weights pass through cat",
        ),
        (
            lambda q, k, v: ((q @ k.mT).flatten(0, 1).softmax(-1) @ v.flatten(0, 1)).view_as(v),
            "scores or weights pass through flatten",
        ),
        (lambda q, k, v: torch.add(q @ k.mT, torch.zeros(N), alpha=2).softmax(-1) @ v, "scores pass through add"),
    ],
)
def test_almost_attention(attend, why):
    found = reasons(Video(attend).eval())
    assert len(found) == 2
    assert str(found[0]).startswith(why), found


def test_softmax_over_queries_is_no_attention():
    assert reasons(Video(lambda q, k, v: (q @ k.mT).softmax(-2) @ v).eval()) == []


def test_a_graph_that_may_be_analysed_again_is_left_as_it_was():
    """Its tokens come from elsewhere, so it waits for what another graph knows of them."""
    (graph,) = capture(lambda q, k, v: plain(q, k, v), *(randn(1, 2, N, 16, seed=seed) for seed in range(3)))
    before = graph.code
    with torch.no_grad():
        rainfusion(graph, [], options=ALL)
    graph.recompile()
    assert graph.code == before


def test_dense_layers_are_left_as_they_were():
    model = Video(plain).eval()
    (graph,) = capture(model, latents())
    with torch.no_grad():
        report = rewrite(graph, Options.parse({"min_tokens": 0, "dense_layers": [0]}, None))
    assert [entry.status for entry in report.attentions] == ["dense", "sparse"]
    assert graph.code.count(".softmax(") == 1
    assert "scaled_dot_product" not in graph.code


def test_broken_graphs():
    """The grid is known in another graph than the attention stands in."""

    class Broken(Video):
        def forward(self, latents: Tensor) -> Tensor:
            x = self.patch(latents).flatten(2).transpose(1, 2)
            torch._dynamo.graph_break()
            q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return plain(q, k, v)

    model = Broken(plain).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="rainfusion", options=ALL)
    with torch.no_grad(), rainfusion_compile.observe() as report:
        torch.testing.assert_close(compiled(latents()), model(latents()), rtol=1e-4, atol=1e-5)
    assert [(a["status"], a["grid"]) for a in report.to_dict()["attentions"]] == [("sparse", [*GRID])]
