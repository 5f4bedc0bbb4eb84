# SPDX-License-Identifier: Apache-2.0
"""Linear layers of libraries of quantization: tokens are followed through operators that treat each row by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from spelled import GRID, Video, latents, run
from torch import Tensor, nn

import rainfusion_compile
from rainfusion_compile.passes.provenance.rules import RULES

LIBRARY = torch.library.Library("quantized_layers", "DEF")
LIBRARY.define("linear(Tensor x, Tensor weight, Tensor scale) -> Tensor")
LIBRARY.define("weight_of(Tensor packed, Tensor scale) -> Tensor")
LIBRARY.define("scale_(Tensor(a!) x) -> Tensor(a!)")
LIBRARY.define("number(int n) -> Tensor")
LIBRARY.define("named(*, Tensor x) -> Tensor")
LIBRARY.define("pair(Tensor x, Tensor weight) -> (Tensor, Tensor)")
LIBRARY.impl("pair", lambda x, w: (F.linear(x, w), F.linear(x, w).flip(1)), "CompositeExplicitAutograd")
LIBRARY.impl("linear", lambda x, weight, scale: F.linear(x, weight * scale), "CompositeExplicitAutograd")
LIBRARY.impl("weight_of", lambda packed, scale: packed * scale, "CompositeExplicitAutograd")
NAME = "quantized_layers::linear"


class Quantized(nn.Module):
    """A linear layer whose weight has a scale for each row."""

    def __init__(self, plain: nn.Linear, whole: bool) -> None:
        super().__init__()
        self.whole, weight = whole, plain.weight.detach()
        scale = weight.abs().amax(1, keepdim=True)
        self.register_buffer("weight", weight / scale)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            return torch.ops.quantized_layers.linear(x, self.weight, self.scale)
        return F.linear(x, torch.ops.quantized_layers.weight_of(self.weight, self.scale))


def quantized(whole: bool) -> Video:
    model = Video(F.scaled_dot_product_attention)
    model.q, model.kv = Quantized(model.q, whole), Quantized(model.kv, whole)
    return model.eval()


@pytest.fixture
def declared() -> Iterator[None]:
    rainfusion_compile.row_wise(NAME)
    yield
    del RULES[NAME]


@pytest.mark.usefixtures("declared")
def test_an_operator_of_ones_own() -> None:
    model, x = quantized(whole=True), latents()
    out, found = run(model, x)
    assert [(one.status, one.grid) for one in found] == [("sparse", GRID)] * 2
    with torch.no_grad():
        torch.testing.assert_close(out, model(x))


def test_what_is_not_declared_stays_dense_and_is_named() -> None:
    _, found = run(quantized(whole=True), latents())
    assert [one.status for one in found] == ["dense"] * 2
    assert all("the same tokens, lost at" in str(one.reason) and "linear" in str(one.reason) for one in found)


def test_weights_that_an_unknown_operator_makes_are_no_tokens() -> None:
    _, found = run(quantized(whole=False), latents())
    assert [(one.status, one.grid) for one in found] == [("sparse", GRID)] * 2


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("linear", "there is no operator 'linear'"),
        ("quantized_layers::lineal", "there is no operator 'quantized_layers::lineal'"),
        ("nowhere::linear", "there is no operator"),
        ("quantized_layers::", "there is no operator"),
        ("quantized_layers::scale_", "must take a tensor first and write into none"),
        ("quantized_layers::__name__", "there is no operator"),
        ("quantized_layers::named", "must take a tensor first and write into none"),
        ("quantized_layers::number", "must take a tensor first and write into none"),
    ],
)
def test_what_is_no_such_operator(name: str, why: str) -> None:
    before = dict(RULES)
    with pytest.raises(ValueError, match=why):
        rainfusion_compile.row_wise(name)
    assert before == RULES


WEIGHT = torch.arange(32 * 32).view(32, 32) * 37 % 15


@pytest.fixture
def pair() -> Iterator[None]:
    rainfusion_compile.row_wise("quantized_layers::pair")
    yield
    del RULES["quantized_layers::pair"]


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("number", [0, 1])
def test_only_the_first_output_is_row_by_row(number: int) -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.quantized_layers.pair(x, torch.eye(32))[number]

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.layer, self.qkv = nn.Conv3d(4, 32, 1), Second(), nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(self.patch(x).flatten(2).transpose(1, 2))
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k, v)

    _, (found,) = run(Behind().eval(), latents())
    assert found.status == ("dense" if number else "sparse")


@pytest.mark.usefixtures("declared")
def test_an_operator_that_sums_over_tokens_makes_new_ones() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.qkv = nn.Conv3d(4, 32, 1), nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2)
            weight = torch.ones(x.shape[-1], x.shape[-1]).triu()
            x = (x + torch.ops.quantized_layers.linear(x, weight, weight[:, :1])).transpose(1, 2)
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k, v)

    _, (found,) = run(Mixes().eval(), latents()[..., ::2, ::2])
    assert found.status == "dense"


def int8(x: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, WEIGHT.to(torch.int8), torch.linspace(0.1, 1, 32, dtype=x.dtype))


def int4(x: Tensor) -> Tensor:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(WEIGHT.int(), 1)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, torch.ones(1, 32, 2, dtype=x.dtype))


@pytest.mark.parametrize("layer", [int8, int4])
def test_operators_of_torch_itself_treat_rows_by_themselves(layer: Callable[[Tensor], Tensor]) -> None:
    """Measured: of which rows the output differs if one row of the input does."""
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = layer(x)
    for row in range(len(x)):
        other = x.clone()
        other[row] += 1
        assert (layer(other) != before).any(1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("layer", [int8, int4])
def test_attention_behind_operators_of_torch_itself(layer: Callable[[Tensor], Tensor]) -> None:
    class Packed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layer(x.flatten(0, -2).bfloat16()).to(x).unflatten(0, x.shape[:-1])

    model = Video(F.scaled_dot_product_attention)
    model.q = Packed()
    _, found = run(model.eval(), latents())
    assert [(one.status, one.grid) for one in found] == [("sparse", GRID)] * 2
