# SPDX-License-Identifier: Apache-2.0
"""Whether this installation works, and what mends it: a line for each check, ok, warning, missing or broken.

Looks at versions, devices, the entry points, the C++ compiler, and runs every operator against the reference on every
device. The exit status is 0 if nothing is missing or broken.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from rainfusion_compile import __version__
from rainfusion_compile.commands.arguments import error_line
from rainfusion_compile.torch_version import TESTED

Status = Literal["ok", "warning", "missing", "broken"]
TRITON_LEAST = (3, 6)
REINSTALL = "python -m pip install --force-reinstall --no-deps -e . (in a clone, or what you installed it from)"
INSTALL_TORCH = 'python -m pip install "torch>={}.{},<{}.{}"'.format(*TESTED[0], TESTED[1][0], TESTED[1][1] + 1)
INSTALL_TRITON = 'python -m pip install "triton>={}.{}"'.format(*TRITON_LEAST)


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, what was found, and the command or advice that mends it."""

    name: str
    status: Status
    found: str
    remedy: str | None = None

    def __str__(self) -> str:
        line = f"{self.status:8} {self.name}: {self.found}"
        return line if self.remedy is None else f"{line}\n{'':8} -> {self.remedy}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of lines")


def run(args: argparse.Namespace) -> int:
    found = []
    for check in all_checks():
        found.append(check)
        if not args.json:
            print(check, flush=True)  # as they come: the last ones take seconds
    if args.json:
        print(json.dumps([asdict(check) for check in found], indent=2))
    return int(any(check.status in ("missing", "broken") for check in found))


def all_checks() -> Iterator[Check]:
    """All checks in turn. Those that need torch are left out where it cannot be imported."""
    yield Check("python", "ok", f"{platform.python_version()}, {sys.executable}")
    yield Check("rainfusion-compile", "ok", f"{__version__}, {Path(__file__).parents[1]}")
    version = _check_torch()
    yield version
    if version.status == "missing":
        return
    checks: tuple[Callable[[], Iterator[Check]], ...] = (
        _check_triton, _check_diffusers, _check_devices, _check_entry_points, _check_compiler, _check_launch_configs,
        _check_operators,
    )  # fmt: skip
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # whatever a broken installation raises: the other checks may say why
            yield Check(check.__name__.removeprefix("_check_"), "broken", error_line(error))


def _check_torch() -> Check:
    low, high = (".".join(map(str, version)) for version in TESTED)
    try:
        torch = import_module("torch")
    except (ImportError, OSError) as error:
        return Check("torch", "missing", error_line(error), INSTALL_TORCH)
    version = torch.__version__
    if _numbers(version) < TESTED[0]:
        return Check("torch", "broken", f"{version} is too old: tested are {low} to {high}", INSTALL_TORCH)
    if _numbers(version) > TESTED[1]:
        found = f"{version} is newer than what was tested, {low} to {high}"
        return Check("torch", "warning", found, f"if anything fails: {INSTALL_TORCH}")
    return Check("torch", "ok", f"{version} (tested: {low} to {high})")


def _check_triton() -> Iterator[Check]:
    least, version = ".".join(map(str, TRITON_LEAST)), _installed("triton")
    needed: Status = "missing" if _gpus() else "warning"
    if version is None and platform.system() != "Linux":
        yield Check("triton", "ok", "not installed; it is for GPUs, on Linux")
    elif version is None:
        yield Check("triton", needed, "not installed; attention on a GPU needs it", INSTALL_TRITON)
    elif _numbers(version) < TRITON_LEAST:
        status: Status = "broken" if _gpus() else "warning"
        yield Check("triton", status, f"{version} is too old: it takes {least} or newer", INSTALL_TRITON)
    else:
        yield Check("triton", "ok", f"{version} (at least {least})")


def _check_diffusers() -> Iterator[Check]:
    version = _installed("diffusers")
    yield Check("diffusers", "ok", version or "not installed; only its own models need it")


