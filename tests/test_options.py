# SPDX-License-Identifier: Apache-2.0
"""Options: impossible ones are refused at compile time, by name, with what would be accepted."""

import dataclasses
import math

import pytest
import torch

from rainfusion_compile import Options
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import BY_NAME


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsty": 0.5}, r"unknown option 'sparsty' \(did you mean 'sparsity'\?\)"),
        ({"mode": "max-autotune"}, "called 'inductor_mode'"),
        ({"max_autotune": True}, r"options=\{'inductor': \{'max_autotune'"),
        ({"sparsity": 1.0}, r"sparsity must be a number in \[0, 1\), or several; got 1.0"),
        ({"sparsity": (0.5, 1.0)}, r"sparsity must be a number in \[0, 1\), or several; got \(0.5, 1.0\)"),
        ({"sparsity": ()}, r"or several; got \(\)"),
        ({"sparsity": [0.5, "0.7"]}, r"or several; got \[0.5, '0.7'\]"),
        ({"sparsity": [0.5, [0.7]]}, r"or several; got \[0.5, \[0.7\]\]"),
        ({"sparsity": (0.5, float("nan"))}, "sparsity must be a number"),
        ({"sparsity": (0.5, True)}, "sparsity must be a number"),
        ({"sparsity": None}, "or several; got None"),
        ({"sparsity": {0.5: 1}}, "or several; got {0.5: 1}"),
        ({"sparsity": "high"}, "sparsity must be a number"),
        ({"sparsity": True}, "sparsity must be a number"),
        ({"sparsity": float("nan")}, "sparsity must be a number"),
        (
            {"sparsity": [i / 20 for i in range(11)]},
            r"sparsity must have at most 6 numbers for patterns spatial, temporal, textural, adaptive; got 11: \(0.5, ",
        ),
        (
            {"sparsity": [i / 100 for i in range(31)], "patterns": ("textural",)},
            "at most 30 numbers for patterns textural",
        ),
        ({"arm": "recal"}, "arm must be one of 'error', 'recall'; got 'recal'"),
        ({"arm": None}, "arm must be one of 'error', 'recall'; got None"),
        ({"arm": ["recall"]}, r"arm must be one of 'error', 'recall'; got \['recall'\]"),
        ({"error": 5}, r"error must be a number in \[0, 1\]; got 5"),
        ({"error": -0.1}, r"error must be a number in \[0, 1\]; got -0.1"),
        ({"error": float("nan")}, r"error must be a number in \[0, 1\]; got nan"),
        ({"error": "small"}, r"error must be a number in \[0, 1\]; got 'small'"),
        ({"error": True}, r"error must be a number in \[0, 1\]; got True"),
        ({"arm": "recall", "recall_target": 95}, r"recall_target must be a number in \[0, 1\]; got 95"),
        ({"arm": "recall", "min_recall": -0.1}, "min_recall must be"),
        ({"arm": "recall", "min_recall": float("inf")}, r"min_recall must be a number in \[0, 1\]; got inf"),
        ({"arm": "recall", "error": 0.1}, "error belongs to arm='error'; got error=0.1 with arm='recall'"),
        ({"arm": "recall", "error": 0.0}, "error belongs to arm='error'; got error=0.0 with arm='recall'"),
        ({"recall_target": 0.9}, "recall_target belongs to arm='recall'; got recall_target=0.9 with arm='error'"),
        ({"recall_target": 0.0}, "recall_target belongs to arm='recall'; got recall_target=0.0 with arm='error'"),
        ({"min_recall": 0.5}, "min_recall belongs to arm='recall'; got min_recall=0.5 with arm='error'"),
        ({"arm": "error", "min_recall": 0.0}, "min_recall belongs to arm='recall'; got min_recall=0.0"),
        ({"error": 0.1, "min_recall": 0.5}, "min_recall belongs to arm='recall'"),
        ({"error": 0.1, "recall_target": 95}, "recall_target belongs to arm='recall'; got recall_target=95"),
        ({"patterns": ("spatail",)}, r"unknown pattern 'spatail' \(did you mean 'spatial'\?\)"),
        ({"patterns": "spatial"}, "patterns must be a sequence"),
        ({"patterns": ()}, "got none"),
        ({"patterns": (["spatial"],)}, r"unknown pattern \['spatial'\]"),
        ({"grid": (0, 4, 4)}, r"grid must be 3 integers, each at least 1 \(frames, rows, columns\); got \(0, 4, 4\)"),
        ({"grid": (4, 4)}, "grid must be 3 integers"),
        ({"text": (-1, 0)}, "text must be 2 integers, each at least 0"),
        ({"min_tokens": 1.5}, "min_tokens must be an integer"),
        ({"dense_layers": "0"}, "dense_layers must be"),
        ({"dense_steps": 4}, r"dense_steps must be a number in \[0, 1\], or a pair of such; got 4"),
        ({"dense_steps": (0.1, 0.1, 0.1)}, "dense_steps must be"),
        ({"dense_steps": "0.1"}, "dense_steps must be"),
        ({"preset": "fastest"}, "preset must be one of 'quality', 'balanced', 'fast', with arm='error'; got 'fastest'"),
        ({"preset": ["fast"]}, "preset must be one of"),
        ({"preset": "fast", "arm": "recall"}, "got 'fast' with arm='recall'"),
        ({"dense_layers": -1}, "dense_layers must be"),
        ({"inductor_mode": "max-autotun"}, r"did you mean 'max-autotune'\?"),
        ({"inductor_mode": "turbo"}, r"it takes default, (?!.*default\b)"),
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


