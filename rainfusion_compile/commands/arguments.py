# SPDX-License-Identifier: Apache-2.0
"""How arguments of command lines are read, and how progress is told. Needs no torch until an argument does."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rainfusion_compile.sparsity.layout import Grid


class WrongArgument(ValueError):
    """What was asked for cannot be; the message names the argument, its value and what would be accepted."""


def progress(message: str) -> None:
    """Tell on stderr what comes next, where it may take seconds."""
    print(f"{message} ...", file=sys.stderr, flush=True)


def literal(text: str) -> Any:
    """A Python literal, or a word that needs no quotes."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def pair(text: str) -> tuple[str, Any]:
    """``name=value``, the value a :func:`literal`."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be name=value; got {text!r}")
    return name, literal(value)


def grid(text: str) -> Grid:
    """``TxHxW``, such as 21x45x80, in tokens."""
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"must be TxHxW in tokens, such as 21x45x80; got {text!r}")
    frames, height, width = map(int, sizes)
    return frames, height, width


def text_around(text: str) -> tuple[int, int]:
    """``BEFORE+AFTER``, such as 226+0, in tokens."""
    lengths = text.split("+")
    if len(lengths) != 2 or not all(length.isdecimal() for length in lengths):
        raise argparse.ArgumentTypeError(f"must be BEFORE+AFTER in tokens, such as 226+0; got {text!r}")
    before, after = map(int, lengths)
    return before, after


def positive(text: str) -> int:
    """An integer of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1; got {text!r}")
    return int(text)


def once(option: str, given: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Named values of a command line; None is none. Raises WrongArgument if one is given more than once."""
    found = [(name, value) for name, value in given if value is not None]
    for name, _ in found:
        if sum(name == other for other, _ in found) > 1:
            raise WrongArgument(f"{option}: {name} is given more than once")
    return dict(found)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the backend: ``--error``, ``--sparsity``, ``--option NAME=VALUE``."""
    parser.add_argument(
        "--error", type=literal, help="the error that a layer's output may have, from 0 to 1; --option error=..."
    )
    parser.add_argument("--sparsity", type=literal, help="--option sparsity=..., a number or '(a, b, ...)'")
    help_text = "any option of the backend, a Python literal; may be repeated"
    parser.add_argument("--option", type=pair, action="append", default=[], metavar="NAME=VALUE", help=help_text)


def named_options(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_options` read. Raises WrongArgument on what the backend does not take."""
    from rainfusion_compile.options import Options

    given = once("--option", [*args.option, ("error", args.error), ("sparsity", args.sparsity)])
    checked(Options.parse, given)
    return given


def checked(make: Any, *args: Any) -> Any:
    """``make(*args)``, whose ValueError is the user's to mend."""
    try:
        return make(*args)
    except ValueError as error:
        raise WrongArgument(str(error)) from error


def error_line(error: BaseException) -> str:
    """What an error came from, in a line; what Dynamo got, where it tells of another error."""
    while error.__cause__ is not None:
        error = error.__cause__
    if got := re.search(r"\bgot (\w+)\((['\"])(.+)\2\)$", str(error), re.MULTILINE):
        return f"{got[1]}: {got[3]:.300}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__
