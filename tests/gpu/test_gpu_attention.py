# SPDX-License-Identifier: Apache-2.0
"""On a CUDA device: the Triton kernels against the reference at real shapes, and the whole backend, CUDA graphs too."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from strategies import by_error, by_recall, lists_of_the_gpu, tolerance

import rainfusion_compile
from benchmarks.attention.structured import structured_qk
from rainfusion_compile.kernels import operators, reference
from rainfusion_compile.kernels.cpu import choose_by_error
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import BY_NAME, PATTERNS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.inductor,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# name: (grid, text, heads, head_dim, has a key mask), as in the models' real use
SHAPES = {
    "wan_1.3b_480p": ((21, 30, 52), (0, 0), 12, 128, False),
    "wan_14b_720p": ((21, 45, 80), (0, 0), 40, 128, False),
    "hunyuan_720p": ((33, 45, 80), (0, 256), 24, 128, True),
    "hunyuan_1.5_480p": ((31, 30, 53), (0, 1256), 16, 128, True),
    "cogvideox_5b": ((13, 30, 45), (226, 0), 48, 64, False),
    "cogvideox_1.5_5b": ((11, 48, 85), (226, 0), 48, 64, False),
    "open_sora_plan_720p": ((24, 45, 80), (0, 0), 24, 96, True),
    "mochi": ((28, 30, 53), (0, 256), 24, 128, False),
    "ltx_2": ((16, 22, 40), (0, 0), 32, 128, False),
    "minimax_h3": ((37, 24, 42), (512, 0), 56, 128, False),
    "kandinsky_5": ((31, 32, 48), (0, 0), 32, 128, False),
    "cosmos_2": ((24, 44, 80), (0, 0), 32, 128, False),
}


def make(grid, text, heads, head_dim, masked, *, dtype=torch.bfloat16, batch=1, sparsity=0.64, sampled=True):
    layout = VideoLayout(grid, text)
    patterns = tuple(BY_NAME) if sampled else PATTERNS
    tables = block_tables(layout, sparsity=sparsity, patterns=patterns, sampled=sampled, device=torch.device("cuda"))
    assert bool((tables.sampled[:, 0] > 0).any()), "nothing is sampled"
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, layout.tokens, heads, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", generator=generator).to(dtype).permute(0, 2, 1, 3) for _ in range(3))
    key_mask = None
    if masked:
        key_mask = torch.ones(batch, 1, layout.tokens, dtype=torch.bool, device="cuda")
        key_mask[:, :, layout.tokens - max(1, layout.tokens // 50) :] = False
    choice = torch.randint(
        0, len(tables.patterns) + 1, (batch, heads), dtype=torch.int32, device="cuda", generator=generator
    )
    return tables, q, k, v, key_mask, choice


def attend(tables, q, k, v, key_mask, choice, engine=operators):
    arguments, scale = tables.attention_arguments, q.shape[-1] ** -0.5
    if engine is operators:
        return operators.block_sparse_attention(q, k, v, choice, key_mask, *arguments, scale)
    lists = lists_of_the_gpu(q, k, choice, key_mask, arguments, scale)
    return reference.block_sparse_attention(q, k, v, choice, key_mask, arguments, scale, lists)


def probe_args(tables, q, k, v, key_mask, *, flat=True):
    arguments = tables.probe_arguments
    return (q, k, v, key_mask, *(arguments if flat else (arguments,)), q.shape[-1] ** -0.5)


def check_probe(tables, q, k, v, key_mask):
    """Errors are those of values that are seen in the probe's directions, but for the dense outputs' squares."""
    choice, errors, recall = operators.arm_probe(*probe_args(tables, q, k, v, key_mask), *by_error(0.05, "cuda"))
    wanted, shares = reference.arm_errors(*probe_args(tables, q, k, v, key_mask, flat=False), tables.directions)
    torch.testing.assert_close(recall.double(), shares, atol=4e-3, rtol=0)
    scale = wanted[..., -1:].clamp_min(1e-9)
    torch.testing.assert_close(errors / scale, wanted / scale, atol=1e-2, rtol=4e-2, check_dtype=False)
    assert torch.equal(choice.cpu(), choose_by_error(errors.cpu(), tables.density.cpu(), 0.05))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("sampled", [True, False])
def test_scaled_down_shapes_match_the_reference(name, dtype, sampled):
    grid, text, _, head_dim, masked = SHAPES[name]
    small = tuple(max(1, round(size / 3)) for size in grid)
    text = tuple(size // 5 for size in text)
    tables, q, k, v, key_mask, choice = make(small, text, 3, head_dim, masked, dtype=dtype, batch=2, sampled=sampled)
    out = attend(tables, q, k, v, key_mask, choice)
    assert out.stride() == (out.shape[2] * 3 * head_dim, head_dim, 3 * head_dim, 1)
    want = attend(tables, q, k, v, key_mask, choice, reference)
    torch.testing.assert_close(out.double(), want, **tolerance(dtype))
    check_probe(tables, q, k, v, key_mask)


@pytest.mark.parametrize("name", ["wan_1.3b_480p", "cogvideox_5b"])
def test_full_size_matches_the_reference(name):
    tables, q, k, v, key_mask, choice = make(*SHAPES[name])
    out = attend(tables, q, k, v, key_mask, choice)
    some = slice(0, 4)
    want = attend(tables, q[:, some], k[:, some], v[:, some], key_mask, choice[:, some], reference)
    assert (out[:, some].double() - want).norm() / want.norm() < 5e-3
    check_probe(tables, q[:, some], k[:, some], v[:, some], key_mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_the_order_does_not_name_are_zeros(dtype):
    """Whatever memory held; no rewritten model has such tables, but anyone may call the operators."""
    tables, q, k, v, _, choice = make((7, 15, 23), (3, 50), 4, 64, False, dtype=dtype, batch=2)
    order = tables.order.clone()
    order[5::7] = order[4]
    named = torch.zeros_like(order, dtype=torch.bool)
    named[order.long()] = True
    poison = [torch.full_like(q, float("nan")) for _ in range(8)]
    del poison
    out = attend(dataclasses.replace(tables, order=order), q, k, v, None, choice)
    assert not out[:, :, ~named].any()
    assert out[:, :, named].isfinite().all()
    assert not named.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_that_grow_and_leap(masked, head_dim, dtype):
    """Weights become too large for their reference, in some rows and tiles; a few keys are far above all others."""
    tables, q, k, v, key_mask, choice = make((7, 15, 23), (3, 50), 4, head_dim, masked, dtype=dtype)
    tokens = k.shape[2]
    k = k * torch.linspace(0.05, 6, tokens, device="cuda", dtype=dtype)[:, None]
    k[:, :, 1000:1003] *= 20
    every = torch.full_like(choice, len(tables.patterns))
    for kinds in (choice, every):
        out = attend(tables, q, k, v, key_mask, kinds)
        want = attend(tables, q, k, v, key_mask, kinds, reference)
        torch.testing.assert_close(out.double(), want, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 96])
@pytest.mark.parametrize("above", [0.95, 1.05])
def test_scores_around_their_bound(above, head_dim, dtype):
    """Late keys whose scores are as far above the first as weights can be without a look at them, nearly or beyond."""
    tables, q, k, v, _, choice = make((7, 15, 23), (3, 50), 4, head_dim, False, dtype=dtype)
    tokens, scale = k.shape[2], head_dim**-0.5
    most = {torch.bfloat16: 64.0, torch.float16: 14.0}[dtype] * above * math.log(2)
    one = F.normalize(torch.ones(head_dim, device="cuda"), dim=0)
    # Scores are 0 but for some late keys along the one direction of all queries, of which one is the longest of all.
    q = (torch.zeros_like(q) + one * 8).to(dtype)
    k = torch.zeros_like(k)
    steps = torch.linspace(0.5, 1, 40, device="cuda")[:, None] * (most / (8 * scale)) * one
    k[:, :, tokens - 500 : tokens - 460] = steps.to(dtype)
    every = torch.full_like(choice, len(tables.patterns))
    for kinds in (choice, every):
        out = attend(tables, q, k, v, None, kinds)
        want = attend(tables, q, k, v, None, kinds, reference)
        torch.testing.assert_close(out.double(), want, **tolerance(dtype))


@pytest.mark.parametrize("mask", [None, "bool", "bias"])
@pytest.mark.parametrize("block_k", [16, 64, 96])
@pytest.mark.parametrize("head_dim", [72, 128])
def test_any_layout_and_key_block(head_dim, block_k, mask):
    """Queries, keys and values as slices, grouped and expanded heads, in one packed tensor, and a shared batch."""
    layout = VideoLayout((9, 14, 19), (3, 50))
    device, dtype = torch.device("cuda"), torch.float16
    tables = block_tables(layout, sparsity=(0.6, 0.4), patterns=tuple(BY_NAME), block_k=block_k, device=device)
    assert len(tables.selected)
    generator = torch.Generator("cuda").manual_seed(0)
    wide = torch.randn(3, 2, layout.tokens, 4, head_dim, device=device, dtype=dtype, generator=generator)
    key_mask = None
    if mask is not None:
        key_mask = torch.ones(2, 1, layout.tokens, dtype=torch.bool, device=device)
        key_mask[0, :, -20:], key_mask[1, :, 100:130] = False, False
        if mask == "bias":
            key_mask = torch.randn(2, 1, layout.tokens, device=device).masked_fill(~key_mask, -torch.inf)
    choice = torch.arange(8, device=device, dtype=torch.int32).view(2, 4) % (len(tables.patterns) + 1)
    choice[0, 1] = choice[1, 2] = int(tables.selected.argmax())
    packed = torch.randn(2, layout.tokens, 4, 3 * head_dim, device=device, dtype=dtype, generator=generator)
    q, k, v = wide.permute(0, 1, 3, 2, 4)
    calls = {
        "grouped": (q, k[:, :2], v[:, 2:]),
        "expanded": (q, k[:, :1].expand(-1, 4, -1, -1), v[:, 1:2].expand(-1, 4, -1, -1)),
        "packed": packed.transpose(1, 2).chunk(3, -1),
        "one batch": (q, k[:1].expand(2, -1, -1, -1), v),
        "contiguous": (q.contiguous(), k.contiguous(), v.contiguous()),
    }
    for name, call in calls.items():
        out = attend(tables, *call, key_mask, choice)
        want = attend(tables, *call, key_mask, choice, reference)
        torch.testing.assert_close(
            out.double(), want, **tolerance(dtype), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mask", [None, "first hidden", "far below"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [72, 96, 128])
def test_maxima_that_grow_from_tile_to_tile(head_dim, dtype, mask):
    """Sums are rescaled only where a maximum grew much: here it does, in some warps, and late for masked keys."""
    layout = VideoLayout((9, 14, 19), (3, 50))
    device = torch.device("cuda")
    tables = block_tables(layout, sparsity=(0.6, 0.4), patterns=tuple(BY_NAME), device=device)
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, 8, layout.tokens, head_dim)
    q, k, v = (torch.randn(shape, device=device, generator=generator) for _ in range(3))
    steep = torch.arange(layout.tokens, device=device) // 16 % 3 == 0  # in computing order: whole warps
    q[:, :, tables.order[steep].long(), 0] = 12 * head_dim**0.25
    k[..., 0] = torch.linspace(-1, 1, layout.tokens, device=device) * 5 * head_dim**0.25
    key_mask = None
    if mask == "first hidden":
        key_mask = (torch.arange(layout.tokens, device=device) >= 300)[None, None]
    elif mask == "far below":
        key_mask = torch.zeros(1, 1, layout.tokens, device=device)
        key_mask[..., :300] = -1e8
    choice = torch.arange(8, device=device, dtype=torch.int32)[None] % (len(tables.patterns) + 1)
    choice[0, 0] = int(tables.selected.argmax())
    args = (tables, q.to(dtype), k.to(dtype), v.to(dtype), key_mask, choice)
    torch.testing.assert_close(attend(*args).double(), attend(*args, reference), **tolerance(dtype))


@pytest.mark.parametrize("head_dim", [64, 128, 160])
def test_a_single_hidden_key_is_hidden_from_all_kinds_of_rows(head_dim):
    """Rows begin in extra blocks, in those of `order` or in runs, and look at the mask from different tiles on."""
    tables, q, k, v, _, _ = make((3, 14, 19), (3, 50), 8, head_dim, False)
    choice = torch.arange(8, device="cuda", dtype=torch.int32)[None] % (len(tables.patterns) + 1)
    blocks, tokens = tables.key_blocks, tables.layout.tokens
    extra = blocks[: len(blocks) - 2 * -(-tokens // tables.block_k)]
    assert extra, "no row begins in an extra block"
    for token in {0, tokens - 1, *(int(block[0]) for block in blocks[:: len(blocks) // 8]), int(extra[-1][-1])}:
        key_mask = (torch.arange(tokens, device="cuda") != token)[None, None]
        value = v.clone()
        value[:, :, token] = 3e4  # whoever sees it, shows it
        args = (tables, q, k, value, key_mask, choice)
        torch.testing.assert_close(attend(*args).double(), attend(*args, reference), **tolerance(torch.bfloat16))


def test_keys_repeated_for_all_tokens():
    tables, q, k, v, _, choice = make((3, 14, 19), (0, 0), 4, 128, False)
    k, v = k[:, :, :1].expand_as(k), v[:, :, :1].expand_as(v)
    want = attend(tables, q, k, v, None, choice, reference)
    torch.testing.assert_close(attend(tables, q, k, v, None, choice).double(), want, **tolerance(torch.bfloat16))


@pytest.mark.parametrize("chosen_by_error", [True, False])
def test_the_arm_names_structured_heads(chosen_by_error):
    """By recall, a head that looks everywhere stays dense; by error, a sample of what is everywhere will do."""
    layout = VideoLayout((21, 30, 52))
    device = torch.device("cuda")
    tables = block_tables(layout, sparsity=0.64, patterns=PATTERNS, sampled=chosen_by_error, device=device)
    kinds = ("spatial", "temporal", "textural", "uniform") * 3
    q, k = structured_qk(layout, kinds, head_dim=128)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)) + 1
    alone = (x.cuda().bfloat16().transpose(0, 1) for x in (q, k, v))  # a sample each, with all of its budget
    rule = by_error(0.02, "cuda") if chosen_by_error else by_recall(0.9, 0.8, "cuda")
    choice, _, _ = operators.arm_probe(*probe_args(tables, *alone, None), *rule)
    names = (*tables.patterns, "dense")
    everywhere = tables.patterns[0] if chosen_by_error else "dense"  # the sparsest
    assert [names[number] for number in choice[:, 0].tolist()] == ["spatial", "temporal", everywhere, everywhere] * 3


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
@pytest.mark.parametrize(
    "arm",
    [{"arm": "recall", "min_recall": 0.0, "patterns": ("spatial", "temporal")}, {"arm": "error", "error": 1.0}],
    ids=["recall", "error"],
)
def test_the_backend_on_the_device(mode, sparsity, arm):
    from small_video import Video

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Video(dim=128).cuda().bfloat16().eval()
    video = torch.randn(2, 3, 5, 46, 58, device="cuda", dtype=torch.bfloat16)
    options = {"sparsity": sparsity, "min_tokens": 0, **arm}
    if mode is not None:
        options["inductor_mode"] = mode
    compiled = torch.compile(model, backend="rainfusion", fullgraph=True, options=options)
    plain = torch.compile(model, backend="rainfusion", fullgraph=True, options={**options, "inductor_mode": "default"})
    with torch.no_grad(), rainfusion_compile.observe() as report:
        first = compiled(video).clone()
        for _ in range(3):  # warm-up, capture, replay
            again = compiled(video).clone()
            torch.testing.assert_close(again, first, rtol=2e-2, atol=2e-2)
        other = compiled(video * 0.5).clone()
        want = plain(video * 0.5)
        if "error" in arm:  # rounded otherwise, a head may draw another sample
            assert (other - want).float().norm() < 0.1 * want.float().norm()
        else:
            torch.testing.assert_close(other, want, rtol=2e-2, atol=2e-2)
    assert {entry["status"] for entry in report.to_dict()["attentions"]} == {"sparse"}
    if sparsity == 0.0:
        with torch.no_grad():
            torch.testing.assert_close(first, model(video), rtol=3e-2, atol=3e-2)


def test_eager_function_on_the_device():
    q, k, v = (torch.randn(1, 3 * 9 * 11, 2, 64, device="cuda").permute(0, 2, 1, 3) for _ in range(3))
    out = rainfusion_compile.attention(q, k, v, grid=(3, 9, 11), sparsity=0.0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("head_dim", [128, 40])  # the Hopper kernel and the portable one
def test_another_device_than_the_current_one(head_dim):
    tables, q, k, v, key_mask, choice = make((5, 14, 19), (0, 7), 4, head_dim, True)
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    there = [x.to(other) for x in (q, k, v, key_mask, choice)]
    out = attend(tables.to(other), *there)
    assert out.device == other
    torch.testing.assert_close(out.cpu(), attend(tables, q, k, v, key_mask, choice).cpu(), rtol=0, atol=0)
    options = {"grid": (5, 14, 19), "text": (0, 7), "sparsity": 0.6, "arm": "recall", "min_recall": 0.0}
    here = rainfusion_compile.attention(q, k, v, key_mask=key_mask, **options)
    out = rainfusion_compile.attention(*there[:3], key_mask=there[3], **options)
    torch.testing.assert_close(out.cpu(), here.cpu(), rtol=0, atol=0)
