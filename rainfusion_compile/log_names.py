# SPDX-License-Identifier: Apache-2.0
"""``TORCH_LOGS="+rainfusion"``: the backend's name, by which users know this package, for its log."""

from __future__ import annotations

import os


def register() -> None:
    """Give our log its other name. torch calls this, an entry point, whenever it is imported.

    torch before 2.13 reads TORCH_LOGS first. Without need nothing is registered: torch takes a registered log out of
    the hands of `logging`'s other handlers.
    """
    if "rainfusion" in os.environ.get("TORCH_LOGS", ""):
        from torch._logging._internal import register_log

        register_log("rainfusion", "rainfusion_compile")
