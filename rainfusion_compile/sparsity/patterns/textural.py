# SPDX-License-Identifier: Apache-2.0
"""The textural pattern: an even sample of the keys of all frames."""

from __future__ import annotations

from rainfusion_compile.sparsity.blocks import WithoutWindow


class Textural(WithoutWindow):
    """Keeps every n-th key, whatever the query: see :mod:`rainfusion_compile.sparsity.sampled_keys`. No window."""

    name = "textural"
