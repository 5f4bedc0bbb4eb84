# SPDX-License-Identifier: Apache-2.0
"""What tensors hold, bit by bit: whether it is still what it was.

PyTorch's counts of writes cannot tell. Collectives, ``.data``, NumPy, storages, CUDA graphs and whatever writes through
a pointer are not counted, and under inference mode nothing is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rainfusion_compile.options import real_tensors

_AT_ONCE = 2**25  # bytes that a fingerprint looks at at once, which bounds its memory to about thrice that
_LONGEST_KEPT = 2**15  # of the odd numbers of a fingerprint, which the next one needs too
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Agreement:
    """Which of some pairs of tensors are alike, bit by bit: asked of their devices at once, answered when waited for.

    `possible`: the keys of those pairs that may be, for their shapes, dtypes and devices are alike.
    """

    def __init__(self, pairs: Mapping[Any, tuple[Tensor, Tensor]]) -> None:
        differ: defaultdict[torch.device, dict[Any, Tensor]] = defaultdict(dict)
        for key, (one, two) in pairs.items():
            if one.shape == two.shape and one.dtype == two.dtype and one.device == two.device:
                differ[one.device][key] = _differ(one, two)
        self.possible = {key for flags in differ.values() for key in flags}
        self._answers = [(list(flags), _sent(torch.stack([*flags.values()]))) for flags in differ.values()]
        self._true: set[Any] | None = None if self._answers else set()

    @property
    def late(self) -> bool:
        """Whether a device still has to answer."""
        return any(event is not None and not event.query() for _, (_, event) in self._answers)

    def wait(self) -> set[Any]:
        """The keys of those pairs that are alike. Waits once for each device."""
        if self._true is None:
            answers = [zip(keys, _on_host(sent), strict=True) for keys, sent in self._answers]
            self._true = {key for each in answers for key, differs in each if not differs}
        return self._true


def fingerprint(tensor: Tensor, dim: int) -> Tensor:
    """A number for all that is at each place of a dimension, int64 ``[size]`` on the tensor's device; does not wait.

    The sum of its 32-bit words, modulo 2^64, each times an odd number of its own: entries that are moved, along this
    dimension or another, or replaced do not keep their number but by a chance of about 2^-32.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    size = tensor.shape[dim]
    row = tensor.numel() // max(size, 1) * tensor.itemsize
    word = 4 if row % 4 == 0 and tensor.storage_offset() * tensor.itemsize % 4 == 0 else 1
    numbers = _kept_odd_numbers if row // word <= _LONGEST_KEPT else _odd_numbers
    weights = numbers(row // word, tensor.device)
    parts = []
    for part in tensor.split(max(1, _AT_ONCE // max(row, 1)), dim):
        run = part.movedim(dim, 0).contiguous().as_strided((part.numel(),), (1,))  # one number may have any stride
        words = run.view(_INTEGERS[word]).view(part.shape[dim], -1 if row else 0)
        parts.append((words * weights).sum(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    """int64 ``[count]``, the same in every call."""
    numbers = torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB  # scattered as by splitmix64
    return ((numbers ^ (numbers >> 30)) * -0x40A7B892E31B1A47) | 1


@lru_cache(64)
def _kept_odd_numbers(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False), real_tensors():
        return _odd_numbers(count, device)


def capturing() -> bool:
    """Whether a CUDA graph is being recorded, which cannot wait for an answer and will see other contents later."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _differ(one: Tensor, two: Tensor) -> Tensor:
    """Whether two tensors of one shape and dtype differ in a bit; does not wait."""
    one, two = (x.resolve_conj().resolve_neg() if x.is_conj() or x.is_neg() else x for x in (one, two))
    try:
        differ = one.view(torch.int64) != two.view(torch.int64)
    except RuntimeError:  # not in words of 64 bits
        one, two = (torch.view_as_real(x) if x.is_complex() else x for x in (one, two))
        differ = one.view(_INTEGERS[one.itemsize]) != two.view(_INTEGERS[one.itemsize])
    return differ.any()


def _sent(flags: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Flags of one device on their way to the host, and what tells that they are there; None if they are."""
    if not flags.is_cuda:
        return flags, None
    event, sent = torch.cuda.Event(), flags.to("cpu", non_blocking=True)  # to pinned memory
    event.record(torch.cuda.current_stream(flags.device))
    return sent, event


def _on_host(sent: tuple[Tensor, torch.cuda.Event | None]) -> list[bool]:
    flags, event = sent
    if event is not None:
        event.synchronize()
    return [bool(flag) for flag in flags.tolist()]
