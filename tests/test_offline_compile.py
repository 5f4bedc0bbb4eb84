# SPDX-License-Identifier: Apache-2.0
"""Compiles the shipped kernel configurations for real GPUs, without one: tensor-core instructions, spills, memory.

Triton's interpreter and its compiler cannot share a process, so this file runs itself as a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DIMS = {80: [64, 128], 89: [128], 90: [64, 96, 128, 256], 100: [64, 128]}


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_shipped_configurations_compile_well(capability: int, tmp_path: Path):
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == 2 * len(DIMS[capability]) + 3
    for report in reports:
        assert report["stack"] == report["local"] == 0, report
        assert report["shared"] <= SHARED_LIMIT[capability], report
        if report["kernel"] in ("attention_kernel", "probe_kernel"):
            # Every load of K and V in the hot loop is an asynchronous copy, num_stages - 1 steps ahead.
            tensors = 2 if report["kernel"] == "attention_kernel" else 1
            if report["mask_kind"] == 0:
                assert report["async_copies"] >= tensors * report["chunks"] * report["num_stages"], report
            assert (report["wgmma"] > 0) == (capability == 90), report
            assert (report["tcgen05"] > 0) == (capability == 100), report


def compile_for(
    capability: int, kernel: Any, constants: dict[str, Any], types: dict[str, str], options: dict[str, int]
):
    """A kernel compiled from argument names: constants, pointers and floats by `types`, all else int32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def describe(compiled: Any, **labels: Any) -> dict[str, Any]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return labels | {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "tcgen05": compiled.asm["ptx"].count("tcgen05.mma"),
        "async_copies": compiled.asm["ttgir"].count("ttg.async_copy_global_to_local"),
    }


def main(capability: int) -> None:
    import torch
    import triton.language as tl

    from rainfusion_compile.kernels import configs, launch, triton_attention, triton_probe

    types = dict.fromkeys(("q", "k", "v", "out"), "*bf16")
    types |= dict.fromkeys(("choice", "order", "key_order", "rows", "row_ptr", "indices"), "*i32")
    types |= {"samples": "*i32", "first": "*i32", "first_masked": "*i32", "sample_keep": "*u8", "key_keep": "*u8"}
    types |= {"partial": "*fp32", "recall": "*fp32", "mask": "*i1"}
    types |= {"scale_log2": "fp32", "target": "fp32", "min_recall": "fp32"}
    shape = {"VEC": 8, "OFFSET": tl.int32, "BLOCK_Q": 128, "BLOCK_K": 64, "DENSE_FIRST": True, "ALL_HEADS": 128}
    shape |= {"PRECISION": "tf32", "PATTERNS": 3, "PADDED": 4, "SPLITS": 32}
    unmasked = {"MASK_KIND": 0, "mask": None, "first_masked": None}

    def report(kernel: Any, constants: dict[str, Any], config: configs.LaunchConfig, head_dim: int = 128) -> None:
        chunks = configs.split_head_dim(head_dim, config.chunk)
        tiles = {"D": head_dim, "D0": chunks[0], "D1": chunks[1], "STAGES": config.num_stages, "TILE_Q": config.tile_q}
        tiles |= {"TILE_K": min(config.tile_k, 128 if kernel is triton_attention.attention_kernel else 64)}
        compiled = compile_for(capability, kernel, shape | tiles | constants, types, config.options())
        labels = {"kernel": kernel.__name__, "head_dim": head_dim, "chunks": 1 + (chunks[1] > 0)}
        labels |= {"num_stages": config.num_stages, "mask_kind": constants.get("MASK_KIND")}
        print(json.dumps(describe(compiled, **labels)), flush=True)

    cc = divmod(capability, 10)
    for head_dim in DIMS[capability]:
        attention = configs.attention_config(head_dim, torch.bfloat16, cc)
        probe = configs.probe_config(head_dim, torch.bfloat16, 128)
        report(triton_attention.attention_kernel, unmasked, attention, head_dim)
        report(triton_probe.probe_kernel, unmasked, probe, head_dim)
    report(triton_attention.attention_kernel, {"MASK_KIND": 1}, configs.attention_config(128, torch.bfloat16, cc))
    small = configs.LaunchConfig(16, 16, num_warps=4, num_stages=1)
    report(triton_probe.choose_kernel, {"MASK_KIND": 1, "TILE": 32}, small)
    report(launch._first_masked_kernel, {"KIND": 1, "TILE": 1024}, small)


if __name__ == "__main__":
    main(int(sys.argv[1]))
