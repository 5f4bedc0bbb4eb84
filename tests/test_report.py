# SPDX-License-Identifier: Apache-2.0
"""The numbers of a report, from what the operators return."""

import json
from typing import Any

import pytest
import torch

from rainfusion_compile.report import AttentionReport, GraphReport, Observed, Realised, Report
from rainfusion_compile.sparsity.layout import VideoLayout

PAIRS = 2 * 2 * 25 * 25  # samples, heads, queries, keys
CANDIDATES = {
    "patterns": ("textural", "spatial", "textural"),
    "sparsities": (0.8, 0.5, 0.5),
    "densities": (0.2, 0.5, 0.6),
}
# Of two samples and two heads: squared errors of three candidates, then the dense output's square.
ERRORS = torch.tensor([[[0.04, 0.09, 0.01, 1.0], [3.0, 2.0, 1.0, 4.0]], [[0.5, 0.5, 0.5, 0.0], [9.0, 4.0, 1.0, 100.0]]])
RECALL = torch.tensor([[[0.5, 0.9, 0.8], [0.2, 0.3, 0.1]], [[0.0, 0.0, 0.0], [0.4, 0.5, 0.6]]])
CHOICE = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)
EXPECTED = {
    "patterns": [["textural", "spatial"], ["dense", "textural"]],
    "sparsity": [[0.8, 0.5], [0.0, 0.5]],
    "density": [[0.2, 0.5], [1.0, 0.6]],
    "error": [[0.2, 0.5**0.5], [0.0, 0.1]],
    "layer_error": [(2.04 / 5) ** 0.5, 0.1],  # of all heads together, and a head without output counts for nothing
    "recall": [[0.5, 0.3], [0.0, 0.6]],
    "mean_density": 0.575,
}


def report_of(attention: AttentionReport, *calls: Observed) -> Report:
    report, graph = Report(), GraphReport([attention])
    for call in calls:
        report.add(graph, [call], (PAIRS,))
    return report


def attention(name: str = "blocks.0", heads: int = 2, **more) -> AttentionReport:
    return AttentionReport(name, "sparse", grid=(2, 3, 4), text=(1, 0), heads=heads, head_dim=64, tokens=25, **more)


