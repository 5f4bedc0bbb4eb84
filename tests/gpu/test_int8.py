# SPDX-License-Identifier: Apache-2.0
"""On a Hopper GPU: attention whose queries and keys are multiplied as integers, against the same in float64."""

import pytest
import torch

from rainfusion_compile.kernels import operators, reference
from rainfusion_compile.kernels.checks import INT8_NEEDS
from rainfusion_compile.sparsity.block_tables import block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import BY_NAME, PATTERNS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
LAYOUT, HEADS, KV_HEADS, SCALE = VideoLayout((6, 17, 23), (8, 41)), 6, 3, 128**-0.5


def inputs(dtype=torch.bfloat16, *, heads=HEADS, scale=1.0, layout=LAYOUT, batch=2):
    """Keys of a head have a mean of their own, and heads different sizes."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, layout.tokens, count, 128, device="cuda", generator=generator)
        for count in (heads, heads // 2, heads // 2)
    )
    k = scale * (k + 2 * torch.randn(1, 1, heads // 2, 128, device="cuda", generator=generator))
    q = q * torch.arange(1, heads + 1, device="cuda")[:, None] / heads
    return [x.to(dtype).transpose(1, 2) for x in (q, k, v)]


def tables_of(sampled=False, layout=LAYOUT):
    patterns = tuple(BY_NAME) if sampled else PATTERNS
    device = torch.device("cuda")
    return block_tables(layout, sparsity=(0.6, 0.3), patterns=patterns, sampled=sampled, int8=True, device=device)


def rounded(q, k, order):
    """Queries, 64 rows of `order` at a time, and keys without their mean, as the kernel rounds them: float32."""
    q, k = q.float(), k.float()
    k = k - k.mean(2, keepdim=True)
    steps = k.abs().amax((2, 3), keepdim=True) / 127
    k, out = (k / steps).round() * steps, torch.empty_like(q)
    for rows in order.long().split(64):
        steps = (q[:, :, rows].abs().amax((2, 3), keepdim=True) / 127).clamp_min(1e-30)
        out[:, :, rows] = (q[:, :, rows] / steps).round() * steps
    return out, k


def choices(tables, *, drawn=True):
    """Every candidate, and dense attention; without `drawn`, none whose samples depend on the queries' bits."""
    patterns = enumerate((*tables.patterns, "dense"))
    numbers = [number for number, name in patterns if drawn or name != "textural"]
    numbers = torch.tensor(numbers, device="cuda", dtype=torch.int32).repeat(2 * HEADS)
    return numbers[: 2 * HEADS].view(2, HEADS)


def masks(kind, tokens=LAYOUT.tokens):
    generator = torch.Generator("cuda").manual_seed(1)
    if kind == "bool":
        return torch.rand(2, 1, tokens, device="cuda", generator=generator) > 0.2
    return torch.randn(1, HEADS, tokens, device="cuda", generator=generator) if kind == "additive" else None


def distance(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [SCALE, -SCALE, 3 * SCALE])
def test_what_comes_out_is_that_of_rounded_queries_and_keys(dtype, mask, scale):
    tables, (q, k, v) = tables_of(), inputs(dtype)
    key_mask, choice = masks(mask), choices(tables, drawn=False)
    out = operators.block_sparse_attention(q, k, v, choice, key_mask, *tables.attention_arguments, scale)
    about = (v, choice, key_mask, tables.attention_arguments, scale)
    meant = reference.block_sparse_attention(*rounded(q, k, tables.order), *about)
    exact = reference.block_sparse_attention(q, k, *about)
    assert distance(out, meant) < (6e-3 if dtype == torch.bfloat16 else 2e-3)
    assert 4e-3 < distance(out, exact) < 0.06  # rounding was at work, and is as small as it should be


@pytest.mark.parametrize("sampled", [False, True])
def test_heads_read_what_they_read_otherwise(sampled):
    """Samples, selected blocks and what draws depend on are those of queries and keys as they are."""
    tables, (q, k, v) = tables_of(sampled), inputs()
    choice = choices(tables)
    out = operators.block_sparse_attention(q, k, v, choice, None, *tables.attention_arguments, SCALE)
    other = operators.block_sparse_attention(
        q, k, v, choice, None, *tables.attention_arguments._replace(int8=False), SCALE
    )
    assert distance(out, other) < 0.05


