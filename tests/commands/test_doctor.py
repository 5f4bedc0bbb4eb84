# SPDX-License-Identifier: Apache-2.0
"""``doctor``: what it says of installations that work, and of those that do not. Broken ones are made up."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

from rainfusion_compile.commands import doctor, main, self_test
from rainfusion_compile.commands.self_test import Difference


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    """Operators are not run, but in the test that does."""
    monkeypatch.setattr(self_test, "differences", lambda device, dtype: [Difference("arm_probe", 1e-7, 1e-4)])
    monkeypatch.setenv("RAINFUSION_CACHE_DIR", str(tmp_path))


def lines(capsys, status: int = 0) -> dict[str, str]:
    """What is said of each check: its status and all the rest."""
    assert main(["doctor"]) == status
    printed = capsys.readouterr().out
    checks = re.split(r"\n(?! )", printed.rstrip())
    return {line.split(maxsplit=1)[1].split(": ")[0]: " ".join(line.split()) for line in checks}


def gpu(monkeypatch, *, capability=(9, 0)) -> None:
    """A GPU that nothing is run on."""
    properties = type("Properties", (), {"name": "H-something", "major": capability[0], "minor": capability[1],
                                         "total_memory": 80 * 2**30, "multi_processor_count": 132})  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "H-something")


@pytest.fixture
def _fresh_limits():
    pytest.importorskip("triton")
    from rainfusion_compile.kernels.gpu import configs, tuning

    for cache in (configs.device_limits, tuning.tuned_config):
        cache.cache_clear()
    yield
    for cache in (configs.device_limits, tuning.tuned_config):
        cache.cache_clear()


def without(monkeypatch, package: str) -> None:
    version = metadata.version

    def missing(name: str) -> str:
        if name == package:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", missing)


@pytest.mark.parametrize("dtype", self_test.dtypes_of("cpu"))
def test_every_operator_is_run_against_the_reference(monkeypatch, dtype):
    monkeypatch.undo()
    found = self_test.differences(torch.device("cpu"), dtype)
    names = {one.operator.split(",")[0] for one in found}
    assert names == {"arm_probe", "block_sparse_attention", "video_attention"}
    assert all(one.passes for one in found), found
    assert not Difference("arm_probe", float("nan"), 1.0).passes


def test_all_is_well_here(capsys):
    found = lines(capsys)
    assert found["torch"].startswith("ok torch: " + torch.__version__)
    assert "engine: PyTorch's own kernels" in found["cpu"]
    assert found["entry point torch_dynamo_backends"].startswith("ok")
    assert found["operators, cpu, float32"].startswith("ok operators, cpu, float32: as the reference")


def test_json_has_every_check(capsys):
    assert main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert {"name", "status", "found", "remedy"} == checks[0].keys()
    assert "C++ compiler" in {check["name"] for check in checks}


@pytest.mark.parametrize(
    ("version", "status", "said"),
    [
        ("2.10.1+cu126", 1, "broken torch: 2.10.1+cu126 is too old: tested are 2.11 to 2.15"),
        ("2.16.0a0+git", 0, "warning torch: 2.16.0a0+git is newer than what was tested, 2.11 to 2.15"),
        ("2.11.0", 0, "ok torch: 2.11.0"),
    ],
)
def test_a_torch_that_was_not_tested_is_told(capsys, monkeypatch, version, status, said):
    monkeypatch.setattr(torch, "__version__", version)
    line = lines(capsys, status)["torch"]
    assert line.startswith(said)
    assert line.startswith("ok") or 'python -m pip install "torch>=2.11,<2.16"' in line


def test_without_torch_nothing_else_is_looked_at(capsys, monkeypatch):
    def no_torch(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(doctor, "import_module", no_torch)
    found = lines(capsys, 1)
    assert list(found)[-1] == "torch"
    assert "missing torch: ModuleNotFoundError" in found["torch"]
    assert "pip install" in found["torch"]


def test_triton_is_needed_on_gpus_only(capsys, monkeypatch):
    without(monkeypatch, "triton")
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    assert lines(capsys)["triton"].startswith("warning triton: not installed")
    gpu(monkeypatch)
    assert (
        'missing triton: not installed; attention on a GPU needs it -> python -m pip install "triton>=3.6"'
        in (lines(capsys, 1)["triton"])
    )


def test_an_old_triton_is_told(capsys, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "3.5.1" if name == "triton" else version(name))
    assert "warning triton: 3.5.1 is too old: it takes 3.6 or newer" in lines(capsys)["triton"]


def test_diffusers_is_not_needed(capsys, monkeypatch):
    without(monkeypatch, "diffusers")
    assert lines(capsys)["diffusers"].startswith("ok diffusers: not installed")


def test_no_gpu_is_no_fault_but_one_that_torch_cannot_use_is_told(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert lines(capsys)["gpu"] == "ok gpu: none: attention runs on the CPU"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "warning gpu: nvidia-smi is here, but torch" in lines(capsys)["gpu"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "warning gpu: nvidia-smi is here, but torch finds no GPU" in lines(capsys)["gpu"]


@pytest.mark.usefixtures("_fresh_limits")
@pytest.mark.parametrize(
    ("capability", "engine"), [((9, 0), "Triton, the kernel for Hopper"), ((8, 0), "Triton, the portable kernel")]
)
def test_the_engine_of_a_gpu_is_told(capsys, monkeypatch, capability, engine):
    gpu(monkeypatch, capability=capability)
    found = lines(capsys)
    assert f"H-something, capability {capability[0]}.{capability[1]}, 80 GiB; engine: {engine}" in found["cuda:0"]
    assert ("python -m rainfusion_compile tune" in found["launch configurations"]) is (capability != (9, 0))
    assert "operators, cuda:0, float16" in found


def test_a_compiler_that_is_not_there_is_named_with_how_to_get_it(capsys, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert "-> apt-get install g++" in lines(capsys, 1)["C++ compiler"]


def test_headers_that_are_not_there_are_named_with_how_to_get_them(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    line = lines(capsys, 1)["Python headers"]
    assert line.startswith(f"missing Python headers: {tmp_path}/Python.h is not there")
    assert "apt-get install python3-dev" in line


@pytest.mark.parametrize("fault", ["missing", "broken"])
def test_an_entry_point_that_is_missing_or_broken_is_told(capsys, monkeypatch, fault):
    point = metadata.EntryPoint("rainfusion", "nowhere_to_be_found:it", "")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if fault == "broken" else [])
    line = lines(capsys, 1)["entry point torch_dynamo_backends"]
    assert line.startswith(f"{fault} entry point torch_dynamo_backends: 'rainfusion'")
    assert "pip install" in line


def test_torch_compile_that_is_switched_off_is_told(capsys):
    with torch._dynamo.config.patch(disable=True):
        assert "unset TORCHDYNAMO_DISABLE" in lines(capsys)["torch.compile"]


def test_launch_configurations_that_cannot_be_read_are_told(capsys, tmp_path):
    pytest.importorskip("triton")
    file = tmp_path / "launch_configs.json"
    file.write_text('{"a GPU": {"64 bfloat16": {}, "128 bfloat16": {}}}')
    assert "ok launch configurations: 2 measured on 1 kinds of GPU" in lines(capsys)["launch configurations"]
    file.write_text("{")
    assert f"-> rm {file}" in lines(capsys)["launch configurations"]


def test_an_operator_that_is_wrong_or_raises_breaks_the_installation(capsys, monkeypatch):
    monkeypatch.setattr(self_test, "differences", lambda device, dtype: [Difference("arm_probe", 0.5, 1e-4)])
    assert (
        "broken operators, cpu, float32: arm_probe is off by 0.5 (allowed: 0.0001)"
        in (lines(capsys, 1)["operators, cpu, float32"])
    )

    def raises(device, dtype):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(self_test, "differences", raises)
    assert lines(capsys, 1)["operators, cpu, bfloat16"].endswith("RuntimeError: no such kernel")


def test_a_check_that_fails_does_not_hide_the_others(capsys, monkeypatch):
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: 1 / 0)
    found = lines(capsys, 1)
    assert found["entry_points"].startswith("broken entry_points: ZeroDivisionError")
    assert "C++ compiler" in found


def test_the_versions_are_those_of_the_project():
    root = Path(__file__).parents[2]
    project = (root / "pyproject.toml").read_text()
    low, high = (".".join(map(str, version)) for version in doctor.TESTED)
    triton = ".".join(map(str, doctor.TRITON_LEAST))
    assert f'"torch>={low}", "triton>={triton};' in project
    assert f"torch {low} to {high}, Triton >= {triton}" in (root / "README.md").read_text()