def test_more_patterns_than_there_are_leave_the_default_sparsities_fewer(monkeypatch):
    class Rows(BY_NAME["spatial"]):
        name = "rows"

    monkeypatch.setitem(BY_NAME, "rows", Rows)
    options = Options()
    assert options.names[-1] == "rows"
    assert options.ladder == (0.9, 0.8, 0.7, 0.6, 0.35)
    with pytest.raises(ValueError, match=r"at most 5 numbers for patterns .*rows; got 6"):
        Options(sparsity=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4))
    assert len(Options().tables(VideoLayout((5, 12, 14)), None).patterns) <= 30


def test_options_are_frozen_and_normalised():
    assert Options(dense_layers=range(2)).dense_layers == (0, 1)  # type: ignore[arg-type]
    options = Options(grid=[3, 4, 5], patterns=["temporal", "temporal"], dense_layers=2)  # type: ignore[arg-type]
    assert options.grid == (3, 4, 5)
    assert options.patterns == ("temporal",)
    assert options.dense_layers == (0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.sparsity = 0.5  # type: ignore[misc]


def test_each_rule_has_its_own_usual_values():
    options = Options()
    assert (options.arm, options.error, options.recall_target, options.min_recall) == ("error", 0.04, None, None)
    assert (options.by_error, options.limits) == (True, (0.04, 0.0))
    options = Options(arm="recall")
    assert (options.arm, options.error, options.recall_target, options.min_recall) == ("recall", None, 0.95, 0.8)
    assert (options.by_error, options.limits) == (False, (0.95, 0.8))
    assert Options(error=0).limits == (0, 0.0)
    assert Options(arm="recall", recall_target=0, min_recall=1).limits == (0, 1)
    by_error, limits = options.rule(torch.device("cpu"))
    assert not by_error
    assert torch.equal(limits, torch.tensor([[0.95, 0.8]]))


@pytest.mark.parametrize(("preset", "error"), [("quality", 0.02), ("balanced", 0.04), ("fast", 0.1)])
def test_presets_are_errors(preset, error):
    assert Options(preset=preset).limits == (error, 0.0)
    assert Options(preset=preset, error=0.2).limits == (0.2, 0.0)


@pytest.mark.parametrize(
    ("dense_steps", "levels"),
    [(0, (math.inf, -math.inf)), (0.1, (0.9, -math.inf)), ([0.25, 0.1], (0.75, 0.1)), (1, (0.0, -math.inf))],
)
def test_dense_steps_are_levels_of_noise(dense_steps, levels):
    assert Options(dense_steps=dense_steps).dense_levels == levels


@pytest.mark.parametrize("arm", ["error", "recall"])
def test_options_may_be_made_of_others(arm):
    """By `dataclasses.replace` and from their own fields: usual values that were filled in are no contradiction."""
    options = Options(arm=arm)
    assert dataclasses.replace(options, sparsity=0.5, min_tokens=0).limits == options.limits
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    assert Options.parse(fields) == options


def test_ladders_come_highest_first_and_without_repetitions():
    assert Options(sparsity=[0.5, 0.9, 0.5, 0]).sparsity == (0.9, 0.5, 0.0)  # type: ignore[arg-type]
    assert Options(sparsity=[0.5, 0.9, 0.5, 0]).ladder == (0.9, 0.5, 0.0)  # type: ignore[arg-type]
    assert Options(sparsity=0.5).ladder == (0.5,)
    assert Options(sparsity=(0.5,)).ladder == (0.5,)
    assert len(Options(sparsity=[i / 100 for i in range(30)], patterns=("textural",)).ladder) == 30  # type: ignore[arg-type]
    assert Options().ladder == Options.sparsity == tuple(sorted(Options.sparsity, reverse=True))


def test_options_make_the_tables_of_their_rule():
    """By error, windows are filled up with samples, windows of two widths for each sparsity; by recall, none."""
    layout = VideoLayout((8, 24, 32))
    by_error = Options(sparsity=(0.8, 0.5), patterns=("spatial", "temporal")).tables(layout)
    assert all(phases > 0 for _, phases in by_error.radii)
    by_recall = Options(sparsity=(0.8, 0.5), patterns=("spatial", "temporal"), arm="recall").tables(layout)
    assert all(phases == 0 for _, phases in by_recall.radii)
    for tables in (by_error, by_recall):
        assert sorted(set(zip(tables.patterns, tables.sparsities, strict=True))) == [
            ("spatial", 0.5), ("spatial", 0.8), ("temporal", 0.5), ("temporal", 0.8)
        ]  # fmt: skip
    assert len(by_recall.patterns) == 4
    for tables in (by_error, by_recall):
        assert tables.densities == tuple(sorted(tables.densities))
    assert Options(arm="recall").tables(layout) is Options(arm="recall", recall_target=0.5).tables(layout)


def test_every_option_is_documented():
    assert Options.__doc__ is not None
    for option in dataclasses.fields(Options):
        assert f"{option.name}:" in Options.__doc__


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("error=0.1,min_tokens=4096", {"error": 0.1, "min_tokens": 4096}),
        (" error = 0.1 , strict = true ", {"error": 0.1, "strict": True}),
        ("grid=3,4,5,text=0,7,sparsity=0.5", {"grid": (3, 4, 5), "text": (0, 7), "sparsity": 0.5}),
        ("grid=((3,4,5),(1,2,3)),strict=False", {"grid": ((3, 4, 5), (1, 2, 3))}),
        ("patterns=spatial,temporal,preset=fast", {"patterns": ("spatial", "temporal"), "preset": "fast"}),
        ('{"sparsity": [0.8, 0.5], "inductor": {"max_autotune": true}}',
         {"sparsity": (0.8, 0.5), "inductor": {"max_autotune": True}}),
    ],
)  # fmt: skip
def test_the_environment_tells_options_to_programs_that_pass_on_a_name_only(monkeypatch, text, options):
    monkeypatch.setenv("RAINFUSION_OPTIONS", text)
    assert Options.parse() == Options.parse({}) == Options(**options)
    assert Options.parse(Options(error=0.3)) == Options(error=0.3)


