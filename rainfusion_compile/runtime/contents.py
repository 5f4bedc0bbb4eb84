# SPDX-License-Identifier: Apache-2.0
"""What tensors hold, bit by bit: whether it is still what it was.

PyTorch's counts of writes cannot tell. Collectives, ``.data``, NumPy, storages, CUDA graphs and whatever writes through
a pointer are not counted, and under inference mode nothing is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

_AT_ONCE = 2**25
"""Bytes that a fingerprint looks at at once, which bounds its memory to about thrice that."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

K = TypeVar("K", bound=Hashable)


def agreeing(pairs: Mapping[K, tuple[Tensor, Tensor]]) -> set[K]:
    """The keys of those pairs whose tensors are alike, bit by bit. Waits once for each device."""
    differ: defaultdict[torch.device, dict[K, Tensor]] = defaultdict(dict)
    for key, (one, two) in pairs.items():
        if one.shape == two.shape and one.dtype == two.dtype and one.device == two.device:
            differ[one.device][key] = (_bits(one) != _bits(two)).any()
    answers = {key: answer for flags in differ.values() for key, answer in zip(flags, _on_host(flags), strict=True)}
    return {key for key, differs in answers.items() if not differs}


def fingerprint(tensor: Tensor, dim: int) -> Tensor:
    """A number for all that is at each place of a dimension, int64 ``[size]`` on the tensor's device; does not wait.

    The sum of its 32-bit words, modulo 2^64, each times an odd number of its own: entries that are moved, along this
    dimension or another, or replaced do not keep their number but by a chance of about 2^-32.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    size = tensor.shape[dim]
    row = tensor.numel() // max(size, 1) * tensor.itemsize
    word = 4 if row % 4 == 0 and tensor.storage_offset() * tensor.itemsize % 4 == 0 else 1
    weights = torch.arange(1, row // word + 1, device=tensor.device) * -0x61C8864680B583EB  # scattered as by splitmix64
    weights = ((weights ^ (weights >> 30)) * -0x40A7B892E31B1A47) | 1
    parts = []
    for part in tensor.split(max(1, _AT_ONCE // max(row, 1)), dim):
        words = part.movedim(dim, 0).contiguous().view(-1).view(_INTEGERS[word]).view(part.shape[dim], -1 if row else 0)
        parts.append((words * weights).sum(1))
    return torch.cat(parts)


def capturing() -> bool:
    """Whether a CUDA graph is being recorded, which cannot wait for an answer and will see other contents later."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.view(_INTEGERS[tensor.itemsize])


def _on_host(flags: Mapping[K, Tensor]) -> list[bool]:
    answers: list[bool] = torch.stack(list(flags.values())).tolist()
    return answers