def test_a_query_that_is_no_number_stays_alone_and_keys_of_zeros_are_fine():
    tables, (q, k, v) = tables_of(), inputs()
    k[:, 0] = 0
    choice = torch.full_like(choices(tables), len(tables.patterns))
    arguments = tables.attention_arguments
    fine = operators.block_sparse_attention(q, k, v, choice, None, *arguments, SCALE)
    assert distance(fine[:, :2], v[:, :1].float().mean(2, keepdim=True).expand_as(fine[:, :2])) < 0.01
    q[0, 3, 77, 5], q[0, 3, 200] = float("nan"), float("inf")
    out = operators.block_sparse_attention(q, k, v, choice, None, *arguments, SCALE)
    broken = torch.zeros_like(out, dtype=torch.bool)
    broken[0, 3, [77, 200]] = True
    assert out[broken].isnan().all()
    assert distance(out[~broken], fine[~broken]) < 0.01


@pytest.mark.parametrize("size", [0.5, 1.0, 2.0])
def test_errors_count_what_rounding_does(size):
    """The ARM's errors are higher by what rounding adds to dense attention, within a factor."""
    tables, (q, k, v) = tables_of(), inputs(scale=size)
    limits = torch.tensor([[0.3, 0.0]], device="cuda")
    choice, errors, _ = operators.arm_probe(q, k, v, None, *tables.probe_arguments, SCALE, True, limits)
    exact = tables.probe_arguments._replace(int8=False)
    other, without, _ = operators.arm_probe(q, k, v, None, *exact, SCALE, True, limits)
    more = (errors - without)[..., :-1]
    alike = more[..., :1].expand_as(more)
    torch.testing.assert_close(more, alike, rtol=0.02, atol=1e-6 * float(errors.max()))  # a difference of large numbers
    assert torch.equal(errors[..., -1], without[..., -1])
    samples = tables.samples.long()
    dense = torch.full_like(choice, len(tables.patterns))
    arguments = tables.attention_arguments
    one, meant = (
        reference.block_sparse_attention(*both, v, dense, None, arguments, SCALE)[:, :, samples]
        for both in (rounded(q, k, tables.order), (q, k))
    )
    true = (one - meant).square().sum((2, 3))
    ratio = float((more[..., 0].sum() / true.sum()).sqrt())
    assert 0.7 < ratio < 1.4
    tables_density = torch.nn.functional.pad(tables.density, (0, 1), value=1.0)
    assert tables_density[choice.long()].sum() >= tables_density[other.long()].sum()


def test_a_budget_that_rounding_spends_leaves_all_heads_dense():
    tables, (q, k, v) = tables_of(), inputs()
    limits = torch.tensor([[1e-3, 0.0]], device="cuda")
    choice, *_ = operators.arm_probe(q, k, v, None, *tables.probe_arguments, SCALE, True, limits)
    assert bool((choice == len(tables.patterns)).all())


def test_where_it_cannot_be_the_error_says_what_it_needs():
    tables, (q, k, v) = tables_of(), inputs()
    for some in ([x[..., :64] for x in (q, k, v)], [x.float() for x in (q, k, v)]):
        with pytest.raises(ValueError, match=INT8_NEEDS[:40].replace("(", r"\(")):
            operators.block_sparse_attention(*some, choices(tables), None, *tables.attention_arguments, SCALE)


@pytest.mark.inductor
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_takes_it_as_an_option(dynamic):
    layout = VideoLayout((8, 16, 24))
    q, k, v = inputs(layout=layout, batch=1)

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    given = {"grid": layout.grid, "min_tokens": 0, "error": 0.2, "strict": True}
    outputs = []
    for precision in ("full", "int8"):
        torch.compiler.reset()
        options = given | {"precision": precision}
        model = torch.compile(attend, backend="rainfusion", dynamic=dynamic, options=options)
        with torch.no_grad():
            outputs.append(model(q, k, v))
    dense = attend(q, k, v)
    full, integers = (distance(one, dense) for one in outputs)
    assert not torch.equal(*outputs)
    assert max(full, integers) < 0.25