def check(entry: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if name == "patterns":
            assert entry[name] == value
        else:
            torch.testing.assert_close(torch.tensor(entry[name]), torch.tensor(value), msg=name)
    assert json.loads(json.dumps(entry)) == entry  # plain values


def test_what_heads_took():
    report = report_of(attention(**CANDIDATES), Observed(CHOICE, ERRORS, RECALL))
    (entry,) = report.to_dict()["attentions"]
    check(entry, EXPECTED)
    assert entry["sparsity"] == EXPECTED["sparsity"]  # as they were given, to the last digit
    assert not {"sparsities", "densities"} & entry.keys()


def test_recall_of_a_dense_head_is_that_of_its_best_candidate():
    report = report_of(attention(**CANDIDATES), Observed(torch.full_like(CHOICE, 3), ERRORS, RECALL))
    (entry,) = report.to_dict()["attentions"]
    dense = {
        "error": [[0.0, 0.0]] * 2,
        "layer_error": [0.0, 0.0],
        "sparsity": [[0.0, 0.0]] * 2,
        "density": [[1.0, 1.0]] * 2,
    }
    check(entry, dense | {"patterns": [["dense", "dense"]] * 2, "recall": [[0.9, 0.3], [0.0, 0.6]]})


@pytest.mark.parametrize("absent", [0, 1, 3])
def test_candidates_that_a_call_does_not_have(absent):
    """In a graph for many resolutions, there is room for all; the outputs' squares follow those that there are."""
    layout = VideoLayout((2, 3, 4), (1, 0))
    errors, recall = (torch.nn.functional.pad(x, (0, absent)) for x in (ERRORS, RECALL))
    known = Realised(layout, 25, *CANDIDATES.values())
    report = report_of(attention(), Observed(CHOICE, errors, recall, known))
    (entry,) = report.to_dict()["attentions"]
    check(entry, EXPECTED)


def test_a_call_that_was_dense_for_a_reason():
    most = 6
    choice, errors, recall = torch.full((1, 2), most), torch.zeros(1, 2, most + 1), torch.zeros(1, 2, most)
    (entry,) = report_of(attention(), Observed(choice, errors, recall, Realised(reason="short"))).to_dict()[
        "attentions"
    ]
    check(entry, {"error": [[0.0, 0.0]], "layer_error": [0.0], "sparsity": [[0.0, 0.0]], "recall": [[0.0, 0.0]]})
    assert (entry["status"], entry["reason"], entry["patterns"]) == ("dense", "short", [["dense", "dense"]])


def test_the_mean_density_is_over_all_calls_and_the_rest_of_the_latest():
    first = Observed(torch.full_like(CHOICE, 3), ERRORS, RECALL)
    (entry,) = report_of(attention(**CANDIDATES), first, Observed(CHOICE, ERRORS, RECALL)).to_dict()["attentions"]
    check(entry, EXPECTED | {"mean_density": (1 + 0.575) / 2})
    assert entry["calls"] == 2


def test_the_table():
    """A line for each sparse attention and sample, with means over its heads and a letter for each of them."""
    assert str(report_of(attention(**CANDIDATES), Observed(CHOICE, ERRORS, RECALL))).splitlines() == [
        "rainfusion: 1 of 1 video self-attentions sparse",
        "attention  density  error  recall  heads",
        "grid 2x3x4, text 1+0, 2 heads of 64:",
        "blocks.0     0.350  0.639   0.400  Ts",
        "             0.800  0.100   0.300  .t",
        "heads: s spatial, t textural, . dense; a capital drops 0.7 of the pairs or more",
        "kept token pairs of video self-attention, over all calls: 0.575",
    ]


@pytest.mark.parametrize(
    ("heads", "name"), [(40, "blocks.{}.attn1"), (48, "single_transformer_blocks.{}.attn"), (1, "a")]
)
def test_the_table_of_a_large_model_fits_a_terminal(heads, name):
    graph, report = GraphReport(), Report()
    for number in range(60):
        graph.attentions.append(attention(name.format(number), heads, **CANDIDATES))
    sizes = (1, heads)
    choice = torch.arange(heads).int()[None] % 4
    observed = Observed(choice, torch.ones(*sizes, 4), torch.ones(*sizes, 3))
    report.add(graph, [observed] * 60, (PAIRS,) * 60)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    table = lines[3 : lines.index(next(line for line in lines if line.startswith("heads: ")))]
    strips = "".join(line[lines[1].index("heads") :] for line in table)
    assert len(strips) == 60 * heads
    assert len(table) <= 60 * 3


def test_a_capital_is_of_what_was_dropped_not_of_what_was_wanted():
    """And the legend tells of capitals where there are any."""
    known = {"patterns": ("textural",), "sparsities": (0.8,)}
    for density, strip, told in ((0.31, "t", False), (0.3, "T", True)):
        one = attention(**known, densities=(density,), heads=1)
        text = str(report_of(one, Observed(torch.zeros(1, 1), torch.ones(1, 1, 2), torch.ones(1, 1, 1))))
        assert text.splitlines()[3].split()[-1] == strip
        assert ("a capital drops 0.7 of the pairs or more" in text) is told


def test_heads_that_all_stay_dense_are_told_with_a_remedy():
    """In every call: some dense calls are no surprise."""
    dense, some = (Observed(choice, ERRORS, RECALL) for choice in (torch.full_like(CHOICE, 3), CHOICE))
    lines = str(report_of(attention(**CANDIDATES), dense, dense)).splitlines()
    assert lines[0] == "rainfusion: 1 of 1 video self-attentions sparse, 1 of them with every head dense in every call"
    (line,) = (line for line in lines if line.startswith("1 with every head dense: "))
    assert line.endswith("a larger `error` admits more")
    assert "every head dense" not in str(report_of(attention(**CANDIDATES), some, dense))
    assert "every head dense" not in str(report_of(attention(**CANDIDATES), dense, some))


def test_what_is_left_alone_is_named():
    alone = [AttentionReport("a", "dense", "short", category="other")] * 2
    report = Report()
    report.add(GraphReport([*alone, AttentionReport("b", "dense", "cross", category="cross-attention")]), [], (1,) * 3)
    told = "1 cross-attention and 2 other self-attentions over few tokens left alone"
    assert str(report).splitlines()[0] == f"rainfusion: no video self-attention ({told})"


def test_letters_of_patterns_differ():
    """Of other patterns than ours, and of more than the alphabet has first letters for."""
    names = ("textural", "temporal", "tex", "te", "t")
    known = {"patterns": names, "sparsities": (0.5,) * 5, "densities": (0.5,) * 5}
    observed = Observed(torch.arange(5)[None], torch.ones(1, 5, 6), torch.ones(1, 5, 5))
    _, _, _, line, told, *_ = str(report_of(attention(**known, heads=5), observed)).splitlines()
    letters = dict(reversed(part.split()) for part in told.removeprefix("heads: ").split(";")[0].split(", "))
    assert [letters[name] for name in names] == list(line.split()[-1])
    assert len(set(letters.values())) == 6


def test_the_density_is_that_of_all_token_pairs():
    """39 calls at 0.2 and a dense one of equal work, whichever attention they are of; cross-attention aside."""
    sparse, report = attention(patterns=("textural",), sparsities=(0.8,), densities=(0.2,)), Report()
    graph = GraphReport([sparse])
    for _ in range(39):
        report.add(graph, [Observed(torch.zeros(1, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 1))], (PAIRS,))
    dense = AttentionReport("blocks.1", "dense", "needs gradients", "call it under torch.no_grad()")
    cross = AttentionReport("blocks.1.cross", "dense", "cross-attention", category="cross-attention")
    report.add(GraphReport([dense, cross]), [], (PAIRS, 10 * PAIRS))
    assert report.to_dict()["density"] == pytest.approx(0.22)
    lines = str(report).splitlines()
    assert lines[0] == "rainfusion: 1 of 2 video self-attentions sparse (1 cross-attention left alone)"
    assert lines[-3] == "kept token pairs of video self-attention, over all calls: 0.220"
    assert lines[-2:] == [
        "1 left dense: needs gradients; call it under torch.no_grad()",
        "1 left alone: cross-attention",
    ]
    report.add(GraphReport([dense]), [], (39 * PAIRS,))
    assert report.to_dict()["density"] == pytest.approx((39 * 0.2 + 1 + 39) / 79)
    report.add(GraphReport([dense]), [], (None,))
    assert "0.605, without 1 whose sizes are not known\n" in str(report)


def test_every_call_is_told():
    first = Observed(torch.full_like(CHOICE, 3), ERRORS, RECALL)
    (entry,) = report_of(attention(**CANDIDATES), first, Observed(CHOICE, ERRORS, RECALL)).to_dict()["attentions"]
    assert entry["density_by_call"] == pytest.approx([1.0, 0.575])
    assert entry["error_by_call"] == pytest.approx([0.0, max(EXPECTED["layer_error"])])
    assert entry["pairs_by_call"] == [PAIRS, PAIRS]


@pytest.mark.parametrize(("sparsity", "small"), [(0.8, True), (0.0, False)])
def test_what_blocks_cannot_save_is_said(sparsity, small):
    """But not of what was asked to keep everything."""
    known = {"patterns": ("textural",), "sparsities": (sparsity,), "densities": (1.0,)}
    text = str(report_of(attention(**known), Observed(torch.zeros(1, 2), torch.ones(1, 2, 2), torch.ones(1, 2, 1))))
    assert ("sparse, 1 of them too small for blocks to save anything" in text) is small
    assert ("too small for blocks\n" in text) is small
