# SPDX-License-Identifier: Apache-2.0
"""Which versions of torch this package was tested with: it relies on parts of Dynamo that are nobody's interface.

Imports no torch: the command `doctor` looks here where there is none.
"""

from __future__ import annotations

import functools
import logging

TESTED = ((2, 11), (2, 15))
"""The first and the last."""


@functools.cache
def warn_if_untested(version: str) -> None:
    """Say once that a version of torch is none of those that were tested."""
    number = tuple(int(part) for part in version.split(".")[:2])
    if not TESTED[0] <= number <= TESTED[1]:
        first, last = (".".join(map(str, tested)) for tested in TESTED)
        logging.getLogger("rainfusion_compile").warning(
            "rainfusion: tested with torch %s to %s, and this is %s: where it fails or leaves attention dense for no "
            "good reason, install one of these", first, last, version,
        )  # fmt: skip
