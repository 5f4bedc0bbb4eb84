# SPDX-License-Identifier: Apache-2.0
"""Token order, patterns and block tables: what they promise, for any grid."""

import time

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import block_sizes, layouts, tables

from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.block_tables import BlockTables, block_tables, key_blocks
from rainfusion_compile.sparsity.blocks import Blocks
from rainfusion_compile.sparsity.candidates import MAX_CANDIDATES, most_candidates
from rainfusion_compile.sparsity.layout import Grid, VideoLayout
from rainfusion_compile.sparsity.patterns import BY_NAME, PATTERNS, in_pattern, pattern_mask
from rainfusion_compile.sparsity.sampled_keys import with_samples
from rainfusion_compile.sparsity.token_order import token_order


def pairs(
    table: BlockTables, candidate: int, phase: int = 0, *, selects: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token pairs are read one by one, and which as samples, by their weight; float64 ``[tokens, tokens]``.

    Of a candidate whose heads select key blocks, as if they selected the last ones, or what it lists alone.
    """
    tokens = table.layout.tokens
    exact, sampled = (torch.zeros(tokens, tokens, dtype=torch.float64) for _ in range(2))
    for query, row in zip(table.order.long().split(table.block_q), table.rows[candidate].tolist(), strict=True):
        blocks = table.indices[table.row_ptr[row] : table.row_ptr[row + 1]].tolist()
        count, phases, selected, granules, _ = table.sampled[row].tolist()
        if selected and not selects:
            count = 0
        elif selected:
            free, each = table.free.nonzero().flatten().tolist(), table.block_k // phases
            start, count = granules * table.block_k + phase % phases * len(table.free) * each, 0
            own = [table.key_order[start + i * each :][:each].long() for i in free[:-selected]]
            sampled[query[:, None], torch.cat(own)[None, :]] += 2.0 ** float(table.weight[row])
            blocks += [len(table.key_blocks) - 2 * len(table.free) + i for i in free[-selected:]]
        for place, block in enumerate(blocks):
            drawn = place < count
            key = table.key_blocks[block + phase % phases * drawn]
            (sampled if drawn else exact)[query[:, None], key[None, :]] += 2.0 ** float(table.weight[row] * drawn)
    return exact, sampled


def phases_of(table: BlockTables, candidate: int) -> int:
    return int(table.sampled[table.rows[candidate].long(), 1].max())


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
def test_rows_cover_the_window_and_name_tokens_once_in_each_phase(table):
    for number, name in enumerate(table.patterns):
        radius, phases = table.radii[number]
        assert phases_of(table, number) in (1, phases)
        window = pattern_mask(name, table.layout, {name: radius})
        for phase in {0, phases_of(table, number) - 1}:
            exact, sampled = pairs(table, number, phase)
            assert bool((exact >= window).all()), name
            assert int(((exact != 0).int() + (sampled != 0).int()).max()) == 1
            assert float(exact.max()) == 1
            assert ((exact + sampled) != 0).double().mean().item() == pytest.approx(table.densities[number], abs=1e-12)
    exact, sampled = pairs(table, len(table.patterns))
    assert bool((exact == 1).all())
    assert not bool(sampled.any())


@given(tables())
def test_samples_stand_for_all_that_is_not_read_one_by_one(table):
    for number, (_, phases) in enumerate(table.radii):
        exact, sampled = pairs(table, number)
        if phases:
            total = (exact + sampled).mean(1)
            torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=0)
        else:
            assert not bool(sampled.any())


@given(tables(sampled=st.just(False)))
@example(block_tables(VideoLayout((1, 5, 4)), sparsity=0.0, patterns=("temporal",), block_q=16, block_k=8))
def test_spatial_and_temporal_blocks_are_kept_only_for_a_reason(table):
    """A block is computed exactly if one of its token pairs is in the pattern, or it is the last and not full; runs too
    where all of `order` is."""
    count = -(-table.layout.tokens // table.block_k)
    extra = len(table.key_blocks) - 2 * count
    for number, name in enumerate(table.patterns):
        if name in ("textural", "adaptive") or table.radii[number][1]:
            continue
        wanted = pattern_mask(name, table.layout, {name: table.radii[number][0]})
        blocks = table.block_mask(number)
        for i, query in enumerate(table.order.long().split(table.block_q)):
            pairs = [bool(wanted[query[:, None], key[None, :]].any()) for key in table.key_blocks]
            listed, runs = pairs[extra : extra + count], pairs[extra + count :]
            if table.layout.tokens % table.block_k:
                listed[-1] = runs[-1] = True
            if name == "temporal" and all(listed):
                runs = listed
            read_runs = bool(blocks[i, extra + count :].any())
            assert read_runs == (name == "spatial" or all(listed))
            kept = [False] * count + runs if read_runs else listed + [False] * count
            assert blocks[i].tolist() == [False] * extra + kept


@given(
    layouts, block_sizes, st.integers(2, 16), st.sampled_from(["spatial", "temporal", "textural"]), st.integers(0, 3)
)
def test_strata_are_what_windows_do_not_touch_and_phases_take_one_key_of_each_run(layout, sizes, stride, name, reach):
    blocks = Blocks(layout, *sizes)
    pattern = BY_NAME[name](blocks)
    window = pattern.cover({"spatial": reach, "temporal": (reach, reach), "textural": None}[name])
    rows = with_samples(blocks, window, pattern.block_order(), stride)
    size, place = blocks.block_k, pattern.block_order()
    keys = rows.keys.view(rows.strata.shape[1], rows.phases, size) if rows.phases else rows.keys.view(0, 1, size)
    owner = torch.full((blocks.n_b,), -1)
    for number, stratum in enumerate(keys):
        assert len(stratum.unique()) == stratum.numel(), "no token twice, over all phases"
        members = torch.unique(stratum // size)
        assert bool((owner[members] < 0).all()), "a block is of one stratum"
        owner[members] = number
        if len(layout.grids) == 1:
            assert rows.phases <= len(members) <= rows.phases + 1
            assert len(members) * size - stratum.numel() <= size, "all phases together leave out one of them at most"
            members = members[place[members].argsort(stable=True)]
            listed = (members[:, None] * size + torch.arange(size)).flatten().tolist()
            runs = torch.tensor([[listed.index(key) // len(members) for key in phase] for phase in stratum.tolist()])
            assert torch.equal(runs, torch.arange(size).expand_as(runs)), "a phase takes one of each run"
            assert len(members) < 2 * stride or len(keys) == 1
    if len(layout.grids) > 1 or not rows.phases:
        return
    assert torch.equal(owner < 0, blocks.full_columns), "all other blocks are in strata"
    for row, strata, mask, weight in zip(window, rows.strata, rows.mask, rows.weight.tolist(), strict=True):
        touched = torch.zeros(len(keys) + 1, dtype=torch.bool).index_fill(0, owner[row & (owner >= 0)], True)[:-1]
        full = bool(row.all())
        assert torch.equal(strata, ~touched) or (full and not bool(strata.any()))
        assert torch.equal(mask, row | (touched[owner] & (owner >= 0))), "windows are filled up to whole strata"
        assert weight * int(strata.sum()) == pytest.approx(int((~mask).sum()) if strata.any() else 0)


@given(tables())
def test_the_probe_counts_the_keys_that_attention_reads(table):
    position, samples = torch.arange(table.layout.tokens), table.samples.long()
    row_of = torch.empty(table.layout.tokens, dtype=torch.int64)
    row_of[table.order.long()] = position // table.block_q
    for number, (name, (_, phases)) in enumerate(zip(table.patterns, table.radii, strict=True)):
        weight = 2.0 ** table.weight[table.rows[number, row_of[samples]].long()]
        excess = weight - 1 if phases else torch.full_like(weight, -1)
        torch.testing.assert_close(table.excess[number], excess, rtol=1e-5, atol=1e-6)
        if BY_NAME[name].reads_runs and not phases:
            continue  # in runs, blocks across two frames hold other tokens than those of `order`
        counted = (table.sample_keep[:, position // table.block_k] >> number) & 1 != 0
        read = pairs(table, number, selects=False)[0][samples][:, table.order.long()] != 0
        assert torch.equal(counted, read), name
    assert bool((table.sample_keep >> len(table.patterns) == 1).all())


def test_directions_keep_squared_lengths_on_average():
    directions = block_tables(VideoLayout((2, 3, 4)), sparsity=0.5, patterns=PATTERNS).directions
    assert not bool(directions[:, 14:].any())
    for dim in (16, 64, 256):
        values = torch.randn(1000, dim, generator=torch.Generator().manual_seed(dim))
        ratio = (values @ directions[:dim]).square().sum(1) / values.square().sum(1)
        assert ratio.mean().item() == pytest.approx(1, abs=0.05)


@given(tables())
def test_candidates_come_sparsest_first_and_rows_are_sorted(table):
    assert list(table.densities) == sorted(table.densities)
    assert torch.equal(table.density, torch.tensor(table.densities))
    assert set(table.patterns) <= set(BY_NAME)
    assert len({*zip(table.patterns, table.densities, table.radii, strict=True)}) == len(table.patterns)
    for start, end in zip(table.row_ptr[:-1].tolist(), table.row_ptr[1:].tolist(), strict=True):
        assert end > start
        assert bool((table.indices[start:end].diff() > 0).all())


@given(tables())
def test_rows_that_keep_everything_or_whole_frames_need_no_gathering(table):
    count = -(-table.layout.tokens // table.block_k)
    first_run = len(table.key_blocks) - count
    assert torch.equal(torch.cat(table.key_blocks[first_run:]), torch.arange(table.layout.tokens))
    in_memory = {*table.rows[-1].tolist()}
    for number, (_, phases) in enumerate(table.radii):
        if BY_NAME[table.patterns[number]].reads_runs and not phases:
            in_memory |= {*table.rows[number].tolist()}
    for row, (start, end) in enumerate(zip(table.row_ptr[:-1].tolist(), table.row_ptr[1:].tolist(), strict=True)):
        runs = table.indices[start:end] >= first_run
        everything = sum(len(table.key_blocks[i]) for i in table.indices[start:end].tolist()) == table.layout.tokens
        everything &= not int(table.sampled[row, 0])
        assert bool(runs.all()) if row in in_memory or everything else not bool(runs.any())


def test_key_blocks_without_any_but_runs():
    blocks = key_blocks(torch.arange(128), 100, 64)
    assert [block.tolist() for block in blocks] == [[*range(64)], [*range(64, 100)]]


@given(layouts, st.booleans())
def test_sparsity_zero_keeps_everything(layout, sampled):
    table = block_tables(layout, sparsity=0.0, patterns=PATTERNS, sampled=sampled, block_q=16, block_k=8)
    assert set(table.densities) == {1.0}
    assert not bool(table.weight.any())


@pytest.mark.parametrize("sparsity", [0.5, 0.64, 0.8])
@pytest.mark.parametrize(("grid", "text"), [((21, 45, 80), (0, 0)), ((33, 45, 80), (0, 256)), ((21, 30, 52), (0, 0))])
@pytest.mark.parametrize("sampled", [True, False])
def test_densities_come_near_to_what_is_asked(grid, text, sparsity, sampled):
    table = block_tables(VideoLayout(grid, text), sparsity=sparsity, patterns=PATTERNS, sampled=sampled)
    assert set(table.patterns) == set(PATTERNS)
    for name, density in zip(table.patterns, table.densities, strict=True):
        # Narrow windows read one key of two, or of three: nothing is between 0.43 and 0.57. And around them, whole
        # strata are read: in small frames, that is a third of the frame.
        assert density == pytest.approx(1 - sparsity, abs=0.08 if sampled and name != "textural" else 0.06)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_ladder_has_what_its_sparsities_have(sampled):
    layout, ladder = VideoLayout((13, 30, 40)), (0.7, 0.6, 0.5)
    table = block_tables(layout, sparsity=ladder, patterns=PATTERNS, sampled=sampled)
    made = set(zip(table.patterns, table.radii, strict=True))
    alone = [block_tables(layout, sparsity=sparsity, patterns=PATTERNS, sampled=sampled) for sparsity in ladder]
    assert made == {one for t in alone for one in zip(t.patterns, t.radii, strict=True)}
    assert {*table.sparsities} == {*ladder}
    assert len(made) == len(table.patterns), "each is there once"


def test_there_are_no_more_candidates_than_bits():
    ten = tuple(number / 20 for number in range(1, 11))
    for names, most in ((PATTERNS, 30), (("spatial", "temporal"), 20), (("adaptive", "textural"), 30)):
        assert most_candidates(len(ten), names) == most
        assert len(block_tables(VideoLayout((21, 30, 52)), sparsity=ten, patterns=names).patterns) <= most
    assert most_candidates(6, tuple(BY_NAME)) == MAX_CANDIDATES


def test_tiny_grids_have_few_candidates():
    ladder = (0.7, 0.6, 0.5)
    tiny = block_tables(VideoLayout((2, 4, 4)), sparsity=ladder, patterns=PATTERNS, block_q=16, block_k=8)
    assert len(tiny.patterns) < 9, "what comes out the same for several sparsities is there once"


@pytest.mark.parametrize(
    ("grid", "text", "sparsity", "sampled", "lowest"),
    [
        ((2, 100, 100), (0, 0), 0.9, False, 0.758),  # the first frame is half of all
        ((2, 100, 100), (0, 0), 0.5, False, 0.758),
        ((2, 100, 100), (0, 0), 0.9, True, 0.769),
        ((3, 64, 64), (0, 0), 0.64, False, 0.569),
        ((3, 64, 64), (0, 0), 0.64, True, 0.583),
        ((8, 32, 32), (4096, 4096), 0.8, False, 0.821),
        ((8, 32, 32), (4096, 4096), 0.8, True, 0.821),
        ((21, 30, 52), (0, 0), 0.64, True, None),
        ((21, 17, 23), (0, 0), 0.8, True, None),
        ((2, 100, 100), (0, 0), 0.0, True, None),
    ],
)
def test_sparsity_out_of_reach_is_told_with_what_the_grid_allows(grid, text, sparsity, sampled, lowest):
    table = block_tables(VideoLayout(grid, text), sparsity=sparsity, patterns=PATTERNS, sampled=sampled)
    assert table.out_of_reach((0.95, sparsity)) == table.out_of_reach(sparsity), "of several, the lowest counts"
    told = table.out_of_reach(sparsity)
    assert (told is None) == (lowest is None)
    if told is not None:
        shown = "x".join(map(str, grid))
        assert told.startswith(f"sparsity={sparsity} is out of reach for grid {shown}")
        assert f"lowest density {lowest}, for text" in told
        assert min(table.densities) == pytest.approx(lowest, abs=1e-3)


@pytest.mark.parametrize(("ladder", "limit"), [((0.64,), 3.0), (Options().ladder, 10.0)], ids=["one", "ladder"])
def test_tables_of_the_largest_shape_are_small_and_quick(ladder, limit):
    layout = VideoLayout((33, 45, 80), (0, 256))
    seconds = []
    while len(seconds) < 3 and min(seconds, default=limit) >= limit:
        block_tables.cache_clear()
        start = time.process_time()
        table = block_tables(layout, sparsity=ladder, patterns=PATTERNS)
        seconds.append(time.process_time() - start)
    assert min(seconds) < limit, seconds
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


@pytest.mark.parametrize(
    ("grid", "sampled", "stride"),
    [((13, 30, 45), True, 1), ((21, 38, 40), True, 1), ((32, 32, 32), True, 2), ((16, 64, 64), True, 4),
     ((33, 45, 80), True, 4), ((33, 45, 80), False, 1)],
)  # fmt: skip
def test_the_probe_reads_an_even_part_of_the_keys_of_a_long_video(grid: Grid, sampled: bool, stride: int):
    """One of every run of positions, so that each block has as many; all keys where candidates drop some."""
    layout = VideoLayout(grid, (3, 40))
    table = block_tables(layout, sparsity=0.64, patterns=PATTERNS, sampled=sampled)
    assert table.stride == stride
    assert bool((table.excess < 0).any()) == (not sampled)
    position = table.order.argsort()[table.keys.long()]
    assert torch.equal(position // stride, torch.arange(-(-layout.tokens // stride)))
    assert stride == 1 or 0.3 < float((position % stride).float().mean()) / (stride - 1) < 0.7, "none is preferred"


def test_in_pattern_refuses_unknown_names():
    point = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="spatial, temporal, textural"):
        in_pattern("diagonal", point, point, {"diagonal": 2})


@pytest.mark.parametrize("grid", [(0, 4, 4), (4, 4), (4.0, 4, 4), (True, 4, 4), "444"])
def test_impossible_grids_are_refused(grid):
    with pytest.raises(ValueError, match=r"grid must be 3 integers, each at least 1 \(frames, rows, columns\); got"):
        VideoLayout(grid)
