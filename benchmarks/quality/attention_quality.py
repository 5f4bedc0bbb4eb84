# SPDX-License-Identifier: Apache-2.0
"""How far single attentions of a trained model are from dense ones, for each pattern, and what an oracle would gain.

    python -m benchmarks.quality.attention_quality demo
    python -m benchmarks.quality.attention_quality scenes --captions 2

Queries, keys and values are those of a dense run, of every layer at a few steps. Errors are relative to the dense
output, over all queries that do not see everything; where keys are sampled they are the expected ones, which have a
closed form. Three tables:

- patterns: each pattern at each sparsity, windows with samples and windows alone; the share of attention they read.
- rows: our rule from 8 to 256 sampled queries, or from one of 2 to 8 keys: what it keeps, what error comes of it, and
  how near that is to the error that it foretold.
- candidates: what the rule keeps if it knew all errors, with our patterns, with RainFusion's three or the adaptive one
  alone, with *profile blocks* (for each head, the key blocks that lie where the sampled queries' error lies, by
  relative place) alone and beside ours, and with an oracle's blocks (those that do hold most of the error); all of
  these fill up with samples.

Writes ``results/quality_attention_<model>_<gpu>.json``.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import measure
from benchmarks.quality.subjects import SUBJECTS, Subject
from benchmarks.quality.video_quality import video_operands
from rainfusion_compile.kernels.cpu import choose_by_error
from rainfusion_compile.kernels.selection import rank_blocks
from rainfusion_compile.options import PRESETS, Options
from rainfusion_compile.sparsity import block_tables as tables_module
from rainfusion_compile.sparsity.block_tables import BLOCK_K, BLOCK_Q, SAMPLES, BlockTables, ProbeTables
from rainfusion_compile.sparsity.blocks import Blocks
from rainfusion_compile.sparsity.layout import VideoLayout

STEPS = (0.1, 0.35, 0.6, 0.85)  # of the schedule, where attentions are looked at
ROWS = (8, 16, 32, 64, 128, 256)
STRIDES = (2, 4, 8)  # one of so many keys is read, by the usual number of queries
BUDGETS = tuple(PRESETS.values())
SHARES = (0.5, 0.0)  # of what is read besides text and first frame: windows, the rest samples
CELL = 4  # rows and columns that profile blocks take together


@dataclass(frozen=True, eq=False)
class Reads:
    """What each candidate lists for some queries: bool ``[C, n, S]`` by token, and how many keys beside itself each
    sampled one stands for, ``[C, n]``, -1 where what is not read is dropped. How many key blocks heads select beside
    those, and the queries' blocks ``[n]``."""

    kept: Tensor
    excess: Tensor
    selected: tuple[int, ...]
    query_blocks: Tensor

    def read(self, x: Tensor, rank: Tensor) -> Tensor:
        """Sums over the keys that candidates read whole, ``[H, C, n]`` of ``x [H, n, S]``; ``rank [H, n, S]``: that of
        each key's block for the head and the query block, among those that may be selected."""
        sums = []
        for kept, selected in zip(self.kept, self.selected, strict=True):
            whole = kept.expand(len(x), -1, -1) if not selected else kept | (rank < selected)
            sums.append((whole.to(x.dtype) * x).sum(-1))
        return torch.stack(sums, dim=1)

    def errors(self, spread: Tensor, rank: Tensor) -> Tensor:
        """Expected squared errors ``[H, C]`` of candidates that sample, of ``spread [H, n, S]``."""
        return ((spread.sum(-1)[:, None] - self.read(spread, rank)) * self.excess).sum(-1)

    def recall(self, p: Tensor, rank: Tensor) -> Tensor:
        """The share of attention read ``[H, C]``, keys that stand for others counted once; ``p [H, n, S]``."""
        read = self.read(p, rank)
        some = torch.where(self.excess < 0, 0.0, 1 / (self.excess + 1))
        return (read + (1 - read) * some).mean(-1)


