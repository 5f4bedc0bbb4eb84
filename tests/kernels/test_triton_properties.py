# SPDX-License-Identifier: Apache-2.0
"""The Triton engine on any input: equal to the reference, so every identity of test_operators.py holds for it too.

Under the interpreter without a GPU (see conftest.py).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import by_error, cases, expected_errors, layouts, lists_of_the_gpu, tolerance

from rainfusion_compile.kernels import reference
from rainfusion_compile.kernels.cpu import choose_by_error

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the device"),
    pytest.mark.usefixtures("overflows_are_errors"),
]
blocks = st.sampled_from([(32, 16), (16, 32), (128, 64)])  # Triton takes multiples of 16
few_tokens = layouts.filter(lambda layout: layout.tokens <= 256)  # its time grows with their square


@settings(max_examples=10)
@given(cases(blocks=blocks, layouts=few_tokens))
def test_attention_equals_the_reference(case):
    from rainfusion_compile.kernels.gpu import attention

    out = attention.block_sparse_attention(*case.attention_args(flat=False))
    tables = case.tables.attention_arguments
    lists = lists_of_the_gpu(case.q, case.k, case.choice, case.key_mask, tables, case.scale)
    want = reference.block_sparse_attention(*case.attention_args(flat=False), lists)
    torch.testing.assert_close(out.double(), want, **tolerance(case.q.dtype))


@settings(max_examples=5)
@given(cases(blocks=blocks, layouts=few_tokens))
def test_errors_and_recall_equal_the_reference(case):
    from rainfusion_compile.kernels.gpu import probe as triton_probe

    choice, errors, recall = triton_probe.arm_probe(*case.probe_args(flat=False), *by_error(0.1))
    narrow = case.q.dtype != torch.float32  # what is kept between two launches is bfloat16 then
    _, expected = reference.arm_errors(*case.probe_args(flat=False))
    torch.testing.assert_close(recall.double(), expected, atol=6e-3 if narrow else 1e-3, rtol=0)
    expected = expected_errors(case)
    scale = expected[..., -1:].clamp_min(1e-9)
    tolerances = {"atol": 6e-3, "rtol": 4e-2} if narrow else {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(errors / scale, expected / scale, **tolerances, check_dtype=False)
    assert torch.equal(choice, choose_by_error(errors, case.tables.density, 0.1))
