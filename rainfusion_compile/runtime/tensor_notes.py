# SPDX-License-Identifier: Apache-2.0
"""Notes on tensors: what was found out about one, for as long as nobody writes into it.

A note hangs on the tensor and goes with it. Copies and files do not get it.
"""

from __future__ import annotations

import collections
from typing import Any

from torch import Tensor

_NAME = "_rainfusion_notes"


class _Notes(dict[str, tuple[Any, Any]]):
    def __reduce__(self) -> tuple[type, tuple[()]]:
        return collections.OrderedDict, ()  # what `torch.load` takes without asking; nobody looks at it


def note(tensor: Tensor, name: str, value: object) -> None:
    """Keep a value with a tensor, until it is written into, resized or given other memory."""
    notes = getattr(tensor, _NAME, None)
    if not isinstance(notes, _Notes):
        notes = _Notes()
        setattr(tensor, _NAME, notes)
    notes[name] = _state(tensor), value


def noted(tensor: Any, name: str) -> Any:
    """The value kept with a tensor; None if there is none, or the tensor has changed since."""
    notes = getattr(tensor, _NAME, None)
    state, value = notes.get(name, (None, None)) if isinstance(notes, _Notes) else (None, None)
    return value if state is not None and state == _state(tensor) else None


def counts_writes(tensor: Tensor) -> bool:
    """Whether PyTorch counts what is written into a tensor; it does not under inference mode."""
    return not tensor.is_inference()


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = tensor._version if counts_writes(tensor) else None
    return version, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
