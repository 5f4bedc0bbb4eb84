# SPDX-License-Identifier: Apache-2.0
"""What a pattern is to the builder of block tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from rainfusion_compile.sparsity.blocks import Blocks


class Cover(NamedTuple):
    """The key blocks that a pattern keeps: ``mask``, bool ``[nQ, nB]`` over the blocks of `order`, and ``gathered``.

    These are positions of single keys, whole blocks of them for each video, that all queries of their video read.
    """

    mask: Tensor
    gathered: Tensor | None = None


class Pattern(ABC):
    """A pattern over the blocks of one layout.

    Attributes:
        name: as in options and reports.
        needs_frames: keeps everything in a video of one frame, so it is no choice there.
        reads_runs: keeps whole frames, so its rows read keys as they lie in memory.
        gathers_keys: its covers gather keys. At most one pattern of a table may.
    """

    name: ClassVar[str]
    needs_frames: ClassVar[bool] = False
    reads_runs: ClassVar[bool] = False
    gathers_keys: ClassVar[bool] = False

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    @staticmethod
    @abstractmethod
    def keeps(query: Tensor, key: Tensor, radius: Any) -> Tensor:
        """Whether it keeps each pair of video tokens with this reach, bool ``[...]``: coordinates (frame, row, column)
        ``query`` and ``key``, int64 ``[..., 3]``, are broadcast against each other.
        """

    @abstractmethod
    def radius(self, target: float) -> Any:
        """The reach whose realised density comes nearest to ``target``."""

    @abstractmethod
    def cover(self, radius: Any) -> Cover:
        """The blocks that hold all pairs that it keeps with this reach, and what is always kept."""

    def density(self, radius: Any) -> float:
        """Realised density with this reach."""
        return self.blocks.density(self.blocks.with_gathered(*self.cover(radius)))