def reads(tables: BlockTables, query_blocks: Tensor) -> Reads:
    """Of every candidate for the queries of these blocks (one row for each)."""
    tokens, candidates = tables.layout.tokens, len(tables.patterns)
    kept = torch.zeros(candidates, len(query_blocks), tokens, dtype=torch.bool)
    excess = torch.zeros(candidates, len(query_blocks))
    for c in range(candidates):
        for n, row in enumerate(tables.rows[c, query_blocks].tolist()):
            blocks = tables.indices[tables.row_ptr[row] : tables.row_ptr[row + 1]].tolist()
            sampled = 0 if int(tables.sampled[row, 2]) else int(tables.sampled[row, 0])
            kept[c, n, torch.cat([tables.key_blocks[i] for i in blocks[sampled:]])] = True
            alone = bool((tables.excess[c] < 0).all())
            excess[c, n] = -1.0 if alone else 2.0 ** float(tables.weight[row]) - 1
    selected = tuple(tables.selected.tolist()) or (0,) * candidates
    return Reads(kept, excess, selected, query_blocks)


def to(device: torch.device, one: Reads) -> Reads:
    return replace(one, **{name: getattr(one, name).to(device) for name in ("kept", "excess", "query_blocks")})


def probabilities(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention ``p [H, n, S]``, output ``[H, n, D]`` and ``p^2 |v - o|^2 [H, n, S]`` of n queries, float32."""
    q, k, v = (x.float() for x in (q, k, v))
    p = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    out = p @ v
    far = v.square().sum(-1)[:, None] - 2 * out @ v.transpose(1, 2) + out.square().sum(-1, keepdim=True)
    return p, out, p.square() * far.clamp_min(0)


class ShapedBlocks:
    """Candidates whose windows are the key blocks of highest score, filled up with even samples of the others."""

    def __init__(self, blocks: Blocks, ladder: tuple[float, ...], query_blocks: Tensor, device: torch.device) -> None:
        self.order, self.ladder = blocks.order.to(device), ladder
        self.always = blocks.always[query_blocks].to(device)  # [n, nB]
        self.n_b, self.full = blocks.n_b, float(blocks.full_rows.float().mean())

    def candidates(self, score: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
        """Expected errors ``[H, C]`` and densities ``[C]``, of scores and of what not reading costs, ``[H, n, nB]``."""
        always = self.always.float().mean(-1)  # [n]
        ranked = score.masked_fill(self.always, float("inf")).argsort(-1, descending=True)
        lost = lost.masked_fill(self.always, 0.0).gather(-1, ranked)
        left = lost.flip(-1).cumsum(-1).flip(-1)  # [.., i]: of the blocks from rank i on
        left = F.pad(left, (0, 1))
        errors, densities = [], []
        for sparsity in self.ladder:
            for share in SHARES:
                extra = (1 - sparsity - always).clamp_min(0)
                windows = ((always + extra * share) * self.n_b).round().clamp(max=self.n_b)
                window = windows / self.n_b
                stride = ((1 - window) / (1 - sparsity - window).clamp_min(1e-3)).round().clamp(1, 64)
                at = windows.long().view(1, -1, 1).expand(len(score), -1, 1)
                errors.append(((stride - 1) * left.gather(-1, at)[..., 0]).sum(-1))
                density = (window + (1 - window) / stride).mean()  # of queries that do not see everything
                densities.append(self.full + (1 - self.full) * density)
        return torch.stack(errors, 1), torch.stack(densities).cpu()


class Profile:
    """Where the error of sampled queries lies, by place relative to theirs; text keys each by themselves."""

    def __init__(self, layout: VideoLayout, blocks: Blocks, query_blocks: Tensor, device: torch.device) -> None:
        place = torch.stack(layout.coordinates()[1:])  # [3, S]
        self.place = (place // torch.tensor([1, CELL, CELL])[:, None]).to(device)
        self.video = (place[0] >= 0).to(device)
        sizes = [int(x.max()) + 1 for x in self.place]
        self.sizes, self.cells = sizes, (2 * sizes[0] - 1) * (2 * sizes[1] - 1) * (2 * sizes[2] - 1)
        self.order, self.block_k = blocks.order.to(device), blocks.block_k
        centre = (query_blocks * blocks.block_q + blocks.block_q // 2).clamp(max=layout.tokens - 1)
        self.centres = blocks.order[centre].to(device)

    def cell(self, queries: Tensor) -> Tensor:
        """The relative place of each key, int64 ``[n, S]``."""
        apart = self.place[:, None] - self.place[:, queries][:, :, None]
        t, h, w = (x + size - 1 for x, size in zip(apart, self.sizes, strict=True))
        return ((t * (2 * self.sizes[1] - 1) + h) * (2 * self.sizes[2] - 1) + w).clamp(0, self.cells - 1)

    def scores(self, queries: Tensor, spread: Tensor) -> Tensor:
        """``[H, query blocks, nB]`` from the error of the sampled queries ``[H, n, S]``."""
        heads, cell = len(spread), self.cell(queries)[:, self.video]
        index = cell.flatten().expand(heads, -1)
        profile = torch.zeros(heads, self.cells, device=spread.device)
        profile.scatter_add_(1, index, spread[:, :, self.video].flatten(1))
        count = torch.bincount(cell.flatten(), minlength=self.cells).clamp_min(1)
        by_key = (profile / count)[:, self.cell(self.centres)]
        by_key = torch.where(self.video, by_key, spread.mean(1, keepdim=True))
        return by_blocks(by_key, self.order, self.block_k)


def by_blocks(x: Tensor, order: Tensor, block: int) -> Tensor:
    """Sums over key blocks, ``[H, n, S]`` to ``[H, n, nB]``."""
    x = x[..., order]
    return F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


class Study:
    """Looks at attentions one by one and adds up what it finds."""

    def __init__(self, layout: VideoLayout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        blocks = Blocks(layout, BLOCK_Q, BLOCK_K)
        self.query_blocks = (~blocks.full_rows).nonzero().flatten()
        self.options = Options()
        self.with_samples = self.options.tables(layout)
        self.alone = Options(arm="recall", sparsity=self.options.sparsity).tables(layout)
        order = blocks.order.split(BLOCK_Q)
        self.queries = [order[block].to(device) for block in self.query_blocks.tolist()]
        self.truth = to(device, reads(self.with_samples, self.query_blocks))
        self.truth_alone = to(device, reads(self.alone, self.query_blocks))
        self.probes = {(rows, 1): self.probe(rows, 1, blocks) for rows in ROWS}
        self.probes |= {(SAMPLES, stride): self.probe(SAMPLES, stride, blocks) for stride in STRIDES}
        self.shaped = ShapedBlocks(blocks, self.options.ladder, self.query_blocks, device)
        self.profile = Profile(layout, blocks, self.query_blocks, device)
        self.found: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)

    def probe(self, rows: int, stride: int, blocks: Blocks) -> tuple[ProbeTables, Reads]:
        """What the probe knows, and what the candidates read of its keys for each sampled query."""
        tables_module.block_tables.cache_clear()
        with (
            mock.patch.object(tables_module, "SAMPLES", rows),
            mock.patch.object(tables_module, "_probe_stride", return_value=stride),
        ):
            tables = self.options.tables(self.layout)
        tables_module.block_tables.cache_clear()
        position = blocks.order.argsort()[tables.samples.long()]
        own = reads(tables, position // BLOCK_Q)
        own = replace(own, kept=own.kept[..., tables.keys.long()])
        return tables.to(self.device).probe_arguments, to(self.device, own)

    def look(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """At one sample's attention, ``[H, S, D]`` each."""
        p, out, spread = [], [], []
        ranks = self.ranks(q, k, self.with_samples.to(self.device))[..., self.shaped.order.argsort() // BLOCK_K]
        left_out = []
        for n, queries in enumerate(self.queries):  # a block at a time: all pairs at once may not fit
            p_n, out_n, spread_n = probabilities(q[:, queries], k, v)
            p.append(p_n.mean(1))
            spread.append(spread_n.sum(1))
            out.append(out_n.square().sum((1, 2)))
            kept = self.truth_alone.kept[:, n].float()
            left_out.append(torch.stack([self.dropped(p_n, out_n, v.float(), keys) for keys in kept], dim=1))  # [H, C]
        p_all, spread_all = torch.stack(p, 1), torch.stack(spread, 1)  # [H, blocks, S]
        energy = torch.stack(out, 1).sum(1)  # [H]
        rank = ranks[:, self.query_blocks.to(self.device)]
        errors = self.truth.errors(spread_all, rank)
        self.patterns("samples", self.with_samples, errors, self.truth.recall(p_all, rank), energy)
        self.patterns("alone", self.alone, torch.stack(left_out).sum(0), self.truth_alone.recall(p_all, rank), energy)

        density = torch.tensor(self.with_samples.densities)
        for (rows, stride), (tables, probe) in self.probes.items():
            samples, keys = tables.samples.long(), tables.keys.long()
            _, own, own_spread = probabilities(q[:, samples], k[:, keys], v[:, keys])
            own_ranks = self.ranks(q, k, tables)[:, probe.query_blocks]
            measured = probe.errors(own_spread, own_ranks[..., torch.arange(len(keys)) * stride // BLOCK_K]) / stride
            squares = own.square().sum(-1)
            own_energy = torch.maximum(squares - (1 - 1 / stride) * own_spread.sum(-1), squares / stride).sum(1)
            for budget, choice in chosen(measured, own_energy, density).items():
                share, error = outcome(choice, errors, energy, density)
                foretold = outcome(choice, measured, own_energy, density)[1]
                self.record("rows", rows, stride, budget, share, error, error / foretold if foretold else 1.0)
            if (rows, stride) == (SAMPLES, 1):
                in_order = torch.empty_like(own_spread).index_copy_(-1, keys, own_spread)
                score = self.profile.scores(samples, in_order)
        lost = by_blocks(spread_all, self.shaped.order, BLOCK_K)
        ours, ideal = (errors, density), self.shaped.candidates(lost, lost)
        profiled = self.shaped.candidates(score, lost)
        adaptive = torch.tensor([name == "adaptive" for name in self.with_samples.patterns])
        families = {
            "ours": ours,
            "spatial, temporal and textural": (errors[:, ~adaptive], density[~adaptive]),
            "adaptive": (errors[:, adaptive], density[adaptive]),
            "profile blocks": profiled,
            "ours and profile blocks": both(ours, profiled),
            "oracle": ideal,
        }
        for name, (known, at) in families.items():
            for budget, choice in chosen(known, energy, at).items():
                self.record("candidates", name, budget, *outcome(choice, known, energy, at))

    def ranks(self, q: Tensor, k: Tensor, tables: BlockTables | ProbeTables) -> Tensor:
        """The rank of every key block for every query block of a head, ``[H, nQ, nB]``."""
        return torch.stack([rank_blocks(*head, None, tables, 1.0) for head in zip(q, k, strict=True)])

    def dropped(self, p: Tensor, out: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        """Squared error ``[H]`` of queries that see these keys only, ``[S]``."""
        own = p * keys
        return (own @ v / own.sum(-1, keepdim=True) - out).square().sum((1, 2))

    def patterns(self, kind: str, tables: BlockTables, errors: Tensor, recall: Tensor, energy: Tensor) -> None:
        relative = (errors / energy[:, None]).sqrt().mean(0).tolist()
        for c, (error, read) in enumerate(zip(relative, recall.mean(0).tolist(), strict=True)):
            width = "" if kind == "alone" else f"{tables.radii[c]}"
            self.record(
                "patterns", kind, tables.patterns[c], tables.sparsities[c], width, tables.densities[c], error, read
            )

    def record(self, table: str, *what: Any) -> None:
        """The last are figures of this attention, what stands before them is what they are of."""
        figures = 3 if table == "rows" else 2
        key = (table, *what[:-figures])
        self.found[key].append(what[-figures:])

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Means over the attentions; errors as roots of mean squares."""
        names = {
            "patterns": ("kind", "pattern", "sparsity", "window", "density", "error", "recall"),
            "rows": ("sampled_queries", "one_key_of", "budget", "density", "error"),
            "candidates": ("candidates", "budget", "density", "error"),
        }
        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for (table, *what), figures in self.found.items():
            first, second, *ratios = (list(column) for column in zip(*figures, strict=True))
            last = statistics.mean(second) if table == "patterns" else statistics.mean(x * x for x in second) ** 0.5
            row = dict(zip(names[table], (*what, statistics.mean(first), last), strict=True))
            if ratios:
                row["foretold_within_1.3"] = statistics.mean(1 / 1.3 < ratio < 1.3 for ratio in ratios[0])
                row["error_over_foretold_most"] = max(ratios[0])
            tables[table].append(row)
        return tables


def both(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Errors and densities of either's candidates."""
    return torch.cat([one[0], other[0]], 1), torch.cat([one[1], other[1]])


def chosen(errors: Tensor, energy: Tensor, density: Tensor) -> dict[float, Tensor]:
    """What the rule takes for each head under each of the budgets, int64 ``[H]``; the last candidate is dense."""
    given = torch.cat([errors, energy[:, None]], 1).float().cpu().expand(len(BUDGETS), -1, -1)
    choices = choose_by_error(given, density.float(), torch.tensor(BUDGETS)[:, None, None])
    return dict(zip(BUDGETS, choices.long(), strict=True))


def outcome(choice: Tensor, errors: Tensor, energy: Tensor, density: Tensor) -> tuple[float, float]:
    """Mean density of the heads, and the layer's relative error."""
    spent = F.pad(errors.cpu(), (0, 1)).gather(1, choice[:, None]).sum()
    kept = F.pad(density, (0, 1), value=1.0)[choice].mean()
    return float(kept), float((spent / energy.sum().cpu()).clamp_min(0).sqrt())


class Looks(Protocol):
    """What looks at one sample's attention, ``[H, S, D]`` each, over a video of this layout."""

    layout: VideoLayout

    def look(self, q: Tensor, k: Tensor, v: Tensor) -> None: ...


class Look(TorchFunctionMode):
    """Shows every self-attention over the video to a study, or to what else looks at it, while it is on."""

    def __init__(self, study: Looks) -> None:
        super().__init__()
        self.study, self.on, self.seen = study, False, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.on:
            operands = video_operands(args, kwargs, self.study.layout.tokens)
            for sample in zip(*operands, strict=True) if operands is not None else ():
                self.study.look(*sample)
                self.seen += 1
        return func(*args, **kwargs)


def study(subject: Subject, steps: int) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """The tables, and how many attentions were looked at."""
    found = Study(subject.layout, subject.noise.device)
    look = Look(found)
    chosen_steps = {round(share * steps) for share in STEPS}

    def before(step: int) -> None:
        look.on = step in chosen_steps

    with look:
        subject.sample(before, steps)
    return found.rows(), look.seen


def show(tables: dict[str, list[dict[str, Any]]]) -> None:
    for name, rows in tables.items():
        print(name)
        for row in rows:
            print("  " + "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(SUBJECTS))
    parser.add_argument("--weights", type=Path, help="folder of the model; by default the committed one")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--captions", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    subject = SUBJECTS[args.model](args.captions, args.device, None, args.weights)
    tables, seen = study(subject, args.steps)
    show(tables)
    out = args.out or measure.result_path(f"quality_attention_{args.model}")
    facts = {"model": args.model, "captions": args.captions, "steps": args.steps, "attentions": seen}
    measure.write_result(out, facts | tables)


if __name__ == "__main__":
    with torch.no_grad():
        main()
