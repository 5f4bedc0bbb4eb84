# SPDX-License-Identifier: Apache-2.0
"""Two processes that start anew, as the ranks of a group."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.multiprocessing


def run_both_ranks(work: Callable[..., None], arguments: Callable[[int], tuple[Any, ...]], *, seconds: float) -> None:
    """Run ``work(*arguments(rank))`` for ranks 0 and 1, each in a process; both must end well in so many seconds."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=arguments(rank), daemon=True) for rank in (0, 1)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
