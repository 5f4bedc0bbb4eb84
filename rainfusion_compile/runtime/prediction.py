# SPDX-License-Identifier: Apache-2.0
"""Calls that begin before it is known what their inputs hold, so that the device need not wait for the host.

Whether inputs still hold what they held is asked of the device, in front of the call's own work. Most likely they do:
the call runs for that, and the host waits for the answer when the device is busy already. Where the answer is another,
what was computed is dropped, and the call runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rainfusion_compile.passes.provenance.known_tokens import Told
from rainfusion_compile.runtime.contents import Agreement

Outputs = Sequence[Any]


class Heard:
    """What is known of a call from outside its graph, by what its inputs are asked to hold still.

    `claims`: tensors and what they are said to hold, compared from here on, without waiting. `told`: what is known if
    these keys of the claims agree. It forgets what is said by others.
    """

    def __init__(self, claims: Mapping[Any, tuple[Tensor, Tensor]], told: Callable[[set[Any]], Told]) -> None:
        self._agreement, self._told = Agreement(claims), told
        self.expected = told(self._agreement.possible)

    @property
    def late(self) -> bool:
        """Whether there is an answer to be waited for."""
        return self._agreement.late

    def wait(self) -> Told:
        """What is known indeed. Waits for the device, if there is anything to be compared."""
        true = self._agreement.wait()
        return self.expected if true == self._agreement.possible else self._told(true)


class Predictor:
    """Runs the calls of one graph for what is expected of them while that comes true, where a run may be dropped."""

    def __init__(self, allowed: bool) -> None:
        self.allowed, self.right = allowed, True

    def __call__(
        self, heard: Heard, seen: Callable[[Told], bool], start: Callable[[Told], Callable[[], Outputs]]
    ) -> Outputs:
        """The outputs of a call of which this was heard.

        `seen`: whether it can be run for that without compiling or analysing anything. `start` runs it for that, and
        returns what finishes it: all that may be seen of a run from outside. It raises if the run was right.
        """
        expected = heard.expected
        finish: Callable[[], Outputs] | None = None
        if self.allowed and self.right and heard.late and seen(expected):
            try:
                finish = start(expected)
            except Exception:
                if heard.wait() == expected:
                    raise
        known = heard.wait()
        self.right = known == expected
        if finish is None or not self.right:
            finish = None  # frees what it would have returned
            finish = start(known)
        return finish()
