# SPDX-License-Identifier: Apache-2.0
"""Why attention stays dense: messages that users read, each of a kind that says what can be done about it."""

from __future__ import annotations

from enum import Enum


class DenseReason(Enum):
    """Kinds of reasons: what a user can do, "" where there is nothing, and whether it is as it should be."""

    ASKED = "", True
    CROSS_ATTENTION = "", True
    CAUSAL = "", False
    SIZE = "set the option min_tokens", False
    DROPOUT = "call model.eval()", False
    DERIVATIVES = "sparse attention is for inference, under torch.no_grad()", False
    MASK = "pass a mask of keys, [B, 1, 1, S]", False
    UNSUPPORTED = "", False
    SPELLING = "call torch.nn.functional.scaled_dot_product_attention instead", False
    NESTED = "compile without checkpoints or nested regions", False
    NO_TENSOR = "", False
    TOKENS_UNKNOWN = "compute queries, keys and values from one tensor, in one graph", False
    GRID_UNKNOWN = "give options grid=(T, H, W)", False
    NO_GRID = "", False
    GIVEN = "correct the options grid and text, or the video_layout", False
    ANY_SIZE = "compile with dynamic=False", False

    def __init__(self, remedy: str, expected: bool) -> None:
        self.remedy, self.expected = remedy, expected


class Reason(str):
    """The message that a report shows, of a `kind`."""

    kind: DenseReason

    def __new__(cls, kind: DenseReason, message: str) -> Reason:
        reason = super().__new__(cls, message)
        reason.kind = kind
        return reason

    def __getnewargs__(self) -> tuple[DenseReason, str]:  # type: ignore[override]
        return self.kind, str(self)

    @property
    def advice(self) -> str:
        """The message, and what can be done about it."""
        remedy = self.kind.remedy
        return str(self) if not remedy or self.endswith(remedy) else f"{self}; {remedy}"
