# SPDX-License-Identifier: Apache-2.0
"""What tensors carry or show, compared at once with what they held before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rainfusion_compile.passes.provenance.known_tokens import Carried
from rainfusion_compile.runtime import carry
from rainfusion_compile.runtime.contents import Agreement
from rainfusion_compile.runtime.outside_knowledge import PositionInputs, _still


def carried_by(args: Sequence[Any]) -> Carried:
    return carry.carried_by(args, Agreement(carry.claims(args)).wait())


def shown_by(args: Sequence[Any], inputs: PositionInputs) -> Carried:
    true = Agreement(_still(inputs.last, args)).wait()
    return inputs.add_to((None,) * len(args), args, {number: inputs.last[number][1] for number in true})
