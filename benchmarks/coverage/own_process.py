# SPDX-License-Identifier: Apache-2.0
"""Measures in a process of its own, so that a crash, or what a model does to its process, is that model's alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

R = TypeVar("R")


def in_own_process(make: Callable[[], R], seconds: int) -> R:
    """What ``make`` returns, called with one thread in a fork of this process, which should have computed nothing yet.

    Raises RuntimeError if the process ends without a result, or has none after so many seconds.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, make))
    child.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise RuntimeError(f"takes longer than {seconds} s")
        result: R = receiver.recv()
        return result
    except EOFError:
        child.join()
        raise RuntimeError(f"the process ends with status {child.exitcode}") from None
    finally:
        child.kill()
        child.join()


def _send(sender: Connection, make: Callable[[], R]) -> None:
    import torch

    torch.set_num_threads(1)  # as many models are measured at a time as there are cores
    sender.send(make())
