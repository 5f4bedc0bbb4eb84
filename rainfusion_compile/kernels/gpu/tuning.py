# SPDX-License-Identifier: Apache-2.0
"""Launch configurations measured on this machine's GPU, for GPUs that the table in `configs` was not measured on.

``python -m rainfusion_compile tune`` times a few configurations once and keeps the fastest in a file, by GPU, Triton
version, our kernels' source, head_dim and dtype. Lengths are no part of the key, so a new resolution never tunes again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from rainfusion_compile.kernels.gpu.configs import LaunchConfig, attention_config, device_limits

Timer = Callable[[LaunchConfig], float]
TILES = (
    (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 4, 3), (64, 64, 4, 2),
    (64, 64, 4, 3), (64, 32, 4, 4),
)  # fmt: skip
TILES_OF_PARTS = ((128, 64, 8), (128, 32, 8), (64, 32, 8), (64, 32, 4))  # of float32 as TF32 parts


def cache_file() -> Path:
    """``$RAINFUSION_CACHE_DIR/launch_configs.json``, by default in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RAINFUSION_CACHE_DIR") or Path(cache) / "rainfusion_compile") / "launch_configs.json"


def candidates(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> list[LaunchConfig]:
    """The few configurations worth timing, the table's own first."""
    default = attention_config(head_dim, dtype, capability)
    found = [default]
    if default.precision == "tf32x3":  # whose tiles may be too big for exact products, and the other way round
        found += [dataclasses.replace(default, tile_q=q, tile_k=k, num_warps=w) for q, k, w in TILES_OF_PARTS]
        found.append(LaunchConfig(64, 16, num_warps=8, num_stages=1))
    else:
        if default.warp_specialized:
            found.append(dataclasses.replace(default, num_stages=2 if default.num_stages > 2 else 3))
            found.append(dataclasses.replace(default, bounds_scores=not default.bounds_scores))
        found += [LaunchConfig(*tiles) for tiles in TILES]
    return list(dict.fromkeys(found))


def median_ms(call: Callable[[], object]) -> float:
    """The median time of a call on the GPU, in ms."""
    return float(triton.testing.do_bench(call, return_mode="median"))


def tune(head_dim: int, dtype: torch.dtype, device: torch.device, time_ms: Timer) -> dict[LaunchConfig, float]:
    """Times the candidates by running attention, keeps the fastest for :func:`tuned_config`, and returns all times in
    ms. A configuration that this GPU has no room for is left out.
    """
    times = {}
    for config in candidates(head_dim, dtype, device_limits(device.index)[0]):
        with contextlib.suppress(triton.runtime.errors.OutOfResources):
            times[config] = time_ms(config)
    best = min(times, key=times.__getitem__)
    path = cache_file()
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept.setdefault(_machine(device.index), {})[_key(head_dim, dtype)] = dataclasses.asdict(best)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(kept, indent=1) + "\n")
    partial.replace(path)  # in one step: another process may be reading
    tuned_config.cache_clear()
    return times


@functools.lru_cache
def tuned_config(head_dim: int, dtype: torch.dtype, index: int | None) -> LaunchConfig | None:
    """What was measured to be the fastest on this GPU, None where nothing was. Read once in a process."""
    path = cache_file()
    try:
        kept = json.loads(path.read_text()).get(_machine(index), {}).get(_key(head_dim, dtype))
        return kept and LaunchConfig(**kept)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} cannot be read ({error}); using the default launch configurations", stacklevel=2)
        return None


def _machine(index: int | None) -> str:
    return f"{torch.cuda.get_device_name(index)}, triton {triton.__version__}, kernels {_kernels()}"


@functools.cache
def _kernels() -> str:
    """Changes with the attention kernels' source, which decides how fast a configuration is."""
    folder = Path(__file__).parent
    files = [
        *(folder / f"{name}.py" for name in ("portable_kernel", "rows", "key_norms")),
        *sorted(folder.glob("hopper/*.py")),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _key(head_dim: int, dtype: torch.dtype) -> str:
    return f"{head_dim} {str(dtype).removeprefix('torch.')}"
