# SPDX-License-Identifier: Apache-2.0
"""``python -m rainfusion_compile COMMAND``: what can be asked of an installation without writing code.

A command is a module here with ``add_arguments(parser)`` and ``run(args)``, which returns the exit status. It imports
torch, and all that needs it, inside its functions: :mod:`doctor` also has to work where torch does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

import rainfusion_compile
from rainfusion_compile.commands.arguments import WrongArgument

COMMANDS = {
    "doctor": "whether this installation works, and what mends it",
    "explain": "what would be sparse in a model, without weights or a GPU",
    "bench": "one attention call, dense and sparse, on this machine",
    "tune": "find and keep the fastest launch configurations of this machine's GPU",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status. Exits with 2, and says what is wrong, on wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m rainfusion_compile", description="Sparse video attention.")
    parser.add_argument("--version", action="version", version=rainfusion_compile.__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        module = import_module(f"{__name__}.{name}")
        raw = argparse.RawDescriptionHelpFormatter
        one = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=raw)
        module.add_arguments(one)
        one.set_defaults(run=module.run, parser=one)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except WrongArgument as error:  # of what was asked for, so that how to ask is no help
        args.parser.exit(2, f"{args.parser.prog}: error: {error}\n")
    return status
