# SPDX-License-Identifier: Apache-2.0
"""What Dynamo and this backend make of one model: a ``Row``."""

from __future__ import annotations

import copy
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from benchmarks.zoo.case import Text
from benchmarks.zoo.classes import BUILDERS, ModelCase
from rainfusion_compile import observe
from rainfusion_compile.report import Report
from rainfusion_compile.sparsity.layout import Grids, as_grids

OPTIONS: dict[str, Any] = {"sparsity": 0.0, "min_tokens": 0}
TOLERANCE = 1e-4
"""How far an output may be from the dense one, relative to the dense one's largest value."""


@dataclass
class Verdict:
    """What the backend made of the attentions over the video.

    Attributes:
        found: grids and texts that it reported for what it made sparse.
        rewritten: how many became sparse, with the right grid and text. wrong: attentions made sparse that should not
            be, or with another layout.
        reasons: why the others are dense, and how many for each reason.
        same: whether ``sparsity=0`` gives the dense output; None if nothing became sparse.
    """

    found: list[tuple[Any, tuple[int, ...]]] = field(default_factory=list)
    rewritten: int = 0
    wrong: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    same: bool | None = None

    def complete(self, video: int) -> bool:
        """Whether it is all of so many attentions over the video, and rightly so."""
        return self.rewritten == video > 0 and not self.wrong and bool(self.same)


@dataclass
class Row:
    """One model: what is true of it, and what came out.

    Attributes:
        name, variant: of the builder. note: of the builder.
        grid, text: as they are.
        mask: of the attentions over the video. video: how many of them one eager forward makes.
        graphs, graphs_ours: Dynamo's graphs under its own and under this backend; breaks: why there are several.
        fullgraph, fullgraph_ours: whether ``fullgraph=True`` works.
        normal: as models are compiled by default. whole: with ``fullgraph=True``, where that works and is not the same.
        blocks: with each block compiled by itself, the rest not at all.
        error: why there is no result.
    """

    name: str
    variant: str
    grid: Grids | None = None
    text: Text = (0, 0)
    note: str = ""
    mask: str = ""
    video: int = 0
    graphs: int = 0
    graphs_ours: int = 0
    breaks: list[str] = field(default_factory=list)
    fullgraph: bool = False
    fullgraph_ours: bool = False
    normal: Verdict = field(default_factory=Verdict)
    whole: Verdict | None = None
    blocks: Verdict | None = None
    error: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name

    @property
    def complete(self) -> bool:
        """Everything over the video rewritten, and rightly so; where Dynamo gives up by default, with fullgraph."""
        return not self.error and any(one.complete(self.video) for one in (self.normal, self.whole) if one)

    @property
    def shown(self) -> Verdict:
        """What the table tells: what is so by default, unless only ``fullgraph=True`` gets everything."""
        better = self.whole is not None and self.whole.complete(self.video) and not self.normal.complete(self.video)
        return self.whole if better and self.whole is not None else self.normal


class Watch(TorchFunctionMode):
    """Counts an eager model's attentions over the video, and can silence them."""

    def __init__(self, tokens: int, *, silence: bool = False) -> None:
        super().__init__()
        self.tokens, self.silence = tokens, silence
        self.masks: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return out
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        if over_video(given["query"].shape[-2], given["key"].shape[-2], self.tokens):
            self.masks.append(mask_in_words(given.get("attn_mask"), bool(given.get("is_causal"))))
            return torch.zeros_like(out) if self.silence else out
        return out


def over_video(queries: int, keys: int, tokens: int) -> bool:
    """Whether an attention is one over the video: it may have more keys than queries, as from a cache."""
    return queries == tokens and keys >= tokens


def mask_in_words(mask: Tensor | None, causal: bool) -> str:
    if mask is None:
        return "causal" if causal else "none"
    of_keys = mask.dim() < 2 or mask.shape[-2] == 1 or mask.stride(-2) == 0
    kind = "bool" if mask.dtype == torch.bool else "additive"
    return f"keys, {kind}" if of_keys else f"queries x keys, {kind}"


