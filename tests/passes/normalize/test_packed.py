# SPDX-License-Identifier: Apache-2.0
"""Packed sequences whose lengths are data: how many words a text has is known on the device only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import randn
from spelled import ALL, GRID, SOME, H, N, T, W, reasons, run
from torch import Tensor, nn

import rainfusion_compile
from rainfusion_compile.options import Options
from rainfusion_compile.passes.rewrite.writer import rewrite

WORDS = 12
S = N + WORDS


@torch.library.custom_op("packed_test::flash_attn_varlen", mutates_args=())
def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Each sequence on its own, in float64; rows of none are 0, where flash-attn leaves what was there."""
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.flatten(), cu_seqlens_k.flatten()
    out, group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).double() for x in (k, v))
    edges = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    for (start, first), (end, last) in pairwise(edges):
        scores = torch.einsum("ihd,jhd->hij", q[start:end].double(), k[first:last])
        weights = (scores * (softmax_scale or q.shape[-1] ** -0.5)).softmax(-1)
        out[start:end] = torch.einsum("hij,jhd->ihd", weights, v[first:last]).to(q.dtype)
    return out


@varlen.register_fake
def _(q, k, v, *rest, **others):
    return torch.empty_like(q)


Starts = Callable[[Tensor, int, int], Tensor]


class Joint(nn.Module):
    """Two attentions over video and text in one packed sequence; all tokens come out, padding too."""

    def __init__(self, starts: Starts, kv_heads: int = 2, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.starts, self.kv_heads, self.causal = starts, kv_heads, causal
        self.patch, self.out = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2)), nn.Linear(32, 32)
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 32 * kv_heads)

    def forward(self, video: Tensor, text: Tensor, told: Tensor) -> Tensor:
        x = torch.cat([self.patch(video).flatten(2).transpose(1, 2), text], 1)
        b, s, _ = x.shape
        starts = self.starts(told, b, s)
        for _ in range(2):
            q = 2 * self.q(x).view(b * s, 2, 16)
            k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, 16)).flatten(0, 1).unbind(1)
            y = varlen(q, k, v, starts, starts, s, s, softmax_scale=0.3, causal=self.causal)
            x = x + self.out(y.view(b, s, 32))
        return x


def in_turn(valid: Tensor, b: int, s: int) -> Tensor:
    """What counts of each sample, then its padding, written one by one."""
    starts, words = torch.zeros(2 * b + 1, dtype=torch.int32), valid.sum(1)
    for i in range(b):
        starts[2 * i + 1] = words[i] + N + i * s
        starts[2 * i + 2] = (i + 1) * s
    return starts


def at_once(valid: Tensor, b: int, s: int) -> Tensor:
    ends = torch.stack([valid.int().sum(-1) + N, torch.full((b,), s)], 1) + torch.arange(b)[:, None] * s
    return torch.cat([ends.new_zeros(1), ends.flatten()]).to(torch.int32)


def inputs(batch: int, words: int = WORDS) -> tuple[Tensor, Tensor]:
    return randn(batch, 4, T, 2 * H, 2 * W), randn(batch, words, 32)


def valid(lengths: list[int], words: int = WORDS) -> Tensor:
    return torch.arange(words) < torch.tensor(lengths)[:, None]


def check(model: nn.Module, *args: Tensor, text: int = WORDS) -> None:
    """Rewritten, it gives what it gave: all rows of it, whichever are padding."""
    out, attentions = run(model.eval(), *args)
    assert [(a.reason, a.grid, a.text, a.tokens) for a in attentions] == [(None, GRID, (0, text), N + text)] * 2
    with torch.no_grad():
        torch.testing.assert_close(out, model(*args), rtol=1e-4, atol=1e-5)


@settings(max_examples=8)
@given(st.data())
def test_valid_tokens_and_padding_of_each_sample(data):
    starts, kv_heads = data.draw(st.sampled_from([in_turn, at_once])), data.draw(st.sampled_from([1, 2]))
    batch, words = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    lengths = [data.draw(st.integers(0, words)) for _ in range(batch)]
    check(Joint(starts, kv_heads), *inputs(batch, words), valid(lengths, words), text=words)


def test_no_text_at_all_or_none_that_counts():
    check(Joint(in_turn), *inputs(2, 0), valid([0, 0], 0), text=0)
    check(Joint(in_turn), *inputs(2), valid([0, 0]))
    check(Joint(in_turn), *inputs(2), valid([WORDS, WORDS]))


