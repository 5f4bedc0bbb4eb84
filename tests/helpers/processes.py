# SPDX-License-Identifier: Apache-2.0
"""Processes that start anew, as the ranks of a group.

They are forked from one that has done nothing but import what ranks wait for: a dozen seconds for each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

IMPORTED = ("torch._dynamo", "torch._inductor.compile_fx", "diffusers.models.transformers.transformer_wan")


def run_ranks(
    work: Callable[..., None], arguments: Callable[[int], tuple[Any, ...]], *, seconds: float, count: int = 2
) -> None:
    """Run ``work(*arguments(rank))`` for so many ranks, each in a process; all must end well in so many seconds."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])  # what is not installed is left out
    processes = [context.Process(target=work, args=arguments(rank), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * count