def seed_weights(model: nn.Module) -> None:
    """Give weights that start as zeros a value, lest an attention's output be multiplied by them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.detach().any():
            parameter.detach().normal_(0, 0.1, generator=generator)


def call(model: Callable[..., Any], case: ModelCase) -> list[Tensor]:
    """The tensors that one forward returns. Inputs are copied: some models write into theirs."""
    with torch.no_grad():
        out = model(**copy.deepcopy(case.inputs))
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def same(out: list[Tensor], dense: list[Tensor]) -> bool:
    return all(error <= TOLERANCE for error in errors(out, dense))


def errors(out: list[Tensor], dense: list[Tensor]) -> list[float]:
    """How far outputs are from the dense ones, each relative to the dense one's largest value."""
    pairs = zip(out, dense, strict=True)
    return [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]


@contextmanager
def without_inductor() -> Iterator[None]:
    """Let the backend hand its graphs to nothing instead of Inductor; Dynamo and our passes run as ever."""
    found = torch._dynamo.lookup_backend

    def eager(gm: fx.GraphModule, example_inputs: list[Any], **config: Any) -> Callable[..., Any]:
        return gm.forward

    torch._dynamo.lookup_backend = lambda name: eager if name == "inductor" else found(name)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch._dynamo.lookup_backend = found


@dataclass
class Compiled:
    """One compiled forward."""

    out: list[Tensor]
    report: Report
    graphs: int


def compiled(case: ModelCase, *, fullgraph: bool = False, **backend: Any) -> Compiled:
    """Compile and run a model.

    As one graph, Dynamo also takes operators whose result has a size that depends on data, so what it makes of a model
    is not the same with and without ``fullgraph``.
    """
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with observe() as report:
        out = call(torch.compile(case.model, fullgraph=fullgraph, **backend), case)
    return Compiled(out, report, counters["stats"]["unique_graphs"])


def as_one(case: ModelCase, normal: Compiled, **backend: Any) -> Compiled | None:
    """The model under ``fullgraph=True``; None if that fails. Where nothing breaks anyway, that makes no difference."""
    if normal.graphs == 1:
        return normal
    try:
        return compiled(case, fullgraph=True, **backend)
    except Exception:
        return None


def recorder(breaks: set[str]) -> Callable[..., Any]:
    """A backend that does nothing but note why a graph ended before its frame did."""

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        why = getattr(gm, "compile_subgraph_reason", None)
        if why is not None and why.graph_break:
            place = f" in {why.user_stack[-1].name}" if why.user_stack else ""
            breaks.add(first_line(why.reason) + place)
        return gm.forward

    return record


