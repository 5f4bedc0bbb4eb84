# SPDX-License-Identifier: Apache-2.0
"""Token order, patterns and block tables: what they promise, for any grid."""

import time

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import layouts, tables

from rainfusion_compile.sparsity.block_tables import BlockTables, block_tables, key_blocks
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS, in_pattern, pattern_mask
from rainfusion_compile.sparsity.token_order import token_order


def token_mask(table: BlockTables, pattern: int) -> torch.Tensor:
    """Which token pairs the block mask computes, and how often: int ``[tokens, tokens]``."""
    tokens = table.layout.tokens
    count = torch.zeros(tokens, tokens, dtype=torch.int32)
    blocks = table.block_mask(pattern)
    for i, query in enumerate(table.order.long().split(table.block_q)):
        for j, key in enumerate(table.key_blocks):
            if blocks[i, j]:
                count[query[:, None], key[None, :]] += 1
    return count


@given(layouts, st.integers(1, 200))
def test_token_order_is_a_permutation_that_keeps_text_and_frames(layout, run):
    order = token_order(layout, run=run)
    assert torch.equal(order.sort().values, torch.arange(layout.tokens))
    video, frame, _, _ = layout.coordinates()
    assert torch.equal(video[order], video)
    assert torch.equal(order[video < 0], torch.arange(layout.tokens)[video < 0])
    assert torch.equal(frame[order], frame)


def test_runs_of_the_token_order_are_compact():
    layout = VideoLayout((3, 45, 80))
    order = token_order(layout, run=90)
    _, _, h, w = layout.coordinates()
    inside = order[100 : 100 + 45 * 80 - 200].unfold(0, 64, 1)  # every run of 64 inside the first frame
    area = (h[inside].amax(1) - h[inside].amin(1) + 1) * (w[inside].amax(1) - w[inside].amin(1) + 1)
    assert area.double().quantile(0.9) <= 2 * 64


@given(tables())
def test_block_masks_cover_the_pattern_and_name_tokens_once(table):
    for number, name in enumerate(table.patterns):
        computed = token_mask(table, number)
        assert int(computed.max()) == 1
        wanted = pattern_mask(name, table.layout, table.radii)
        assert bool((computed >= wanted.int()).all()), name
        assert computed.double().mean().item() == pytest.approx(table.densities[number], abs=1e-12)
    assert bool((token_mask(table, len(table.patterns)) == 1).all())


