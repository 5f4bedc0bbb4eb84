# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of the Triton kernels: tiles, warps and pipeline depth for a head_dim, dtype and GPU.

Tiles are not blocks. A block (`block_q` x `block_k`) is the granularity of the sparsity mask, a tile is what one
program multiplies at a time; `fit_tile` reconciles the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

LOG2_E = 1.4426950408889634
MIN_TILE = 16  # the smallest side of a tensor-core product


# (tile_q, tile_k, num_warps, num_stages) for head dims up to a number, by major compute capability; 0 is any other.
TILES = {
    9: {64: (128, 64, 4, 3), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2)},
    10: {128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},  # accumulators in tensor memory
    0: {64: (128, 64, 8, 3), 127: (128, 32, 8, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},  # 72 to 96: in two pieces
}
TILES_OF_FLOAT32 = {9: (128, 64, 8), 10: (64, 32, 8)}
# Beyond 96 it does not pay to know how long keys are (H200). The ptxas of Triton 3.8 and 3.9 spoils the loop that
# profits where head_dim comes in two pieces: it lets each product wait for the one before.
_WIDEST_BOUNDED = 96 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 64


@dataclass(frozen=True)
class LaunchConfig:
    """Tile shape and launch options of one kernel.

    tile_q, tile_k: query rows per program and keys per loop step (powers of two). num_warps, num_stages: Triton's.
    dense_first: give the heads that stayed dense to the first programs, so that no heavy head starts when the others
    are done (attention only). chunk: the widest piece of head_dim to multiply at once (a power of two); head_dim is cut
    in two at most. warp_specialized: the attention kernel written for Hopper instead of the portable one.
    bounds_scores: let that one know how long keys are, which may spare it to look at weights (`score_bound`).
    precision: how float32 is multiplied, "ieee" (exact products, on the FMA units) or "tf32x3" (three products of TF32
    parts each, on tensor cores).
    """

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    dense_first: bool = True
    chunk: int = 128
    warp_specialized: bool = False
    bounds_scores: bool = False
    precision: str = "ieee"

    def options(self) -> dict[str, Any]:
        """The keyword arguments that Triton's launcher takes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def attention_config(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None, block_q: int = 128
) -> LaunchConfig:
    """The attention kernel's configuration; `capability` is None under the interpreter.

    16-bit kernels of the common head dims compile without spills, if nothing is masked; float32 is measured on an H100.
    """
    major = 9 if capability is None else capability[0]
    if dtype == torch.float32 and capability is not None:
        if not _splits_float32(head_dim, capability):
            return LaunchConfig(32 if head_dim > 128 else 64, 16, num_warps=8, num_stages=1)
        tiles = TILES_OF_FLOAT32.get(major, (64, 32, 4))
        return LaunchConfig(*tiles, num_stages=1, chunk=64, precision="tf32x3")
    if capability and major == 9 and 64 <= head_dim <= 128 and block_q % 128 == 0:
        stages = 3 if head_dim <= 96 else 2
        return LaunchConfig(128, 128, 4, stages, warp_specialized=True, bounds_scores=head_dim <= _WIDEST_BOUNDED)
    if major == 9 and block_q < 128 and head_dim <= 128:
        return LaunchConfig(64, 64, num_warps=4, num_stages=2)
    tables = TILES.get(major, TILES[0])
    return LaunchConfig(*next(tiles for widest, tiles in tables.items() if head_dim <= widest))


def multiplies_int8(
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    block_q: int = 128,
    config: LaunchConfig | None = None,
) -> bool:
    """Whether the attention kernel that runs, in `config` if that is given, multiplies queries and keys as integers:
    where that is faster. At head_dim 64, on Hopper, exponentials take longer than products."""
    config = config or attention_config(head_dim, dtype, capability, block_q)
    return head_dim == 128 and config.warp_specialized


def _splits_float32(head_dim: int, capability: tuple[int, int] | None) -> bool:
    """Whether float32 is multiplied on tensor cores, as TF32 parts, or exactly, on the FMA units."""
    return capability is not None and capability[0] >= 8 and head_dim <= 128


def probe_config(head_dim: int, dtype: torch.dtype, samples: int, capability: tuple[int, int] | None) -> LaunchConfig:
    """The probe's configuration: `tile_q` sampled rows stay in a program, which reads its share of the keys once."""
    if dtype == torch.float32:
        if _splits_float32(head_dim, capability):
            return LaunchConfig(32, 32, num_warps=4, num_stages=2, chunk=64, precision="tf32x3")
        return LaunchConfig(min(64, next_power_of_2(samples, MIN_TILE)), 16, num_warps=8, num_stages=1)
    return LaunchConfig(min(64, next_power_of_2(samples, MIN_TILE)), 64, num_warps=4, num_stages=2)


def probe_has_room(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether the probe's registers hold the samples' mean queries, too, so that it need not read the keys twice."""
    return dtype != torch.float32 and head_dim <= 128 and (capability is None or capability[0] in (9, 10))


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. (Triton's own also works in kernels, which takes it microseconds.)"""
    return -(-a // b)


def next_power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is >= n and >= `least`."""
    return max(least, 1 << (n - 1).bit_length())


def fit_tile(tile: int, block: int, *, most: int) -> int:
    """The longest tile, up to `tile` and `most`, that cuts blocks into equal powers of two or spans whole ones."""
    if block < MIN_TILE or block % MIN_TILE:
        raise ValueError(f"block sizes must be positive multiples of {MIN_TILE}, got {block}")
    return min(tile, most if block & (block - 1) == 0 else block & -block)


def split_head_dim(head_dim: int, widest: int = 128) -> tuple[int, int]:
    """Cuts head_dim into one or two power-of-two chunks: 96 -> (64, 32), 256 -> (128, 128), 72 -> (64, 16), of which
    the last sticks out and is loaded and stored under a mask.
    """
    padded = next_power_of_2(head_dim, 32)
    first = max(32, padded // 2)
    second = next_power_of_2(head_dim - first, MIN_TILE) if head_dim > first else 0
    if padded <= widest and second in (0, first):
        return padded, 0
    return first, second


@lru_cache
def device_limits(index: int | None) -> tuple[tuple[int, int], int]:
    """((compute capability), number of multiprocessors) of a CUDA device; None is the current one."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    # another vendor's numbering means nothing here
    capability = (0, 0) if torch.version.hip else (properties.major, properties.minor)
    return capability, properties.multi_processor_count
