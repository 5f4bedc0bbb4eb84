# SPDX-License-Identifier: Apache-2.0
"""``observe``: a report on what runs while a context is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo import eval_frame

from rainfusion_compile.report import Report
from rainfusion_compile.runtime.eager_calls import hear_eager_calls
from rainfusion_compile.runtime.open_reports import opened


@contextmanager
def observe(*, all_threads: bool = False) -> Iterator[Report]:
    """Collect what every graph compiled by this backend does while the context is open: in this thread, or in all.

    Attention that runs outside all graphs is told of, too. Where several are open, each hears every call.

    Example::

        with rainfusion_compile.observe() as report:
            video = pipe(prompt).frames[0]
        print(report)
    """
    report = Report()
    hear_eager_calls()
    try:
        with opened(report, all_threads=all_threads):
            yield report
    finally:
        report.eager = eval_frame._stance.stance == "force_eager" or torch._dynamo.config.disable