@given(tables())
@example(block_tables(VideoLayout((1, 5, 4)), sparsity=0.0, patterns=("temporal",), block_q=16, block_k=8))
def test_spatial_and_temporal_blocks_are_kept_only_for_a_reason(table):
    """A block is computed exactly if one of its token pairs is in the pattern; runs too where all of `order` is."""
    count = -(-table.layout.tokens // table.block_k)
    extra = len(table.key_blocks) - 2 * count
    for number, name in enumerate(table.patterns):
        if name == "textural":
            continue
        wanted = pattern_mask(name, table.layout, table.radii)
        blocks = table.block_mask(number)
        for i, query in enumerate(table.order.long().split(table.block_q)):
            pairs = [bool(wanted[query[:, None], key[None, :]].any()) for key in table.key_blocks]
            listed, runs = pairs[extra : extra + count], pairs[extra + count :]
            if name == "temporal" and all(listed):
                runs = listed
            read_runs = bool(blocks[i, extra + count :].any())
            assert read_runs == (name == "spatial" or all(listed))
            kept = [False] * count + runs if read_runs else listed + [False] * count
            assert blocks[i].tolist() == [False] * extra + kept


@given(tables())
def test_the_probe_counts_the_keys_that_attention_reads(table):
    position = torch.arange(table.layout.tokens)
    for number, name in enumerate(table.patterns):
        if name == "spatial":
            continue  # reads runs, in which blocks across two frames hold other tokens of these
        counted = (table.sample_keep[:, position // table.block_k] >> number) & 1 != 0
        if number == table.key_pattern:
            counted |= table.key_weight != 0
        read = token_mask(table, number)[table.samples.long()][:, table.order.long()] != 0
        assert torch.equal(counted, read), name
    assert (table.key_pattern < 0) == ("textural" not in table.patterns)
    assert table.key_pattern >= 0 or not bool(table.key_weight.any())


@given(tables())
def test_patterns_come_sparsest_first_and_rows_are_sorted(table):
    assert list(table.densities) == sorted(table.densities)
    assert set(table.patterns) <= set(PATTERNS)
    for start, end in zip(table.row_ptr[:-1].tolist(), table.row_ptr[1:].tolist(), strict=True):
        assert end > start
        assert bool((table.indices[start:end].diff() > 0).all())


@given(tables())
def test_rows_that_keep_everything_or_whole_frames_need_no_gathering(table):
    count = -(-table.layout.tokens // table.block_k)
    first_run = len(table.key_blocks) - count
    assert torch.equal(torch.cat(table.key_blocks[first_run:]), torch.arange(table.layout.tokens))
    in_memory = {*table.rows[-1].tolist()}
    if "spatial" in table.patterns:
        in_memory |= {*table.rows[table.patterns.index("spatial")].tolist()}
    for row, (start, end) in enumerate(zip(table.row_ptr[:-1].tolist(), table.row_ptr[1:].tolist(), strict=True)):
        runs = table.indices[start:end] >= first_run
        everything = sum(len(table.key_blocks[i]) for i in table.indices[start:end].tolist()) == table.layout.tokens
        assert bool(runs.all()) if row in in_memory or everything else not bool(runs.any())


def test_key_blocks_without_any_but_runs():
    blocks = key_blocks(torch.arange(128), 100, 64)
    assert [block.tolist() for block in blocks] == [[*range(64)], [*range(64, 100)]]


@given(layouts)
def test_sparsity_zero_keeps_everything(layout):
    table = block_tables(layout, sparsity=0.0, patterns=PATTERNS, block_q=16, block_k=8)
    assert set(table.densities) == {1.0}


@pytest.mark.parametrize("sparsity", [0.5, 0.64, 0.8])
@pytest.mark.parametrize(("grid", "text"), [((21, 45, 80), (0, 0)), ((33, 45, 80), (0, 256)), ((21, 30, 52), (0, 0))])
def test_densities_come_near_to_what_is_asked(grid, text, sparsity):
    table = block_tables(VideoLayout(grid, text), sparsity=sparsity, patterns=PATTERNS)
    for density in table.densities:
        assert density == pytest.approx(1 - sparsity, abs=0.06)


@pytest.mark.parametrize(
    ("grid", "text", "sparsity", "lowest"),
    [
        ((2, 100, 100), (0, 0), 0.9, 0.757),  # the first frame is half of all
        ((2, 100, 100), (0, 0), 0.5, 0.757),
        ((3, 64, 64), (0, 0), 0.64, 0.569),
        ((8, 32, 32), (4096, 4096), 0.8, 0.821),
        ((21, 30, 52), (0, 0), 0.64, None),
        ((21, 17, 23), (0, 0), 0.8, None),
        ((2, 100, 100), (0, 0), 0.0, None),
    ],
)
def test_sparsity_out_of_reach_is_told_with_what_the_grid_allows(grid, text, sparsity, lowest):
    table = block_tables(VideoLayout(grid, text), sparsity=sparsity, patterns=PATTERNS)
    told = table.out_of_reach(sparsity)
    assert (told is None) == (lowest is None)
    if told is not None:
        shown = "x".join(map(str, grid))
        assert told.startswith(f"sparsity={sparsity} is out of reach for grid {shown}")
        assert told.endswith(f"lowest density {lowest}")
        assert min(table.densities) == pytest.approx(lowest, abs=1e-3)


def test_tables_of_the_largest_shape_are_small_and_quick():
    layout = VideoLayout((33, 45, 80), (0, 256))
    seconds, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # others' waits would count: the machine may be busy with other tests
    for _ in range(3):
        block_tables.cache_clear()
        start = time.process_time()
        table = block_tables(layout, sparsity=0.64, patterns=PATTERNS)
        seconds.append(time.process_time() - start)
    torch.set_num_threads(threads)
    assert min(seconds) < 2.0, seconds
    assert table.nbytes < 64e6


def test_tables_are_cached_by_value_and_never_shared_between_grids():
    def make(grid, **kwargs):
        return block_tables(VideoLayout(grid), **({"sparsity": 0.5, "patterns": PATTERNS} | kwargs))

    assert make((4, 6, 10)) is make((4, 6, 10))
    assert make((4, 6, 10)) is not make((4, 10, 6))
    assert make((4, 6, 10), sparsity=0.6) is not make((4, 6, 10))


@given(tables())
def test_samples_are_video_tokens_spread_over_the_video(table):
    samples = table.samples.long()
    video, _, _, _ = table.layout.coordinates()
    assert bool((video[samples] >= 0).all())
    assert len(samples.unique()) == len(samples)


def test_samples_reach_every_frame_and_every_quarter_of_the_frame():
    table = block_tables(VideoLayout((33, 45, 80)), sparsity=0.64, patterns=PATTERNS)
    _, t, h, w = (c[table.samples.long()] for c in table.layout.coordinates())
    assert set(t.tolist()) == set(range(1, 33))  # the first frame sees everything anyway
    quarter = h // 23 * 2 + w // 40
    assert torch.bincount(quarter, minlength=4).min() > len(t) / 8


def test_in_pattern_refuses_unknown_names():
    point = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="spatial, temporal, textural"):
        in_pattern("diagonal", point, point, {"diagonal": 2})


@pytest.mark.parametrize("grid", [(0, 4, 4), (4, 4), (4.0, 4, 4), (True, 4, 4), "444"])
def test_impossible_grids_are_refused(grid):
    with pytest.raises(ValueError, match="grid must be 3 integers, each at least 1; got"):
        VideoLayout(grid)
