# SPDX-License-Identifier: Apache-2.0
"""What users are told while a model compiles and runs: each thing once for each model, with the model's name."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.output_graph import OutputGraph
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger("rainfusion_compile")

_told: WeakIdKeyDictionary = WeakIdKeyDictionary()  # what each model was told, for as long as it lives


class Notices:
    """Tells what is to be known of one model, of one graph if no model is known, or of a place; and nothing twice.

    `whole`: what calls the whole model, of which ``model`` may be a block.
    """

    def __init__(
        self, model: nn.Module | None = None, *, whole: nn.Module | None = None, where: str | None = None
    ) -> None:
        self.whole: Callable[[], nn.Module | None] = (lambda: None) if whole is None else weakref.ref(whole)
        where = where if model is None else type(model).__name__
        self.prefix = "rainfusion: " if where is None else f"rainfusion: {where}: "
        self._told: set[str] = set() if model is None else _told.setdefault(model, set())

    def __call__(self, message: str, level: int = logging.WARNING) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.log(level, "%s%s", self.prefix, message)


class Silence(Notices):
    """Tells nothing."""

    def __call__(self, message: str, level: int = logging.WARNING) -> None:
        pass


def compiled_model() -> nn.Module | None:
    """The module whose method Dynamo is compiling, of which it tells a backend nothing; None if there is none."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if isinstance(frame.f_locals.get("self"), OutputGraph):
            found = frame.f_locals["self"].root_tx.f_locals.get("self")
            return found if isinstance(found, nn.Module) else None
    return None


def whole_model(compiled: nn.Module | None) -> nn.Module | None:
    """The outermost module that is called, of which Dynamo is compiling this one; itself if it is called by none."""
    found, frame = compiled, sys._getframe().f_back
    while frame is not None:
        # No other frames' variables: a look at these keeps them until the frame ends.
        if frame.f_code is nn.Module._call_impl.__code__ and not isinstance(frame.f_locals["self"], OptimizedModule):
            found = frame.f_locals["self"]
        frame = frame.f_back
    return found
