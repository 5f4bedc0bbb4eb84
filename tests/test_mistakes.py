# SPDX-License-Identifier: Apache-2.0
"""The likeliest mistakes of users: each gives one line that says what is wrong, and what to do."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_video import Block, Video
from torch import Tensor, nn

import rainfusion_compile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
GRID, PIXELS = (5, 6, 7), (5, 12, 14)  # 210 tokens


def run(model: nn.Module | None = None, *args: Any, context: Any = None, grad: bool = False, **options: Any) -> None:
    """Compile a model and call it."""
    options = {"min_tokens": 0, "sparsity": 0.0, **options}
    compiled: Any = torch.compile(model or Video(), backend="rainfusion", options=options)
    with torch.set_grad_enabled(grad), context or nullcontext():
        compiled(*(args or (torch.randn(1, 3, *PIXELS),)))


def attend(q: Tensor | None = None, grid: Any = GRID, **options: Any) -> None:
    """Call our attention on one tensor as queries, keys and values."""
    q = torch.randn(1, 2, 210, 32) if q is None else q
    with torch.no_grad():
        rainfusion_compile.attention(q, q, q, grid=grid, **options)


def reported(call: Callable[[], Any]) -> str:
    """What a report says that was open during a call."""
    with torch.no_grad(), rainfusion_compile.observe() as report:
        call()
    return str(report)


def in_another_thread() -> str:
    compiled = torch.compile(Video(), backend="rainfusion", options={"min_tokens": 0})

    def call() -> None:
        thread = threading.Thread(target=lambda: torch.no_grad()(compiled)(torch.randn(1, 3, *PIXELS)))
        thread.start()
        thread.join()

    return reported(call)


def switched_off() -> str:
    compiled = torch.compile(Video(), backend="rainfusion", options={"min_tokens": 0})
    with torch.compiler.set_stance("force_eager"):
        return reported(lambda: compiled(torch.randn(1, 3, *PIXELS)))


class ByAnyMask(Video):
    def forward(self, video: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(video, torch.ones(210, 210).tril().bool())


class Causal(Video):
    def forward(self, video: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(video, is_causal=True)


class Dropping(Video):
    def forward(self, video: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(video, dropout_p=0.1)


class Scores(nn.Module):
    """Attention over something that is no video, for nothing tells a grid."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Outside(Video):
    """Attends where Dynamo must not look."""

    def forward(self, video: Tensor) -> Tensor:  # type: ignore[override]
        x = self.patch(video).flatten(2).transpose(1, 2)
        return x + torch.compiler.disable(self.blocks[0])(x)


def twice(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="rainfusion", options={"min_tokens": 0})
    with torch.no_grad():
        for _ in range(2):
            compiled(torch.randn(1, 3, *PIXELS))


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "a misspelt option": (lambda: run(sparcity=0.8), r"unknown option 'sparcity' \(did you mean 'sparsity'\?\)"),
    "an option of Inductor": (lambda: run(max_autotune=True), "Inductor's options go into"),
    "a number out of range": (lambda: run(sparsity=1.5), r"sparsity must be a number in \[0, 1\), or several; got 1.5"),
    "a per cent": (lambda: run(error=5), r"error must be a number in \[0, 1\]; got 5"),
    "one pattern as a string": (lambda: run(patterns="spatial"), "patterns must be a sequence with .*got 'spatial'"),
    "a misspelt pattern": (
        lambda: run(patterns=("spacial",)),
        r"unknown pattern 'spacial' \(did you mean 'spatial'\?\)",
    ),
    "a preset of another name": (lambda: run(preset="ultra"), "preset must be one of 'quality', 'balanced', 'fast'"),
    "an option of the other rule": (lambda: run(min_recall=0.5), "min_recall belongs to arm='recall'"),
    "float8": (lambda: run(precision="fp8"), "precision must be 'full' or 'int8'; got 'fp8'"),
    "integers where no GPU multiplies them": (lambda: run(precision="int8"), "int8.*Hopper|int8.*capability"),
    "a grid of two numbers": (
        lambda: run(grid=(6, 7)),
        r"grid must be 3 integers.*\(frames, rows, columns\); got \(6, 7\)",
    ),
    "a misspelt backend": (
        lambda: torch.compile(Video(), backend="rainfuson")(torch.randn(1, 3, *PIXELS)),
        "rainfuson.*",
    ),
    "a model that another backend compiled": (
        lambda: rainfusion_compile.explain(torch.compile(Video(), backend="eager"), torch.randn(1, 3, *PIXELS)),
        "already compiled, but .* another backend",
    ),
    "a whole number as a mask": (
        lambda: attend(key_mask=torch.ones(1, 1, 210, dtype=torch.int64)),
        r"key_mask must be of dtype bool, .*; got torch.int64; .* pass key_mask.bool\(\)",
    ),
    "double precision": (lambda: attend(torch.randn(1, 2, 210, 32).double()), "float64"),
    "a head_dim of 20": (lambda: attend(torch.randn(1, 2, 210, 20)), "head_dim.*multiple of 8.*20"),
    "heads behind tokens": (
        lambda: attend(torch.randn(1, 210, 2, 32)),
        r"grid \(5, 6, 7\).* makes 210 tokens; q has 2",
    ),
    "gradients by hand": (
        lambda: rainfusion_compile.attention(*[torch.randn(1, 2, 210, 32, requires_grad=True)] * 3, grid=GRID),
        "call it under torch.no_grad",
    ),
    "dense where that is forbidden": (
        lambda: run(grad=True, strict=True),
        "strict=True, but .* stays dense: .*call it under torch.no_grad",
    ),
    "dense steps where nothing is compiled": (
        lambda: rainfusion_compile.sparse_eager_attention(GRID, dense_steps=0.1).__enter__(),
        "dense_steps is no option of attention outside of graphs: .* rainfusion_compile.dense_first_steps",
    ),
}

WARNINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "gradients": (lambda: run(grad=True), "0 of 2 video self-attentions sparse: .*call it under torch.no_grad"),
    "a short video": (lambda: run(min_tokens=8192), "210 tokens.*min_tokens=8192.*; set the option min_tokens"),
    "a grid in pixels": (lambda: run(grid=PIXELS), r"grid=\(5, 12, 14\).*they count tokens, not pixels"),
    "a layout in pixels": (
        lambda: run(context=rainfusion_compile.video_layout(PIXELS)),
        r"grid=\(5, 12, 14\).*they count tokens, not pixels",
    ),
    "dropout": (lambda: run(Dropping()), "0 of 2 .*dropout.*; call model.eval"),
    "a mask of pairs": (lambda: run(ByAnyMask()), r"0 of 2 .*mask.*; pass a mask of keys, \[B, 1, 1, S\]"),
    "causal attention": (lambda: run(Causal()), "0 of 2 .*causal.*; drop is_causal"),
    "a head_dim that no operator takes": (
        lambda: run(Block(40, 2), torch.randn(1, 210, 40), grid=GRID),
        "0 of 1 .*head dim 20.*; pass .*D a multiple of 8",
    ),
    "tokens that no graph knows": (lambda: run(Scores(), torch.randn(1, 2, 210, 32)), "0 of 1 .*; give options grid="),
    "a sparsity that no grid of few frames has": (
        lambda: run(sparsity=0.95),
        "sparsity=0.95 is out of reach for grid 5x6x7: .*expect no less than .*or leave it dense by .*min_tokens",
    ),
    "dense steps that no timestep tells": (
        lambda: run(dense_steps=0.2),
        "dense_steps.*does not show which input is the timestep.*rainfusion_compile.dense_first_steps",
    ),
    "attention outside all graphs": (
        lambda: twice(Outside()),
        "Outside: none of its . graphs attends over a video; .*open `with rainfusion_compile.sparse_eager_attention",
    ),
}

REPORTS: dict[str, tuple[Callable[[], str], str]] = {
    "nothing ran": (
        lambda: reported(lambda: None),
        "no graph of this backend ran: .*; call what torch.compile.* returns",
    ),
    "another thread": (
        in_another_thread,
        r"nothing ran in this thread, 1 call in others: observe\(all_threads=True\) hears them",
    ),
    "the compiler switched off": (
        switched_off,
        r"nothing ran, for torch.compile is switched off \(set_stance\('force_eager'\)",
    ),
    "the wrong object": (
        lambda: reported(lambda: torch.compile(nn.Conv3d(3, 3, 1), backend="rainfusion")(torch.randn(1, 3, 5, 12, 14))),
        "1 graph ran, without any attention: compile what attends",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_what_is_wrong_and_what_is_taken(name: str) -> None:
    make, message = ERRORS[name]
    with pytest.raises(Exception) as caught:  # noqa: PT011 (torch.compile wraps some in errors of its own)
        make()
    lines = [line for line in str(caught.value).splitlines() if re.search(message, line)]
    assert len(lines) == 1, str(caught.value)


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_comes_once_and_has_a_remedy(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, message = WARNINGS[name]
    with caplog.at_level(logging.INFO, "rainfusion_compile"):
        make()
    told = [one for one in caplog.records if one.name == "rainfusion_compile" and re.search(message, one.getMessage())]
    assert len(told) == 1, caplog.text
    assert told[0].levelno == logging.WARNING
    assert "\n" not in told[0].getMessage()


@pytest.mark.parametrize("name", REPORTS)
def test_an_empty_report_says_why(name: str) -> None:
    make, message = REPORTS[name]
    text = make()
    assert len(re.findall(message, text)) == 1, text
