# SPDX-License-Identifier: Apache-2.0
"""Which input of a graph is the timestep, in the ways that video models embed theirs."""

import math
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_timestep_embedding
from models import VIDEO_MODELS, capture
from torch import Tensor, fx

from rainfusion_compile.passes.match.noise_level import find_timestep_angles

HALF = 8


def falling(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.exp(-math.log(10000) * torch.arange(HALF, dtype=dtype) / HALF)


def of_powers(t: Tensor) -> Tensor:
    """As the official code of Wan has it."""
    position = t.type(torch.float64)
    angles = torch.outer(position, torch.pow(10000, -torch.arange(HALF).to(position).div(HALF)))
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def of_exponents(t: Tensor) -> Tensor:
    """As the official code of HunyuanVideo, and of most others, has it."""
    angles = t[:, None].float() * falling()[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def in_place(t: Tensor) -> Tensor:
    """As the official code of Mochi has it."""
    frequencies = torch.arange(start=0, end=HALF, dtype=torch.float32)
    frequencies.mul_(-math.log(10000) / HALF).exp_()
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


EMBEDDINGS = {
    "diffusers": lambda t: get_timestep_embedding(t, 2 * HALF, flip_sin_to_cos=True, downscale_freq_shift=0),
    "powers": of_powers,
    "exponents": of_exponents,
    "in place": in_place,
    "bfloat16": lambda t: of_exponents(t.bfloat16()),
    "methods": lambda t: (t.unsqueeze(-1).mul(falling())).sin(),
    "as of others": lambda t: (falling().type_as(t) * t[:, None].expand_as(torch.empty(len(t), HALF))).sin(),
    "counted to one": lambda t: of_exponents(1000.0 * (t / 1000)),
    "of one sample": lambda t: of_exponents(t[0].expand(4)),
}


@pytest.mark.parametrize("embed", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_the_highest_frequency_turns_by_the_timestep(embed):
    times = torch.tensor([3.0, 640.0, 999.0, 12.0])
    (graph,) = capture(lambda x, timestep: x + embed(timestep).sum(), torch.zeros(5), times)
    turned = values_at(find_timestep_angles(graph), l_x_=torch.zeros(5), l_timestep_=times).abs().amax(-1)
    expected = times[:1].expand(4) if embed is EMBEDDINGS["of one sample"] else times
    torch.testing.assert_close(turned.float(), expected, rtol=1 / 128, atol=1e-3)


def values_at(node: fx.Node | None, **inputs: Tensor) -> Tensor:
    """What a node of a graph is when it runs on these, by name."""
    assert node is not None
    seen = {}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    module = node.graph.owning_module
    assert module is not None
    Run(module).run(*(inputs[input_.name] for input_ in node.graph.find_nodes(op="placeholder")))
    return seen[node]


class Embedded(torch.nn.Module):
    """With guidance beside the timestep, as distilled models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.timesteps = Timesteps(16, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time, self.guide = TimestepEmbedding(16, 8), TimestepEmbedding(16, 8)

    def forward(self, x: Tensor, timestep: Tensor, guidance: Tensor) -> Tensor:
        return x + self.guide(self.timesteps(guidance)) + self.time(self.timesteps(timestep))


def test_guidance_is_no_timestep():
    (graph,) = capture(Embedded(), torch.zeros(2, 8), torch.tensor([1.0, 700.0]), torch.full((2,), 6000.0))
    assert inputs_of(find_timestep_angles(graph)) == ["l_timestep_"]


def inputs_of(node: fx.Node | None) -> list[str]:
    """The names of the inputs that a node is made of."""
    way = [] if node is None else [node]
    for item in way:
        way += item.all_input_nodes
    return [item.name for item in way if item.op == "placeholder"]


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "allegro", "ltx2", "kandinsky5"])
def test_in_real_models(name):
    case = VIDEO_MODELS[name]()
    angles = [find_timestep_angles(graph) for graph in capture(case.model, **case.inputs, fullgraph=False)]
    assert [inputs_of(node)[0].endswith("timestep_") for node in angles] == [True]


class Kept(torch.nn.Module):
    """Keeps its frequencies, in a way of its own."""

    def __init__(self, name: str, frequencies: Tensor, *, buffer: bool) -> None:
        super().__init__()
        self.name = name
        if buffer:
            self.register_buffer(name, frequencies)
        else:
            setattr(self, name, frequencies)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angles = torch.outer(timestep.float(), getattr(self, self.name).to(timestep.device))
        return x + torch.cat([angles.cos(), angles.sin()], -1).sum()


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("name", ["freqs", "inv_freq", "frequencies"])
def test_frequencies_that_a_module_keeps(name, buffer):
    times = torch.tensor([3.0, 640.0])
    (graph,) = capture(Kept(name, falling(), buffer=buffer), torch.zeros(5), times)
    node = find_timestep_angles(graph)
    found = sorted(one.rstrip("_") for one in inputs_of(node))
    assert len(found) == 2
    assert found[0].endswith(name)
    assert found[1] == "l_timestep"
    assert node is not None
    assert node.meta["example_value"].shape == (2, HALF)


@pytest.mark.parametrize("frequencies", [falling()[None].expand(2, -1).contiguous(), torch.arange(HALF)])
def test_what_is_called_frequencies_but_can_be_none(frequencies):
    def model(x: Tensor, timestep: Tensor, freqs: Tensor) -> Tensor:
        return x + (timestep[:, None] * freqs).sin().sum()

    (graph,) = capture(model, torch.zeros(5), torch.tensor([3.0, 640.0]), freqs=frequencies)
    assert find_timestep_angles(graph) is None


def test_positions_are_no_times():
    class Positions(Kept):
        def forward(self, x: Tensor, where: Tensor) -> Tensor:
            return super().forward(x, where)

    (graph,) = capture(Positions("freqs", falling(), buffer=True), torch.zeros(5), torch.arange(7))
    assert find_timestep_angles(graph) is None


def test_a_vector_of_another_name_is_none():
    (graph,) = capture(Kept("scales", falling(), buffer=False), torch.zeros(5), torch.tensor([3.0, 640.0]))
    assert find_timestep_angles(graph) is None


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 1, 3, 1, 1), (2, 105)])
def test_a_timestep_for_each_frame_or_token_is_found_by_its_name(shape):
    times = torch.rand(shape) * 1000
    (graph,) = capture(lambda x, timestep: x + of_exponents(timestep.flatten()).sum(), torch.zeros(5), times)
    turned = values_at(find_timestep_angles(graph), l_x_=torch.zeros(5), l_timestep_=times).amax(-1)
    torch.testing.assert_close(turned, times.flatten())
    (graph,) = capture(lambda x, where: x + of_exponents(where.flatten()).sum(), torch.zeros(5), times)
    assert find_timestep_angles(graph) is None


def test_a_timestep_for_each_frame_of_any_video():
    (graph,) = capture(
        lambda x, timestep: x + of_exponents(timestep.flatten()).sum(),
        torch.zeros(5),
        torch.rand(2, 1, 3),
        dynamic=True,
    )
    assert inputs_of(find_timestep_angles(graph))[-1] == "l_timestep_"


def test_the_time_to_step_to_is_not_the_timestep():
    """As flow maps have one beside the timestep."""

    def model(x: Tensor, **given: Tensor) -> Tensor:
        return x + of_exponents(given["timestep"]).sum() - of_exponents(given["r_timestep"]).sum()

    (graph,) = capture(model, torch.zeros(5), r_timestep=torch.tensor([1.0]), timestep=torch.tensor([700.0]))
    assert inputs_of(find_timestep_angles(graph)) == ["l_given_timestep_"]


def written_over(frequencies: Tensor, x: Tensor) -> Tensor:
    frequencies.copy_(x[0])
    return frequencies


NOT_TIMES = {
    "positions": lambda x, t: (torch.arange(len(x))[:, None] * falling()).sin().sum() + x + t.sum(),
    "learned frequencies": lambda x, t: (t[:, None] * x[:1].abs()).sin().sum() + x,
    "steps that do not fall": lambda x, t: (t[:, None] * torch.arange(HALF)).sin().sum() + x,
    "steps written over": lambda x, t: (t[:, None] * written_over(falling(), x)).sin().sum() + x,
    "shifted": lambda x, t: ((t + 1)[:, None] * falling()).sin().sum() + x,
    "of the latents": lambda x, t: (x[..., None] * falling()).flatten().sin().sum() + x + t.sum(),
    "positions alike": lambda x, _: of_exponents(x[:, 0]).sum() + x,
}


@pytest.mark.parametrize("model", NOT_TIMES.values(), ids=NOT_TIMES)
def test_what_is_no_timestep_is_not_taken_for_one(model):
    (graph,) = capture(lambda x, first: model(x, first), torch.randn(4, HALF), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert find_timestep_angles(graph) is None


def test_frames_a_second_are_no_timestep():
    (graph,) = capture(lambda x, fps: x + of_exponents(fps).sum(), torch.ones(4), torch.tensor([24.0]))
    assert find_timestep_angles(graph) is None


def test_of_two_alike_none_is_taken():
    (graph,) = capture(lambda x, y: of_exponents(x).sum() + of_exponents(y).sum(), torch.ones(4), torch.ones(4))
    assert find_timestep_angles(graph) is None