def _check_devices() -> Iterator[Check]:
    """What each device is, and which engine attends on it."""
    torch = import_module("torch")
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    yield Check("cpu", "ok", f"{platform.machine()}, {threads}; engine: PyTorch's own kernels")
    for index in range(_gpus()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"capability {properties.major}.{properties.minor}"
        found = f"{properties.name}, {capability}, {memory}; engine: {_engine_of(index)}"
        yield Check(f"cuda:{index}", "ok", found)
    if not _gpus() and shutil.which("nvidia-smi") and torch.version.cuda is None:
        remedy = f"{INSTALL_TORCH} --force-reinstall --index-url https://download.pytorch.org/whl/cu130"
        yield Check(
            "gpu", "warning", f"nvidia-smi is here, but torch {torch.__version__} is built without CUDA", remedy
        )
    elif not _gpus() and shutil.which("nvidia-smi"):
        remedy = "look at what nvidia-smi and `python -c 'import torch; torch.cuda.init()'` say"
        yield Check("gpu", "warning", "nvidia-smi is here, but torch finds no GPU that it can use", remedy)
    elif not _gpus():
        yield Check("gpu", "ok", "none: attention runs on the CPU")


def _check_entry_points() -> Iterator[Check]:
    torch = import_module("torch")
    if torch._dynamo.config.disable:
        found = "torch.compile is switched off: models run as they are, dense"
        yield Check("torch.compile", "warning", found, "unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE")
    for group, name in (("torch_dynamo_backends", "rainfusion"), ("torch.backends", "rainfusion")):
        points = [point for point in metadata.entry_points(group=group) if point.name == name]
        if not points:
            yield Check(f"entry point {group}", "missing", f"{name!r} is not registered", REINSTALL)
            continue
        try:
            points[0].load()
        except Exception as error:
            yield Check(f"entry point {group}", "broken", f"{name!r} does not load: {error_line(error)}", REINSTALL)
        else:
            yield Check(f"entry point {group}", "ok", f"{name!r} loads {points[0].value}")


def _check_compiler() -> Iterator[Check]:
    """What Inductor compiles with on a CPU, and Triton for its launchers."""
    needed: Status = "warning" if _gpus() else "missing"
    cpp_builder = import_module("torch._inductor.cpp_builder")
    try:
        yield Check("C++ compiler", "ok", str(cpp_builder.get_cpp_compiler()))
    except Exception as error:
        found = f"none, and Inductor needs one on a CPU ({type(error).__name__})"
        yield Check("C++ compiler", needed, found, "apt-get install g++ (or set CXX)")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.exists():
        yield Check("Python headers", "ok", str(header))
    else:
        yield Check("Python headers", "missing", f"{header} is not there", "apt-get install python3-dev")


def _check_launch_configs() -> Iterator[Check]:
    """What was measured by the command `tune`."""
    if _installed("triton") is None:
        return
    file = import_module("rainfusion_compile.kernels.gpu.tuning").cache_file()
    if not file.exists():
        capabilities = {import_module("torch").cuda.get_device_capability(index) for index in range(_gpus())}
        measured = capabilities <= {(9, 0)}
        remedy = None if measured else "python -m rainfusion_compile tune (may find faster ones on this GPU)"
        yield Check("launch configurations", "ok", f"the default ones; {file} is not there", remedy)
        return
    try:
        kept = json.loads(file.read_text())
        found = f"{sum(map(len, kept.values()))} measured on {len(kept)} kinds of GPU and version, in {file}"
        yield Check("launch configurations", "ok", found)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        found = f"{file} cannot be read ({error_line(error)}); the default ones are used"
        yield Check("launch configurations", "warning", found, f"rm {file}")


def _check_operators() -> Iterator[Check]:
    """Every operator against the reference."""
    torch, self_test = import_module("torch"), import_module("rainfusion_compile.commands.self_test")
    names = ["cpu", *(f"cuda:{index}" for index in range(_gpus()))]
    for device, dtype in ((name, dtype) for name in names for dtype in self_test.dtypes_of(name)):
        name = f"operators, {device}, {str(dtype).removeprefix('torch.')}"
        try:
            found = self_test.differences(torch.device(device), dtype)
        except Exception as error:
            yield Check(name, "broken", error_line(error))
            continue
        wrong = [one for one in found if not one.passes]
        if wrong:
            said = "; ".join(f"{one.operator} is off by {one.found:.1g} (allowed: {one.allowed:.1g})" for one in wrong)
            yield Check(name, "broken", said, "please report it, with all that this command says")
        else:
            yield Check(name, "ok", f"as the reference, to {max(one.found for one in found):.1g}")


def _engine_of(index: int) -> str:
    """Of the attention of head_dim 128 in bfloat16."""
    try:
        configs = import_module("rainfusion_compile.kernels.gpu.configs")
        tuned = import_module("rainfusion_compile.kernels.gpu.tuning").tuned_config
    except ImportError as error:
        return f"none ({error_line(error)})"
    torch = import_module("torch")
    kept = tuned(128, torch.bfloat16, index)
    capability, _ = configs.device_limits(index)
    config = kept or configs.attention_config(128, torch.bfloat16, capability)
    kernel = "Triton, the kernel for Hopper" if config.warp_specialized else "Triton, the portable kernel"
    return f"{kernel}{', as measured by tune' if kept else ''}"


def _gpus() -> int:
    """How many CUDA devices torch can use."""
    cuda: Any = import_module("torch").cuda
    return int(cuda.device_count()) if cuda.is_available() else 0


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: 2.13.0+cpu is (2, 13)."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