def test_lengths_may_change_from_call_to_call():
    model, graphs = Joint(in_turn).eval(), []

    def backend(gm, _):
        assert len(rewrite(gm, Options.parse(ALL, None)).sparse) == 2
        graphs.append(gm)
        return lambda *args: gm.forward(*args)[:-6]

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for lengths in ([3, 0], [12, 7], [0, 12]):
            args = *inputs(2), valid(lengths)
            torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_sparse_rows_of_the_video_see_no_padding():
    model, (video, text), told = Joint(in_turn).eval(), inputs(2), valid([5, 0])
    out, _ = run(model, video, text, told, options=SOME)
    noisy = torch.where(told[..., None], text, 100 * randn(2, WORDS, 32))
    again, attentions = run(model, video, noisy, told, options=SOME)
    assert attentions[0].densities[0] < 1
    torch.testing.assert_close(out[:, :N], again[:, :N], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out[:, N:], again[:, N:])


@settings(max_examples=8)
@given(first=st.integers(0, S), last=st.integers(0, S))
def test_one_sequence_that_begins_and_ends_somewhere(first, last):
    told = torch.tensor(sorted([first, last]), dtype=torch.int32)
    check(Joint(lambda told, b, s: told), *inputs(1), told)


def test_one_sequence_packed_by_other_code():
    """Operands are ``[tokens, H, D]``, and never were anything else in this graph."""

    class Packed(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
            return varlen(q, k, v, starts, starts, S, S)

    args = *(randn(S, 2, 16) + number for number in range(3)), torch.tensor([0, S - 4], dtype=torch.int32)
    out, (attention,) = run(Packed(), *args, options={**ALL, "grid": GRID, "text": (0, WORDS)})
    assert (attention.reason, attention.grid) == (None, GRID)
    torch.testing.assert_close(out, Packed()(*args), rtol=1e-4, atol=1e-5)


def of_two(valid: Tensor, b: int, s: int) -> Tensor:
    """A sequence for each sample, as long as the data say."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), (valid.sum(1) + N).cumsum(0)]).int()


def in_the_video(valid: Tensor, b: int, s: int) -> Tensor:
    starts, words = in_turn(valid, b, s), valid.sum(1)
    starts[1] = words[0] + N // 2
    return starts


def before_the_text(valid: Tensor, b: int, s: int) -> Tensor:
    starts = in_turn(valid, b, s)
    starts[1] = s - valid[0].sum() - N
    return starts


def through_a_view(valid: Tensor, b: int, s: int) -> Tensor:
    starts = in_turn(valid, b, s)
    starts.view(1, -1)[0, 1] = 7
    return starts


def through_an_unknown_place(valid: Tensor, b: int, s: int) -> Tensor:
    starts = in_turn(valid, b, s)
    starts[valid[0, :1].long() + 1] = 7
    return starts


def not_at_the_ends(valid: Tensor, b: int, s: int) -> Tensor:
    starts = in_turn(valid, b, s)
    starts[2] = s - 1
    return starts


def of_all_tokens(valid: Tensor, b: int, s: int) -> Tensor:
    """Lengths from a mask of all tokens, of which nothing says that the video's count."""
    starts, lengths = in_turn(valid, b, s), valid.repeat(1, S // WORDS).sum(1)
    for i in range(b):
        starts[2 * i + 1] = lengths[i] + i * s
    return starts


def negative(valid: Tensor, b: int, s: int) -> Tensor:
    starts = in_turn(valid, b, s)
    starts[1] = valid[0].sum() * -1 + N
    return starts


def negative_on_the_way(valid: Tensor, b: int, s: int) -> Tensor:
    starts, words = in_turn(valid, b, s), valid[0].sum()
    starts[1] = torch.add(words, words, alpha=-3) + N
    return starts


@pytest.mark.parametrize(
    ("starts", "why"),
    [
        (of_two, "packed sequences that are not provably one"),
        (in_the_video, "packed sequences of 780 tokens, 396 of which may be padding"),
        (before_the_text, "packed sequences, whose lengths are known at run time only"),
        (through_a_view, "packed sequences, whose lengths are known at run time only"),
        (through_an_unknown_place, "packed sequences, whose lengths are known at run time only"),
        (not_at_the_ends, "packed sequences that are not provably one"),
        (of_all_tokens, "packed sequences of 780 tokens, 780 of which may be padding"),
        (lambda valid, b, s: in_turn(valid, b, s)[None], "packed sequences whose starts are not in one row"),
        (negative, "packed sequences, whose lengths are known at run time only"),
        (negative_on_the_way, "packed sequences, whose lengths are known at run time only"),
    ],
)
def test_what_stays_dense(starts, why):
    model, args = Joint(starts).eval(), (*inputs(2), valid([5, 8]))
    out, attentions = run(model, *args)
    assert [(a.tokens, str(a.reason)[: len(why)]) for a in attentions] == [(S, why)] * 2
    with torch.no_grad():
        torch.testing.assert_close(out, model(*args))


def test_lengths_from_a_mask_of_integers_may_be_negative():
    why = "packed sequences, whose lengths are counted from integers that may be negative"
    assert reasons(Joint(in_turn), *inputs(2), valid([5, 8]).long()) == [why] * 2


@pytest.mark.usefixtures("fresh_dynamo")
def as_told(told: Tensor, b: int, s: int) -> Tensor:
    """Made by other code, as where blocks are compiled by themselves."""
    return told


def counted() -> Iterator[tuple[Tensor, bool]]:
    """Counts, and whether they are believed; two calls differ in what counts, or in their first word's sign only."""
    count = valid([5, 8]).long()
    negative = count - 200 * (torch.arange(WORDS) == 0)  # ends in the middle of the video
    yield from ((count, True), (valid([0, 12]).long(), True), (negative, False), (0 * count, True))


def told() -> Iterator[tuple[Tensor, bool]]:
    """Places, and whether they are believed to be those of samples and their padding."""
    places = in_turn(valid([5, 8]), 2, S)
    yield from ((places, True), (in_turn(valid([0, 12]), 2, S), True))
    for number, place in ((1, S // 2), (1, S + 1), (2, S - 1), (3, S), (4, 2 * S - 1)):
        others = places.clone()
        others[number] = place
        yield others, False
    yield places, True


@pytest.mark.parametrize(
    ("starts", "calls", "why"),
    [
        (at_once, counted, "are counted from integers that may be negative"),
        (as_told, told, "are an input of the graph"),
    ],
)
def test_what_integers_hold_is_asked_in_every_call(starts, calls, why):
    """Compiled once for each of both answers."""
    model, (video, text) = Joint(starts).eval(), inputs(2)
    compiled = torch.compile(model, backend="rainfusion", options=ALL)
    with torch.no_grad():
        for integers, sparse in calls():
            with rainfusion_compile.observe() as report:
                out = compiled(video, text, integers)
            torch.testing.assert_close(out, model(video, text, integers), rtol=1e-4, atol=1e-5)
            entries = report.to_dict()["attentions"]
            assert [entry["status"] for entry in entries] == ["sparse" if sparse else "dense"] * 2
            assert {entry["reason"] for entry in entries} == {
                None if sparse else f"packed sequences, whose lengths {why}"
            }


@pytest.mark.usefixtures("fresh_dynamo")
def test_integers_are_believed_in_graphs_of_other_sizes_too():
    """The second size makes a graph of any size, in which no spelling but SDPA is understood."""
    model, words = Joint(in_turn).eval(), valid([5]).long()
    compiled = torch.compile(model, backend="rainfusion", options=ALL)
    for grid in ((T, H, W), (T, W, H), (T, H, W)):
        time, height, width = grid
        video, text = randn(1, 4, time, 2 * height, 2 * width), randn(1, WORDS, 32)
        with torch.no_grad(), rainfusion_compile.observe() as report:
            torch.testing.assert_close(compiled(video, text, words), model(video, text, words), rtol=1e-4, atol=1e-5)
        entries = report.to_dict()["attentions"]
        assert [(entry["status"], tuple(entry["grid"])) for entry in entries] == [("sparse", grid)] * 2


def test_causal_packed_sequences_stay_dense():
    assert reasons(Joint(in_turn, causal=True), *inputs(2), valid([5, 8])) == ["causal"] * 2


def test_the_log_tells_of_packed_sequences_that_stay_dense(caplog):
    run(Joint(of_two), *inputs(2), valid([6, 9]))
    assert "0 of 2 video self-attentions sparse: packed sequences that are" in caplog.text
