# SPDX-License-Identifier: Apache-2.0
"""The parts of documents that scripts write: between ``<!-- from SCRIPT -->`` and the next ``<!-- end -->``."""

from __future__ import annotations

END = "<!-- end -->\n"


def put_into(text: str, script: str, part: str) -> str:
    """`text` with `part` where this script writes. Raises ValueError if there is no such place, or more than one."""
    begin = f"<!-- from {script} -->\n"
    before, after = text.split(begin)
    return f"{before}{begin}{part}{END}{after.split(END, 1)[1]}"
