# SPDX-License-Identifier: Apache-2.0
"""The house: imports go one way, files are short, a name stands for one thing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import rainfusion_compile

PACKAGE = "rainfusion_compile"
ROOT = Path(rainfusion_compile.__file__).parents[1]  # of the package that is tested, installed or not
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in (ROOT / PACKAGE).rglob("*.py")
}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}
# A module imports from its own floor or from one below. The face is whatever is not named here; options and report are
# data that every floor may read.
FLOORS = {
    "runtime": 1,
    "inductor": 1,
    "passes": 2,
    "kernels": 3,
    "options": 4,
    "report": 4,
    "report_page": 4,
    "report_plot": 4,
    "report_text": 4,
    "sparsity": 4,
}
# The same inside passes, where match and normalize do not know each other. The steps share what stands at the end.
STEPS = {
    "rewrite": 1,
    "match": 2,
    "normalize": 2,
    "provenance": 3,
    "attention_match": 4,
    "": 4,
    "graph": 5,
}
ENGINES = {"cpu", "reference", "gpu"}
CONTRACTS = {"arm_probe", "block_sparse_attention", "read", "add_arguments", "run"}
"""Defined once by each engine, by each spelling of attention, or by each command."""


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those for type checkers only."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from nodes(child)


def imported(name: str) -> set[str]:
    """The modules that a module imports, wherever in it, of this package and of others."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in nodes(TREES[name]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            found.update(full if (full := f"{source}.{alias.name}") in FILES else source for alias in node.names)
    return found - {name}


IMPORTS = {name: imported(name) for name in FILES}
ARROWS = [(one, other) for one, others in IMPORTS.items() for other in others & FILES.keys()]


def part(name: str, number: int) -> str:
    return [*name.split("."), "", ""][number]


def shown(arrows: list[tuple[str, str]]) -> list[str]:
    return [f"{one} imports {other}" for one, other in arrows]


def test_imports_go_down():
    def floor(name: str) -> int:
        return FLOORS.get(part(name, 1), 0)

    assert shown([(one, other) for one, other in ARROWS if floor(one) > floor(other)]) == []


def test_passes_import_earlier_steps():
    steps = [(a, b) for a, b in ARROWS if part(a, 1) == part(b, 1) == "passes" and part(a, 2) != part(b, 2)]
    assert shown([(a, b) for a, b in steps if STEPS[part(a, 2)] > STEPS[part(b, 2)]]) == []
    assert shown([(a, b) for a, b in steps if STEPS[part(a, 2)] == STEPS[part(b, 2)] == 2]) == []


def test_engines_do_not_import_one_another():
    engines = [(a, b) for a, b in ARROWS if {part(a, 2), part(b, 2)} <= ENGINES and part(a, 2) != part(b, 2)]
    assert shown(engines) == []


def test_triton_stays_in_the_gpu_engine():
    users = {name for name, found in IMPORTS.items() if any(part(other, 0) == "triton" for other in found)}
    assert {name for name in users if not name.startswith(f"{PACKAGE}.kernels.gpu")} == set()


def test_there_are_no_circles():
    TopologicalSorter({name: found & FILES.keys() for name, found in IMPORTS.items()}).prepare()


def test_the_backend_is_light_to_import():
    code = f"import sys, {PACKAGE}.backend; print([m for m in ('torch._inductor', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_resetting_the_backend_imports_nothing():
    """``torch._dynamo.reset`` goes through a dict of backends, into which modules of Inductor enter functions."""
    code = (
        f"import sys, {PACKAGE}.backend as backend; before = {{*sys.modules}}\n"
        "backend.rainfusion.reset(); print({*sys.modules} - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_files_are_short():
    lengths = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_a_public_name_stands_for_one_thing():
    where = defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                where[node.name].append(name)
    assert {name: homes for name, homes in where.items() if len(homes) > 1 and name not in CONTRACTS} == {}
