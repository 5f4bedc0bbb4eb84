# SPDX-License-Identifier: Apache-2.0
"""The operator that takes its layout at run time, and the rows that layouts are written in."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import by_error, by_recall, layouts

from rainfusion_compile import attention
from rainfusion_compile.kernels import operators
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.candidates import most_candidates
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.layout_codec import NO_VIDEO, REST, TEXT, VIDEO, WIDTH, decode, encode
from rainfusion_compile.sparsity.patterns import PATTERNS

NAMES = ",".join(PATTERNS)


def inputs(layout, *, heads=2, kv_heads=2, mask=None):
    tokens = layout.tokens
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, count, tokens, 16, generator=generator) for count in (heads, kv_heads, kv_heads))
    key_mask = {
        None: None,
        "bool": torch.rand(2, 1, tokens, generator=generator) > 0.3,
        "additive": torch.randn(1, heads, tokens, generator=generator),
    }[mask]
    return q, k, v, key_mask


HALF = by_error(0.5)
CPU = torch.device("cpu")


def call(operands, row, rule=HALF, sparsity=(0.8, 0.5), patterns=NAMES):
    return torch.ops.rainfusion.video_attention(
        *operands, torch.tensor(row), list(sparsity), patterns, False, 0.25, *rule
    )


@given(layouts, st.sampled_from([None, 0, 1]))
def test_rows_say_what_the_layout_is(layout, rest):
    row = encode(layout, rest)
    assert len(row) == WIDTH
    assert decode(row, layout.tokens) == layout
    assert (REST in row) == (rest is not None)
    if rest is None:
        assert decode(row) == layout


def test_rows_of_no_video_and_of_nonsense():
    assert decode(NO_VIDEO, 10) is None
    layout = VideoLayout((2, 3, 4), (5, 0))
    for wrong in (layout.tokens + 1, layout.tokens - 1, 3):
        with pytest.raises(ValueError, match="tokens"):
            decode(encode(layout), wrong)
    with pytest.raises(ValueError, match="text"):
        decode(encode(layout, 0), 20)  # less than the video alone
    text, video, nothing = (TEXT, 3, 0, 0), (VIDEO, 1, 2, 3), (0, 0, 0, 0)
    rest = (TEXT, REST, 0, 0)
    for segments in ((text,), (text, text, video), (video, nothing, text), (rest, video, rest), ((3, 1, 2, 3),)):
        row = sum(segments, ())
        with pytest.raises(ValueError, match="no layout"):
            decode((*row, *NO_VIDEO[len(row) :]), 12)
    with pytest.raises(ValueError, match="no layout"):
        decode(encode(layout, 0))  # how long the rest is, nobody said
    with pytest.raises(ValueError, match="17 runs of tokens"):
        encode(VideoLayout(((1, 2, 3),) * 17))
    with pytest.raises(ValueError, match="numbers"):
        decode((VIDEO, 1, 2, 3), 6)


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("rest", [None, 0, 1])
@pytest.mark.parametrize(
    "options", [{"arm": "error", "error": 0.9}, {"arm": "recall", "recall_target": 0.95, "min_recall": 0.0}]
)
def test_it_does_what_the_two_operators_do(mask, kv_heads, rest, options):
    layout = VideoLayout((9, 14, 18), (3, 7))
    q, k, v, key_mask = operands = inputs(layout, kv_heads=kv_heads, mask=mask)
    made = Options(sparsity=(0.8, 0.5), **options)
    out, choice, errors, recall, row = call(
        operands, encode(layout, rest), made.rule(CPU), patterns=",".join(made.names)
    )
    grid = {"grid": layout.grid, "text": layout.text, "sparsity": (0.8, 0.5)} | options
    torch.testing.assert_close(out, attention(q, k, v, key_mask=key_mask, scale=0.25, **grid))
    tables = made.tables(layout)
    probed = torch.ops.rainfusion.arm_probe(q, k, v, key_mask, *tables.probe_arguments, 0.25, *made.rule(CPU))
    assert torch.equal(choice, probed[0])
    assert bool((choice < len(tables.patterns)).any()), "nothing was sparse"
    most = most_candidates(2, made.names)
    torch.testing.assert_close(errors, F.pad(probed[1], (0, most - len(tables.patterns))))
    torch.testing.assert_close(recall, F.pad(probed[2], (0, most - len(tables.patterns))))
    assert decode(row.tolist()) == layout


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_without_video_it_is_dense(mask, kv_heads):
    layout = VideoLayout((2, 5, 7))
    q, k, v, key_mask = operands = inputs(layout, kv_heads=kv_heads, mask=mask)
    out, choice, errors, recall, row = call(operands, NO_VIDEO)
    mask = None if key_mask is None else key_mask[:, :, None]
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out, dense)
    assert (choice == 6).all()  # two sparsities of three patterns
    assert errors.shape == (2, 2, 7)
    assert recall.shape == (2, 2, 6)
    assert not bool(errors.any() | recall.any())
    assert decode(row.tolist()) is None


def test_a_layout_of_other_tokens_is_an_error():
    operands = inputs(VideoLayout((2, 5, 7)))
    with pytest.raises(ValueError, match="70 tokens"):
        call(operands, encode(VideoLayout((2, 5, 8))))


@pytest.mark.parametrize(
    "row",
    [NO_VIDEO, encode(VideoLayout((2, 5, 7), (0, 3)), 1), encode(VideoLayout((1, 10, 7), (0, 3)))],
    ids=["dense", "video", "image"],
)
@pytest.mark.parametrize(("mask", "rule"), [(None, by_error(0.05)), ("bool", by_recall(0.95, 0.1))])
def test_opcheck(row, mask, rule):
    operands = inputs(VideoLayout((2, 5, 7), (0, 3)), mask=mask)
    torch.library.opcheck(
        operators.video_attention,
        (*operands, torch.tensor(row), [0.8, 0.5], "temporal,spatial", False, 0.25, *rule),
    )


def test_it_stays_out_of_cuda_graphs():
    """Its tables may be dropped from their cache, and its layout is read on the host."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.rainfusion.video_attention.default.tags
