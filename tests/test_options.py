# SPDX-License-Identifier: Apache-2.0
"""Options: impossible ones are refused at compile time, by name, with what would be accepted."""

import dataclasses

import pytest
import torch

from rainfusion_compile import Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsty": 0.5}, r"unknown option 'sparsty' \(did you mean 'sparsity'\?\)"),
        ({"mode": "max-autotune"}, "called 'inductor_mode'"),
        ({"max_autotune": True}, r"options=\{'inductor': \{'max_autotune'"),
        ({"sparsity": 1.0}, r"sparsity must be a number in \[0, 1\); got 1.0"),
        ({"sparsity": "high"}, "sparsity must be a number"),
        ({"sparsity": True}, "sparsity must be a number"),
        ({"sparsity": float("nan")}, "sparsity must be a number"),
        ({"recall_target": 95}, r"recall_target must be a number in \[0, 1\]; got 95"),
        ({"min_recall": -0.1}, "min_recall must be"),
        ({"patterns": ("spatail",)}, r"unknown pattern 'spatail' \(did you mean 'spatial'\?\)"),
        ({"patterns": "spatial"}, "patterns must be a sequence"),
        ({"patterns": ()}, "got none"),
        ({"grid": (0, 4, 4)}, r"grid must be 3 integers, each at least 1; got \(0, 4, 4\)"),
        ({"grid": (4, 4)}, "grid must be 3 integers"),
        ({"text": (-1, 0)}, "text must be 2 integers, each at least 0"),
        ({"min_tokens": 1.5}, "min_tokens must be an integer"),
        ({"dense_layers": "0"}, "dense_layers must be"),
        ({"dense_layers": -1}, "dense_layers must be"),
        ({"inductor_mode": "max-autotun"}, r"did you mean 'max-autotune'\?"),
        (
            {"inductor": {"max_autotun": True}},
            r"unknown Inductor option 'max_autotun' \(did you mean 'max_autotune'\?\)",
        ),
        ({"inductor": ["max_autotune"]}, "inductor must be a mapping"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options.parse(options)


def test_bad_options_raise_through_torch_compile():
    compiled = torch.compile(lambda x: x + 1, backend="rainfusion", options={"sparsty": 0.5})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="did you mean 'sparsity'"):
        compiled(torch.ones(2))


def test_options_are_frozen_and_normalised():
    assert Options(dense_layers=range(2)).dense_layers == (0, 1)  # type: ignore[arg-type]
    options = Options(grid=[3, 4, 5], patterns=["temporal", "temporal"], dense_layers=2)  # type: ignore[arg-type]
    assert options.grid == (3, 4, 5)
    assert options.patterns == ("temporal",)
    assert options.dense_layers == (0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.sparsity = 0.5  # type: ignore[misc]


def test_every_option_is_documented():
    assert Options.__doc__ is not None
    for option in dataclasses.fields(Options):
        assert f"{option.name}:" in Options.__doc__
