# SPDX-License-Identifier: Apache-2.0
"""Sparse attention where it runs outside all graphs: the user says over which video, for nothing else can tell.

Each kind of call is a graph of one attention, so that it is looked at, written and told as in any other graph. It runs
operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from rainfusion_compile.options import Options
from rainfusion_compile.passes.attention_match import DenseReason, Reason
from rainfusion_compile.passes.graph.nodes import SDPA
from rainfusion_compile.passes.normalize import normalize
from rainfusion_compile.passes.provenance.known_tokens import CarriedDim, FromInput, Told
from rainfusion_compile.passes.rewrite.analysis import Plan
from rainfusion_compile.passes.rewrite.notices import Notices
from rainfusion_compile.passes.rewrite.summary import summarize
from rainfusion_compile.passes.rewrite.writer import write
from rainfusion_compile.report import Observed
from rainfusion_compile.runtime.changed_options import Limits
from rainfusion_compile.runtime.eager_calls import EagerCall, taking
from rainfusion_compile.runtime.open_reports import listening
from rainfusion_compile.sparsity.layout import Grids, VideoLayout

MAX_KINDS = 256  # of calls that are remembered
_SAMPLES, _TOKENS = (CarriedDim(None, (), FromInput(0, dim), ("tokens",)) for dim in (0, 2))
SAME_TOKENS = Told(carried=((_SAMPLES, None, _TOKENS, None),) * 3)
"""The user's word: queries, keys and values are of the same tokens, sample by sample."""
_OF_GRAPHS = {
    "dense_steps": "no timestep shows; tell the steps with rainfusion_compile.dense_first_steps",
    "dense_layers": "no layer is told from another; open the context around those that are to be sparse",
    "inductor": "nothing is compiled",
    "inductor_mode": "nothing is compiled",
}


@contextmanager
def sparse_eager_attention(grid: Grids, text: tuple[int, ...] | None = None, **options: Any) -> Iterator[None]:
    """Make attention sparse that runs outside all graphs in this context, in this thread: of models that are not
    compiled, in functions that are kept from the compiler, in frames that it left to Python.

    It takes calls of ``scaled_dot_product_attention`` whose queries, keys and values are as many tokens as the grid and
    text have, and nothing else, for outside of graphs sizes are all that is known: that attention over that many tokens
    is self-attention over this video is your word. Cross-attention from one video to another of the same size is not
    told apart. What has another mask than one of keys, is causal, drops out, or needs gradients is computed as it was,
    and a warning says so. Compiled graphs are none of its business; nothing is compiled, or compiled again, for it.

    Open it once, around all steps: what is known of each kind of call is kept as long. Of several the innermost counts.
    :func:`changed_options` and :func:`dense_first_steps` hold here as well.

    Example::

        with rainfusion_compile.sparse_eager_attention(grid=(21, 45, 80), error=0.04):
            video = pipe(prompt).frames[0]

    Args:
        grid: ``(T, H, W)`` in tokens; a tuple of such for several videos in one sequence.
        text: ``(before, after)``, the text tokens around the video (one number more than there are videos); none by
            default.
        options: all others of :class:`Options` but ``dense_steps``, ``dense_layers``, ``inductor`` and
            ``inductor_mode``, which are those of graphs.

    Raises:
        ValueError: on an impossible grid, text or option.
        RuntimeError: in a call, with ``strict``, if attention over at least ``min_tokens`` tokens stays dense unasked.
    """
    for name in _OF_GRAPHS.keys() & options.keys():
        raise ValueError(f"{name} is no option of attention outside of graphs: {_OF_GRAPHS[name]}")
    if grid is None:
        raise ValueError("grid must be told: (T, H, W) in tokens")
    with taking(_Taker(Options.parse({"grid": grid, "text": text, **options}))):
        yield


