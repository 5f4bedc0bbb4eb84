# SPDX-License-Identifier: Apache-2.0
"""What a write into a view leaves known of the tensors that share its memory."""

from __future__ import annotations

from rainfusion_compile.passes.provenance.aliases import _where_they_stayed
from rainfusion_compile.passes.provenance.axes import resolve, same
from rainfusion_compile.passes.provenance.axis import Axis, Dim, size_of


def lost(dim: Dim) -> bool:
    return all(axis.lost is not None for axis in resolve(dim))


def test_dims_that_the_view_has_whole_stay_and_others_are_lost() -> None:
    time, row, columns = (Axis(3, role="time"),), (Axis(4, role="row"),), (Axis(5),)
    frames, rows, rest = _where_they_stayed((time, row, columns), [row, columns])
    assert same(rows, row)
    assert same(rest, columns)
    assert lost(frames)
    assert size_of(frames) == 3


def test_of_two_dims_that_are_the_same_the_view_may_be_an_index_of_one() -> None:
    tokens = (Axis(12),)
    both = _where_they_stayed((tokens, tokens), [tokens])
    assert all(map(lost, both))
    assert not any(map(lost, _where_they_stayed((tokens, tokens), [tokens, tokens])))
