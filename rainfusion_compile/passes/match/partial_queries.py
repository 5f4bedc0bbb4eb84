# SPDX-License-Identifier: Apache-2.0
"""Video attention whose keys are text and video in one sequence, with queries for a run of these tokens only.

This is the self-attention over all the keys' tokens without some of its rows, and it is computed as such: rows of zeros
stand for the queries that were left out, and what becomes of them is cut off again. They are text, so they are neither
in the probe's sample nor in any pattern: no other row depends on them.
"""

from __future__ import annotations

from typing import Any

from rainfusion_compile.passes.provenance.axes import same, segments, take
from rainfusion_compile.passes.provenance.axis import Dim, size_of
from rainfusion_compile.sparsity.layout import VideoLayout


def find_partial_queries(query: Dim, key: Dim) -> tuple[int, int] | None:
    """How many keys come before and after those of the queries, if these are provably one run of the keys' tokens."""
    count, total = size_of(query), size_of(key)
    begins, start = set[int](), 0
    for segment in segments(key):
        begins |= {start, start + _begin(segments(query)[0]) - _begin(segment)}
        start += size_of(segment)
    runs = {begin: take(key, begin, begin + count, exact=True) for begin in begins if 0 <= begin <= total - count}
    found = [begin for begin, run in runs.items() if run is not None and same(query, run)]
    # of one token alone it cannot be told which one it is
    return (found[0], total - count - found[0]) if len(found) == 1 and count > 1 else None


def _begin(segment: Dim) -> int:
    """Where a slice of something longer begins."""
    cut = segment[0].cut if segment else None
    return 0 if cut is None else cut.start * size_of(segment[1:])


def too_many(queries: Any, keys: Any) -> Any:
    """Whether the rows of zeros, which see every key, would cost a good part of what sparsity saves."""
    return 4 * (keys - queries) > queries


def lacks_video(layout: VideoLayout, partial_queries: tuple[int, int]) -> bool:
    """Whether some of the tokens without a query are of a video."""
    before, after = partial_queries
    return any(span.start < before or span.stop > layout.tokens - after for span in layout.spans)


def density(of_all: float, queries: int, keys: int) -> float:
    """The density over the rows that there are, given that over all rows; those left out keep every key."""
    return (of_all * keys - (keys - queries)) / queries
