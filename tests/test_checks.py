# SPDX-License-Identifier: Apache-2.0
"""What the operators refuse: an error that names the argument, before any engine sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strategies import OperatorCall, by_error, by_recall
from torch import Tensor
from torch.autograd import forward_ad

import rainfusion_compile
from rainfusion_compile.kernels import operators as ops
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.layout_codec import NO_VIDEO, encode
from rainfusion_compile.sparsity.patterns import PATTERNS

LAYOUT = VideoLayout((9, 9, 5), (4, 9))
TABLES = block_tables(LAYOUT, sparsity=0.5, patterns=PATTERNS, block_q=16, block_k=8)
TOKENS = LAYOUT.tokens


def make_case(heads: int = 2, kv_heads: int = 2, dim: int = 16) -> OperatorCall:
    q, k, v = (torch.randn(1, count, TOKENS, dim) for count in (heads, kv_heads, kv_heads))
    return OperatorCall(TABLES, q, k, v, None, torch.zeros(1, heads, dtype=torch.int32), 0.25)


def attend(case: OperatorCall) -> Tensor:
    return rainfusion_compile.attention(
        case.q, case.k, case.v, grid=LAYOUT.grid, text=LAYOUT.text, key_mask=case.key_mask, scale=case.scale
    )


def call_video(case: OperatorCall, row: tuple[int, ...] = encode(LAYOUT), **options: Any) -> Any:
    given: dict[str, Any] = {"sparsity": [0.6], "patterns": "spatial,temporal", "int8": False, "scale": 0.25}
    given |= dict(zip(("by_error", "limits"), by_recall(0.9, 0.1), strict=True))
    return ops.video_attention(case.q, case.k, case.v, case.key_mask, torch.tensor(row), *(given | options).values())


CALLS = {
    "attention": attend,
    "probe": lambda case: ops.arm_probe(*case.probe_args(), *by_error(0.05)),
    "sparse": lambda case: ops.block_sparse_attention(*case.attention_args()),
    "video": call_video,
    "no video": lambda case: call_video(case, NO_VIDEO),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def replaced(case: OperatorCall, change: dict[str, Any]) -> OperatorCall:
    for name, value in change.items():
        setattr(case, name, value(getattr(case, name)))
    return case


@every_call
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Tensor.double, "k": Tensor.double, "v": Tensor.double}, "q must be of dtype bfloat16, float16, float32"),
        ({"q": Tensor.int, "k": Tensor.int, "v": Tensor.int}, "q must be of dtype .* got torch.int32"),
        ({"q": Tensor.cfloat, "k": Tensor.cfloat, "v": Tensor.cfloat}, "q must be of dtype .* got torch.complex64"),
        ({"k": Tensor.half}, "one dtype"),
        ({"k": lambda k: k.to("meta"), "v": lambda v: v.to("meta")}, "k is on meta, q on cpu"),
        ({"q": lambda q: q.to("meta")}, "k is on cpu, q on meta"),
        ({"k": lambda k: torch.cat([k, k], 2), "v": lambda v: torch.cat([v, v], 2)}, r"q must be \[B, H, S, D\]"),
        ({"k": lambda k: k[:, :0], "v": lambda v: v[:, :0]}, "at least one head"),
        *(
            ({name: (lambda x, dim=dim: x.new_zeros(*x.shape[:3], dim)) for name in "qkv"}, f"head_dim .* got {dim}")
            for dim in (0, 1, 8, 12, 257, 264)
        ),
        ({"key_mask": lambda _: torch.ones(1, 1, TOKENS, dtype=torch.int64)}, r"key_mask .* pass key_mask.bool\(\)"),
        ({"key_mask": lambda _: torch.ones(1, 1, TOKENS, dtype=torch.uint8)}, r"key_mask .* pass key_mask.bool\(\)"),
        ({"key_mask": lambda _: torch.ones(1, 1, TOKENS - 1) > 0}, "key_mask must be"),
        ({"key_mask": lambda _: torch.ones(1, 3, TOKENS) > 0}, "key_mask must be"),
        ({"key_mask": lambda _: torch.ones(1, 1, TOKENS, device="meta") > 0}, "key_mask is on meta"),
    ],
)
def test_operands_that_no_engine_takes(call, change, message):
    with pytest.raises(ValueError, match=message):
        call(replaced(make_case(), change))


@every_call
@pytest.mark.parametrize("scale", [-0.25, 0.0])
def test_any_scale_is_that_of_dense_attention(call, scale):
    case = replaced(make_case(), {"scale": lambda _: scale})
    case.choice.fill_(len(TABLES.patterns))
    call(case)
    out = ops.block_sparse_attention(*case.attention_args())
    torch.testing.assert_close(out, F.scaled_dot_product_attention(case.q, case.k, case.v, scale=scale))


@every_call
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tangents_and_gradients_are_refused_rather_than_lost(call, name):
    with torch.no_grad(), forward_ad.dual_level():
        call(make_case())  # an open level alone is no reason
        with pytest.raises(NotImplementedError, match="jvp"):
            call(replaced(make_case(), {name: lambda x: forward_ad.make_dual(x, torch.ones_like(x))}))

    def of(x: Tensor) -> Tensor:
        out = call(replaced(make_case(), {name: lambda _: x}))
        return out if isinstance(out, Tensor) else next(o for o in out if o.is_floating_point())

    x = torch.randn(1, 2, TOKENS, 16)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(of, (x,), (x,))
    with pytest.raises(NotImplementedError, match="inference"):
        of(x.requires_grad_()).sum().backward()


INDEX = torch.tensor(3)


def test_the_tables_have_samples_of_several_phases():
    assert bool((TABLES.sampled[:, :2] > 1).all(1).any())


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("order", lambda x: x[:-1]),
        ("order", lambda x: x.long()),
        ("order", lambda x: x.index_fill(0, INDEX, 5)),
        ("order", lambda x: x.index_fill(0, INDEX, -1)),
        ("order", lambda x: x.index_fill(0, INDEX, TOKENS)),
        ("order", lambda x: x.to("meta")),
        ("order", lambda x: torch.stack([x, x], 1)[:, 0]),
        ("key_order", lambda x: x[:-1]),
        ("key_order", lambda x: x[-8:]),
        ("key_order", lambda x: x.flip(0)),
        ("key_order", lambda x: x.index_fill(0, INDEX, -1)),
        ("key_order", lambda x: x.index_fill(0, INDEX, int(x[4]))),  # twice in what a row samples in one phase
        ("key_order", lambda x: x.index_fill(0, INDEX - 200 + len(x), 7)),
        ("rows", lambda x: x[:, :-1]),
        ("rows", lambda x: x - 1),
        ("rows", lambda x: x + 1),
        ("rows", lambda x: x[:0]),
        ("row_ptr", lambda x: x + 1),
        ("row_ptr", lambda x: x - 1),
        ("row_ptr", lambda x: x.flip(0)),
        ("row_ptr", lambda x: x.index_fill(0, INDEX, 10**6)),
        ("row_ptr", lambda x: x[:1]),
        ("indices", lambda x: x - 1),
        ("indices", lambda x: x + 1),
        ("indices", lambda x: x.index_fill(0, INDEX, 0)),
        ("indices", lambda x: x.float()),
        ("indices", lambda x: x[:0]),
        ("sampled", lambda x: x + 1),
        ("sampled", lambda x: x - 1),
        ("sampled", lambda x: x * 0),
        ("sampled", lambda x: x + torch.tensor([0, 10**6, 0, 0, 0], dtype=torch.int32)),
        ("sampled", lambda x: x[:, :2].contiguous()),
        ("sampled", lambda x: x[:-1]),
        ("sampled", lambda x: x.long()),
        ("selected", lambda x: torch.ones(1, dtype=torch.int32)),
        ("free", lambda x: x + 2),
        ("free", lambda x: x[:-1]),
        ("weight", lambda x: x[:-1]),
        ("weight", lambda x: x.double()),
        ("weight", lambda x: x.to("meta")),
        ("block_q", lambda _: 0),
        ("block_k", lambda _: -8),
    ],
)
def test_attention_tables_that_fit_nothing(field, change):
    case, tables = make_case(), TABLES.attention_arguments
    wrong = tables._replace(**{field: change(getattr(tables, field))})
    with pytest.raises(ValueError, match=field):
        ops.block_sparse_attention(case.q, case.k, case.v, case.choice, None, *wrong, 0.25)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("order", lambda x: x.index_fill(0, INDEX, 5)),
        ("samples", lambda x: x - TOKENS),
        ("samples", lambda x: x + TOKENS),
        ("samples", lambda x: x[:0]),
        ("samples", lambda x: x.to("meta")),
        ("keys", lambda x: x - TOKENS),
        ("keys", lambda x: x[:-1]),
        ("keys", lambda x: x.double()),
        ("stride", lambda _: 0),
        ("stride", lambda _: 3),
        ("sample_blocks", lambda x: x - 1000),
        ("sample_blocks", lambda x: x[:-1]),
        ("selected", lambda x: torch.ones(1, dtype=torch.int32)),
        ("free", lambda x: x - 1),
        ("block_q", lambda _: 0),
        ("sample_keep", lambda x: x[:, :-1]),
        ("sample_keep", lambda x: x.byte()),
        ("excess", lambda x: x[:-1]),
        ("excess", lambda x: x[:, :-1]),
        ("excess", lambda x: x.to("meta")),
        ("excess", lambda x: x.double()),
        ("directions", lambda x: x[:-1]),
        ("directions", lambda x: x.half()),
        ("density", lambda x: x[:0]),
        ("density", lambda x: x.repeat(11)),
        ("density", lambda x: x.double()),
        ("block_k", lambda _: 0),
    ],
)
def test_probe_tables_that_fit_nothing(field, change):
    case, tables = make_case(), TABLES.probe_arguments
    wrong = tables._replace(**{field: change(getattr(tables, field))})
    with pytest.raises(ValueError, match=field):
        ops.arm_probe(case.q, case.k, case.v, None, *wrong, 0.25, *by_recall(0.9, 0.1))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("sampled", lambda x: x + torch.tensor([1, 0, 0, 0, 0], dtype=torch.int32)),
        ("sampled", lambda x: x + torch.tensor([0, 0, 0, 10**4, 0], dtype=torch.int32)),
        ("sampled", lambda x: x - torch.tensor([0, 0, 0, 10**4, 0], dtype=torch.int32)),
        ("sampled", lambda x: x + torch.tensor([0, 1, 0, 0, 0], dtype=torch.int32)),
        ("selected", lambda x: x + 1),
        ("selected", lambda x: x[:0]),
        ("free", lambda x: 1 - x),
        ("free", lambda x: x * 0),
        ("indices", lambda x: x.index_fill(0, INDEX - 3, 200)),
    ],
)
def test_selections_that_fit_nothing(field, change):
    made = block_tables(LAYOUT, sparsity=0.3, patterns=("adaptive",), block_q=16, block_k=8)
    assert len(made.selected)
    case, tables = make_case(), made.attention_arguments
    ops.block_sparse_attention(case.q, case.k, case.v, case.choice, None, *tables, 0.25)
    wrong = tables._replace(**{field: change(getattr(tables, field))})
    with pytest.raises(ValueError, match=f"{field}|sampled|indices|selected"):
        ops.block_sparse_attention(case.q, case.k, case.v, case.choice, None, *wrong, 0.25)


def test_samples_of_less_than_four_keys_where_heads_select_blocks():
    made = block_tables(LAYOUT, sparsity=0.3, patterns=("adaptive",), block_q=16, block_k=8)
    case, sampled = make_case(), made.sampled.clone()
    sampled[sampled[:, 2] > 0, 1] = 4  # granules of two keys; kernels on a GPU read four at a time
    wrong = made.attention_arguments._replace(sampled=sampled)
    with pytest.raises(ValueError, match="phases that divide block_k / 4 = 2"):
        ops.block_sparse_attention(case.q, case.k, case.v, case.choice, None, *wrong, 0.25)


@pytest.mark.parametrize("shape", [(2,), (1, 1), (3, 2), (1, 3)])
@pytest.mark.parametrize("name", ["probe", "video", "no video"])
def test_limits_of_another_shape(name, shape):
    with pytest.raises(ValueError, match=r"limits must be \[\d, 2\] for these queries"):
        limited(name, torch.zeros(shape))


@pytest.mark.parametrize("limits", [torch.tensor([[float("nan"), 0.0]]), torch.tensor([[0.1, float("nan")]])])
@pytest.mark.parametrize("name", ["probe", "video", "no video"])
def test_limits_that_are_no_numbers(name, limits):
    with pytest.raises(ValueError, match="limits must be numbers; got"):
        limited(name, limits)


def limited(name: str, limits: Tensor) -> Any:
    case = make_case()
    if name == "probe":
        return ops.arm_probe(*case.probe_args(), True, limits)
    return call_video(case, NO_VIDEO if name == "no video" else encode(LAYOUT), by_error=True, limits=limits)


@pytest.mark.parametrize(
    "change",
    [lambda x: x - 1, lambda x: x + 4, lambda x: x[:, :1], lambda x: x[0], lambda x: x.long(), lambda x: x.to("meta")],
)
def test_choices_that_name_no_pattern(change):
    with pytest.raises(ValueError, match="choice"):
        ops.block_sparse_attention(*replaced(make_case(), {"choice": change}).attention_args())


def test_tables_of_another_number_of_tokens():
    other = block_tables(VideoLayout((9, 9, 4), (4, 9)), sparsity=0.6, patterns=PATTERNS, block_q=16, block_k=8)
    case = replaced(make_case(), {"tables": lambda _: other})
    for call in (CALLS["sparse"], CALLS["probe"]):
        with pytest.raises(ValueError, match="order"):
            call(case)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": "spatail"}, "did you mean 'spatial'"),
        ({"patterns": ""}, "unknown pattern"),
        ({"sparsity": [2.0]}, "sparsity must be"),
        ({"sparsity": [0.5, float("nan")]}, "sparsity must be"),
        ({"sparsity": []}, "sparsity must be"),
    ],
)
@pytest.mark.parametrize("row", [encode(LAYOUT), NO_VIDEO], ids=["video", "no video"])
def test_video_attention_refuses_what_options_refuse(options, message, row):
    with pytest.raises(ValueError, match=message):
        call_video(make_case(), row, **options)


@pytest.mark.parametrize("change", [lambda x: x.float(), lambda x: x.to("meta"), lambda x: x[None], lambda x: x.int()])
def test_rows_that_are_no_numbers_on_the_host(change):
    case, row = make_case(), change(torch.tensor(encode(LAYOUT)))
    with pytest.raises(ValueError, match="layout must be"):
        ops.video_attention(case.q, case.k, case.v, None, row, [0.6], "spatial", False, 0.25, *by_error(0.1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patterns": 3}, ValueError, "patterns must be a sequence"),
        ({"patterns": "spatial"}, ValueError, "patterns must be a sequence .* got 'spatial'"),
        ({"scale": "x"}, TypeError, "scale must be a number"),
        ({"key_mask": [True]}, TypeError, "key_mask must be a tensor"),
        ({"key_mask": torch.tensor(True)}, ValueError, "key_mask must be"),
    ],
)
def test_the_function_names_what_is_no_such_thing(change, error, message):
    case = make_case()
    with pytest.raises(error, match=message):
        rainfusion_compile.attention(case.q, case.k, case.v, grid=LAYOUT.grid, text=LAYOUT.text, **change)
    with pytest.raises(TypeError, match="k must be a tensor"):
        rainfusion_compile.attention(case.q, None, case.v, grid=LAYOUT.grid, text=LAYOUT.text)


@every_call
def test_an_empty_batch_is_nothing_to_do(call):
    out = call(replaced(make_case(), {name: (lambda x: x[:0]) for name in ("q", "k", "v", "choice")}))
    assert (out if isinstance(out, Tensor) else out[0]).numel() == 0