class _Taker:
    """Answers eager calls under some options, each kind of call by what was made for it."""

    def __init__(self, options: Options) -> None:
        assert options.grid is not None
        self.options, self.tokens = options, VideoLayout(options.grid, options.text or ()).tokens
        self.kinds: dict[tuple[Any, ...], _Kind] = {}
        self.tells: dict[str, Notices] = {}
        if self.tokens < options.min_tokens:
            few = f"{self.tokens} tokens, fewer than min_tokens={options.min_tokens}"
            Notices()(f"nothing outside of graphs becomes sparse: {Reason(DenseReason.SIZE, few).advice}")

    def __call__(self, call: EagerCall) -> Tensor | None:
        if call.tokens is None:
            return None  # cross-attention
        if call.tokens != self.tokens and (call.tokens < self.options.min_tokens or not call.could_be_sparse):
            return None  # over little, of as many kinds as there are texts; or an autoencoder's
        kind = _kind(call)
        if kind not in self.kinds:
            if len(self.kinds) >= MAX_KINDS:
                self.kinds.clear()
            tell = self.tells.setdefault(call.where, Notices(where=call.where))
            self.kinds[kind] = _Kind(call, self.options, tell)
        return self.kinds[kind](call)


class _Kind:
    """Answers calls that are alike but for what their tensors hold: by a graph of this attention alone."""

    def __init__(self, call: EagerCall, options: Options, tell: Notices) -> None:
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):  # what is made here may outlive the mode
            gm = _graph(call)
            plan = Plan(gm, options, normalize(gm), SAME_TOKENS, tell=tell)
            for match in plan.matches:
                match.name = call.where
            written = write(plan)
        self.run: Callable[..., tuple[Tensor, ...]] | None = written.module if plan.sparse else None
        self.limits = Limits(options, [limits.device for limits in written.limits], written.shows_level, tell)
        self.report, self.pairs = summarize(plan), plan.pairs(())
        for attention in self.report.attentions:
            attention.eager = True

    def __call__(self, call: EagerCall) -> Tensor | None:
        """The output; None if it is left dense."""
        out, observed = None, []
        if self.run is not None:
            out, choice, errors, recall = self.run(*_tensors(call).values(), *self.limits.now())
            observed = [Observed(choice, errors, recall)]
        for report in listening():
            report.add(self.report, observed, self.pairs)
        return out


def _tensors(call: EagerCall) -> dict[str, Tensor]:
    operands = {"query": call.query, "key": call.key, "value": call.value}
    return operands if call.attn_mask is None else {**operands, "attn_mask": call.attn_mask}


def _kind(call: EagerCall) -> tuple[Any, ...]:
    """All that is relied on."""
    tensors = ((name, *_traits(x)) for name, x in _tensors(call).items())
    numbers = call.dropout_p, call.is_causal, call.scale, call.enable_gqa
    return call.where, *tensors, *numbers, torch.is_grad_enabled(), forward_ad._current_level


def _traits(x: Tensor) -> tuple[Any, ...]:
    plain = _is_plain(x)
    return type(x), plain, x.shape, x.stride() if plain else (), x.dtype, x.device, x.requires_grad


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _graph(call: EagerCall) -> fx.GraphModule:
    """A graph of nothing but this attention, as Dynamo would make it; of other tensors than plain ones, with these."""
    graph, mode, examples = fx.Graph(), FakeTensorMode(), _tensors(call)
    numbers = {name: getattr(call, name) for name in ("dropout_p", "is_causal", "scale", "enable_gqa")}
    attend: Callable[..., Tensor] = SDPA[0]
    for name, x in examples.items():
        if _is_plain(x):
            kind: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "requires_grad": x.requires_grad}
            with mode:
                examples[name] = torch.empty_strided(x.shape, x.stride(), **kind)
    out = call.query
    if all(map(_is_plain, _tensors(call).values())):
        with mode:
            out = attend(**examples, **numbers)
    nodes = {name: graph.placeholder(name) for name in examples}
    attention = graph.call_function(attend, kwargs={**nodes, **numbers})
    graph.output((attention,))
    for name, node in nodes.items():
        node.meta["example_value"] = examples[name]
    attention.meta["example_value"] = out
    gm = fx.GraphModule({}, graph)
    gm._param_name_to_source = {}  # type: ignore[assignment]
    return gm