def first_line(text: str) -> str:
    """What Dynamo says first, without addresses and places of this machine."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"0x[0-9a-f]+|/\S*/", "", lines[0]) if lines else "unknown"


def judge(case: ModelCase, run: Compiled, dense: list[Tensor], total: int) -> Verdict:
    """What was found, what became sparse and why the rest did not."""
    verdict = Verdict()
    reasons: Counter[str] = Counter()
    for attention in run.report.to_dict()["attentions"]:
        if attention["eager"]:
            continue  # what `total` has besides the others, if it is the model's
        tokens, reason, calls = attention["tokens"], attention["reason"] or "", attention["calls"]
        keys = re.match(r"cross-attention: \d+ queries, (\d+) keys", reason)
        sizes = tokens or 0, int(keys[1]) if keys else tokens or 0
        layout = _tuples(attention["grid"] or ()), _tuples(attention["text"] or ())
        right = _as_frames(*layout) == _as_frames(case.grid, case.text)
        if attention["status"] == "sparse" and (not right or not over_video(*sizes, case.tokens)):
            verdict.wrong += calls
        elif attention["status"] == "sparse":
            verdict.rewritten += calls
        elif over_video(*sizes, case.tokens) or tokens is None:
            reasons[reason] += calls
        if attention["status"] == "sparse" and layout not in verdict.found:
            verdict.found.append(layout)
    seen = verdict.rewritten + verdict.wrong + reasons.total()
    if total > seen:
        reasons["in no graph: Dynamo leaves the frame to Python"] = total - seen
    verdict.reasons = dict(sorted(reasons.items()))
    if verdict.rewritten + verdict.wrong:
        verdict.same = same(run.out, dense)
    return verdict


def _as_frames(grid: Any, text: Sequence[int]) -> list[tuple[int, ...]]:
    """A layout, whether frames that follow each other are called one video or several."""
    found: list[tuple[int, ...]] = [(text[0],)] if text else []
    for (time, height, width), after in zip(as_grids(grid) if grid else (), text[1:], strict=True):
        if len(found) > 1 and found[-1] == (0,) and found[-2][1:] == (height, width):
            found[-2:] = [(found[-2][0] + time, height, width), (after,)]
        else:
            found += [(time, height, width), (after,)]
    return found


def compile_blocks(model: Any, **backend: Any) -> None:
    """Let the blocks of a model be compiled by themselves: as diffusers does it, where a class names its blocks."""
    torch._dynamo.reset()
    if getattr(model, "_repeated_blocks", None) and hasattr(model, "compile_repeated_blocks"):
        model.compile_repeated_blocks(**backend)
    else:
        for blocks in model.children():
            for block in blocks if isinstance(blocks, nn.ModuleList) else ():
                block.compile(**backend)


def by_blocks(case: ModelCase, **backend: Any) -> Compiled:
    """The model with its blocks compiled by themselves."""
    compile_blocks(case.model, **backend)
    with observe() as report:
        out = call(case.model, case)
    return Compiled(out, report, 0)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def measure(name: str, variant: str, *, inductor: bool = False) -> Row:
    """The row of one model; one that cannot be built, run or compiled says why."""
    try:
        return _measure(name, variant, inductor)
    except Exception as problem:
        traceback.print_exc()
        return Row(name, variant, error=f"{type(problem).__name__}: {first_line(str(problem))}")


def _measure(name: str, variant: str, inductor: bool) -> Row:
    torch.manual_seed(0)
    case = BUILDERS[name, variant]()
    seed_weights(case.model)
    row = Row(name, variant, case.grid, case.text, case.note)
    with Watch(case.tokens) as watch:
        dense = call(case.model, case)
    with Watch(case.tokens, silence=True):
        matters = not same(call(case.model, case), dense)
    if not all(bool(tensor.isfinite().all()) for tensor in dense) or (watch.masks and not matters):
        row.error = "this builder is no test: its output is not finite, or does not depend on the attention"
        return row
    count, what = case.otherwise
    row.video, row.mask = len(watch.masks) + count, "; ".join(sorted(set(watch.masks)))
    backend: dict[str, Any] = {"backend": "rainfusion", "options": OPTIONS}
    breaks: set[str] = set()
    plain = compiled(case, backend=recorder(breaks))
    row.graphs, row.breaks = plain.graphs, sorted(breaks)
    row.fullgraph = as_one(case, plain, backend="eager") is not None
    with nullcontext() if inductor else without_inductor():
        ours = compiled(case, **backend)
        whole = as_one(case, ours, **backend)
    row.graphs_ours, row.fullgraph_ours = ours.graphs, whole is not None
    row.normal = judge(case, ours, dense, len(watch.masks))
    if whole is not None and whole is not ours:
        row.whole = judge(case, whole, dense, len(watch.masks))
    with nullcontext() if inductor else without_inductor():
        row.blocks = judge(case, by_blocks(case, **backend), dense, len(watch.masks))
    for verdict in filter(None, (row.normal, row.whole, row.blocks)):
        if count:
            verdict.reasons[what] = count
    return row
