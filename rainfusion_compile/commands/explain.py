# SPDX-License-Identifier: Apache-2.0
"""What would be sparse in a model: compiled on tensors without contents, so that it takes no weights, memory or GPU.

MODULE:NAME is a class of models, of which forward takes arguments of conventional names, such as
diffusers:WanTransformer3DModel, or a function without arguments that returns (model, kwargs) or (model, args, kwargs).
Attention that runs outside all graphs is told of, too. Grids that only the contents of inputs tell are not seen;
`rainfusion_compile.explain` in Python runs the model and sees them, and tells what every head took.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from rainfusion_compile.commands.arguments import (
    WrongArgument,
    add_options,
    error_line,
    grid,
    named_options,
    once,
    pair,
    positive,
    progress,
)

if TYPE_CHECKING:
    from rainfusion_compile.options import Options
    from rainfusion_compile.passes.rewrite.analysis import Plan
    from rainfusion_compile.report import AttentionReport


class Found(NamedTuple):
    """What would become of each graph of one call, and what attention would run outside all of them."""

    plans: list[Plan]
    outside: list[AttentionReport]


STRICT = "exit status 1 where video self-attention stays dense unasked (as with the option), or none would be sparse"
WRITE = "write a function that returns (model, kwargs), and give it as MODULE:FUNCTION"
CONTENTS = "where forward needs what tensors contain, run the model under rainfusion_compile.explain in Python"
LAYERS = ("num_layers", "num_single_layers", "num_visual_blocks", "num_hidden_layers")
Row = tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODULE:NAME", help="a class of models, or a function that makes one")
    of_class = parser.add_argument_group("for a class")
    of_class.add_argument("--grid", type=grid, metavar="TxHxW", help="tokens of the video, such as 21x45x80")
    of_class.add_argument(
        "--text", type=positive, metavar="TOKENS", help="of the text; by default what the class takes, or 256"
    )
    of_class.add_argument("--layers", type=positive, metavar="N", help="instead of all that the class has by default")
    help_text = "any argument of the class, a Python literal; may be repeated"
    of_class.add_argument("--config", type=pair, action="append", default=[], metavar="NAME=VALUE", help=help_text)
    add_options(parser)
    parser.add_argument("--fullgraph", action="store_true", help="compile with fullgraph=True")
    parser.add_argument("--strict", action="store_true", help=STRICT)
    parser.add_argument("--json", action="store_true", help="print all that was found as an object")


def run(args: argparse.Namespace) -> int:
    from rainfusion_compile.options import Options
    from rainfusion_compile.passes.rewrite.summary import dense_unasked, summarize
    from rainfusion_compile.report import may_be_of_video

    options = Options.parse(named_options(args))
    strict, options = args.strict or options.strict, replace(options, strict=False)  # told here, after the report
    target = loaded(args.model)
    plans, outside = (found_in_class if inspect.isclass(target) else found_in_function)(target, args, options)
    found = [attention for plan in plans for attention in summarize(plan).attentions]
    videos = {one.tokens for one in found if one.grid}
    outside = [one for one in outside if may_be_of_video(one.tokens, videos, options.min_tokens)]
    found += outside
    video = [one for one in found if one.category == "video self-attention"]
    sparse = [one for one in video if one.status == "sparse"]
    if args.json:
        counts = {"graphs": len(plans), "video": len(video), "sparse": len(sparse)}
        print(json.dumps({"model": args.model, **counts, "attentions": list(map(vars, found))}, indent=2, default=str))
    else:
        print("\n".join(explained(found, options, len(plans), waits=any(plan.waits for plan in plans))))
    if not strict:
        return 0
    dense = [told for plan in plans if (told := dense_unasked(plan.matches, options.min_tokens))]
    dense += [str(one.reason) for one in outside]
    if not dense and not sparse:
        dense = [f"no attention would be sparse: {_why_none(found, len(plans))}"]
    if dense:
        print(f"{'--strict' if args.strict else 'strict=True'}, but {dense[0]}", file=sys.stderr)
    return int(bool(dense))


def loaded(name: str) -> Any:
    """What stands under ``module:name``. Raises WrongArgument if there is none that can be called."""
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise WrongArgument(f"MODULE:NAME must be such as diffusers:WanTransformer3DModel; got {name!r}")
    progress(f"importing {module}")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        remedy = f"; pip install {package}, or, if it is yours, put its folder on PYTHONPATH" if absent else ""
        raise WrongArgument(f"{name!r} cannot be imported: {error}{remedy}") from error
    if not callable(found):
        raise WrongArgument(f"{name!r} must be a class or a function; it is a {type(found).__name__}")
    return found


def found_in_class(target: type, args: argparse.Namespace, options: Options) -> Found:
    """Of a class whose inputs are made from the names of forward's arguments; ways that latents may lie are tried."""
    from torch import nn

    from rainfusion_compile.commands.example_inputs import LATENTS, VideoInputs, configuration

    if not issubclass(target, nn.Module):
        raise WrongArgument(f"{args.model!r} must be a torch.nn.Module, or a function that makes one")
    if args.grid is None:
        raise WrongArgument("a class needs --grid TxHxW, the tokens of a video")
    config = once("--config", args.config)
    if args.layers is not None:
        names = [name for name in LAYERS if name in inspect.signature(target).parameters]
        if not names:
            raise WrongArgument(f"--layers: {args.model} takes none of {', '.join(LAYERS)}; see --config")
        config = dict.fromkeys(names, args.layers) | config
    mode = _fake_mode()
    progress(f"building {args.model}")
    try:
        with mode:
            model = target(**config).eval()
    except Exception as error:  # whatever a model raises
        raise WrongArgument(
            f"{args.model} cannot be made with {config or 'its defaults'}: {error_line(error)}; tell what it needs by "
            f"--config NAME=VALUE, or {WRITE}"
        ) from error
    inputs = VideoInputs(args.grid, args.text, configuration(model, config))
    told, others = {}, []
    for latents in LATENTS:
        with mode:
            kwargs = inputs(model.forward, latents)
        progress(f"compiling it for latents {latents}")
        try:
            with _quiet("torch._subclasses.fake_tensor"):  # which tells of each error that it raises
                found = found_in(model, (), kwargs, options, mode, fullgraph=args.fullgraph)
        except Exception as error:  # latents lie in another way, or inputs do not fit for another reason
            told[latents] = error_line(error)
            continue
        if any(match.grid == args.grid for plan in found.plans for match in plan.matches):
            return found
        others.append(found)
    if others:
        return others[0]
    tried = "".join(f"\n  hidden_states {latents}: {why}" for latents, why in told.items())
    raise WrongArgument(
        f"{args.model} takes none of the inputs that were made for it. Switch off what needs more than these by "
        f"--config NAME=VALUE, or {WRITE}; {CONTENTS}. Tried:{tried}"
    )


