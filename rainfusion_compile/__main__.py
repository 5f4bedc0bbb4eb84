# SPDX-License-Identifier: Apache-2.0
"""``python -m rainfusion_compile COMMAND``; see :mod:`rainfusion_compile.commands`."""

from __future__ import annotations

import sys

from rainfusion_compile.commands import main

if __name__ == "__main__":
    sys.exit(main())