@pytest.mark.parametrize(
    ("text", "given", "expected"),
    [
        ("error=0.1,min_tokens=1", {"error": 0.2}, {"error": 0.2, "min_tokens": 1}),
        ("error=0.1,min_tokens=1", {"arm": "recall"}, {"arm": "recall", "min_tokens": 1}),
        ("error=0.1", {"preset": "quality"}, {"preset": "quality"}),
        ("arm=recall,min_recall=0.5", {"error": 0.2}, {"error": 0.2}),
        ("grid=3,4,5,text=0,7", {"grid": (5, 4, 3)}, {"grid": (5, 4, 3)}),
        ("patterns=spatial", {"patterns": None}, {"patterns": None}),
    ],
)
def test_what_is_given_goes_before_the_environment(monkeypatch, text, given, expected):
    monkeypatch.setenv("RAINFUSION_OPTIONS", text)
    assert Options.parse(given) == Options(**expected)
    monkeypatch.setenv("RAINFUSION_OPTIONS", "inductor_mode=default")
    assert Options.parse(None, "reduce-overhead").inductor_mode == "reduce-overhead"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("error=5", r"RAINFUSION_OPTIONS='error=5': error must be a number in \[0, 1\]; got 5"),
        ("eror=0.1", r"RAINFUSION_OPTIONS.*unknown option 'eror' \(did you mean 'error'\?\)"),
        ("error", "RAINFUSION_OPTIONS='error': options are name=value"),
        ("error=", "options are name=value, joined by commas, or a JSON object; got 'error='"),
        ("error=small", "error must be a number in .*; got 'small'"),
        ('{"error": }', "RAINFUSION_OPTIONS.*what begins with { is read as JSON, and this is none: Expecting value"),
    ],
)
def test_mistakes_in_the_environment_name_the_variable(monkeypatch, text, message):
    monkeypatch.setenv("RAINFUSION_OPTIONS", text)
    for given in (None, {"error": 0.5}):
        with pytest.raises(ValueError, match=message):
            Options.parse(given)