def found_in_function(target: Any, args: argparse.Namespace, options: Options) -> Found:
    """Of what a function without arguments returns, ``(model, kwargs)`` or ``(model, args, kwargs)``."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    for name in ("grid", "text", "layers", "config"):
        if getattr(args, name):
            raise WrongArgument(f"--{name} is for classes; {args.model} is a function, which makes its inputs itself")
    mode = _fake_mode()
    progress(f"calling {args.model}")
    with mode:
        made = target()
    sequence = isinstance(made, Sequence) and len(made) in (2, 3) and callable(made[0])
    if not sequence or not isinstance(made[-1], Mapping) or not isinstance(made[1], (Sequence, Mapping)):
        raise WrongArgument(f"{args.model} must return (model, kwargs) or (model, args, kwargs); got {made!r:.200}")
    model, *positional, kwargs = made
    progress("compiling it")
    try:
        return found_in(model, tuple(*positional), kwargs, options, mode, fullgraph=args.fullgraph)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise WrongArgument(f"{args.model}: {error_line(error)}: {CONTENTS}") from error


def found_in(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options, mode: Any, *, fullgraph: bool
) -> Found:
    """What one call does, whose tensors are those of a fake mode. Nothing is computed."""
    import torch
    from torch import fx

    from rainfusion_compile.passes.provenance.known_tokens import NOTHING
    from rainfusion_compile.passes.rewrite.analysis import analyse
    from rainfusion_compile.runtime.eager_calls import EagerCall, overheard, taking

    plans: list[Plan] = []
    outside: list[AttentionReport] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        plans.append(analyse(gm, options, lambda: NOTHING))
        return gm.forward

    def hear(call: EagerCall) -> None:
        if (attention := overheard(call)) is not None:
            outside.append(attention)

    torch._dynamo.reset()
    with taking(hear, fake=True), mode, torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False, fullgraph=fullgraph)(*args, **kwargs)
    return Found(plans, outside)


def explained(found: Sequence[AttentionReport], options: Options, graphs: int, *, waits: bool) -> list[str]:
    """A line for all attentions that are alike but for numbers in their names, then densities, then reasons."""
    from rainfusion_compile.report_text import left_alone

    video = [one for one in found if one.category == "video self-attention"]
    sparse = [one for one in video if one.status == "sparse"]
    alone = left_alone(one.category for one in found)
    count = f"{len(sparse)} of {len(video)} video self-attentions would be sparse{f', {alone}' if alone else ''}"
    result = [count] if video else [count, _why_none(found, graphs)]
    rows = Counter(_row(one) for one in sparse)
    if sparse:
        header = ("attention", "how many", "grid", "text", "heads", "density")
        result += _table([header, *((row[0], str(count), *row[1:]) for row, count in rows.items())])
    for one in {(one.grid, one.text): one for one in sparse}.values():
        over, text = _layout(one)
        result += ["", f"densities that heads choose from over grid {over} with text {text}, by wanted sparsity:"]
        result += _table(_densities(one))
    if sparse:
        result += ["(-, or no row: nothing new comes of it; two numbers: two shares of samples)"]
        limit = f"error={options.error:g}" if options.by_error else f"recall_target={options.recall_target:g}"
        result += ["", f"What each head takes, or whether it stays dense, is told on every call, within {limit}."]
    why = Counter(f"left dense: {one.reason}; {one.remedy}" for one in video if one.status == "dense")
    result += [f"{count} {reason}" for reason, count in why.most_common()]
    if graphs > 1:
        result.append(f"{graphs} graphs: what they tell each other is not seen here; try --fullgraph")
    if waits:
        result.append(
            "What is dense here for want of a grid may get it from the contents of inputs: run the model under "
            "rainfusion_compile.explain to see"
        )
    return result


def _why_none(found: Sequence[AttentionReport], graphs: int) -> str:
    """Why no attention would be sparse, of one that comes nearest to it; or that there is none at all."""
    if not found:
        holds = "its graph holds" if graphs == 1 else f"its {graphs} graphs hold"
        return f"{holds} no attention, and none runs outside that could be over a video"
    nearest = min(found, key=lambda one: ("video self-attention", "other", "cross-attention").index(one.category))
    return f"{nearest.name}: {nearest.reason}; {nearest.remedy}"


def _row(one: AttentionReport) -> Row:
    low, high = min(one.densities, default=1.0), max(one.densities, default=1.0)
    name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", one.name)  # the numbers of layers
    return name, *_layout(one), f"{one.heads}x{one.head_dim}", f"{low:.3f} to {high:.3f}"


def _layout(one: AttentionReport) -> tuple[str, str]:
    """Grid and text."""
    from rainfusion_compile.sparsity.layout import grid_text

    assert one.grid is not None
    return grid_text(one.grid), "+".join(map(str, one.text or ()))


def _densities(one: AttentionReport) -> list[Row]:
    """A row for each wanted sparsity, a column for each pattern; patterns may come to several densities, or none."""
    names = list(dict.fromkeys(one.patterns))
    cells: dict[float, dict[str, list[str]]] = {}
    for name, sparsity, density in zip(one.patterns, one.sparsities, one.densities, strict=True):
        cells.setdefault(sparsity, {}).setdefault(name, []).append(f"{density:.3f}")
    rows = [(f"{sparsity:g}", *(" ".join(row.get(name, ["-"])) for name in names)) for sparsity, row in cells.items()]
    return [("sparsity", *names), *sorted(rows, key=lambda row: -float(row[0]))]


def _table(rows: Sequence[Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Nothing is logged under this name."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)
