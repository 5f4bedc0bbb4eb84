# SPDX-License-Identifier: Apache-2.0
"""The Triton engine on any input: equal to the reference, so every identity of test_operators.py holds for it too.

Under the interpreter without a GPU (see conftest.py).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases, tolerance

from rainfusion_compile.kernels import reference

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the device")
blocks = st.sampled_from([(32, 16), (16, 32), (128, 64)])  # Triton takes multiples of 16


@settings(max_examples=25)
@given(cases(blocks=blocks))
def test_attention_equals_the_reference(case):
    from rainfusion_compile.kernels.gpu import attention

    out = attention.block_sparse_attention(*case.attention_args(flat=False))
    want = reference.block_sparse_attention(*case.attention_args(flat=False))
    torch.testing.assert_close(out.double(), want, **tolerance(case.q.dtype))


@settings(max_examples=25)
@given(cases(blocks=blocks))
def test_recall_equals_the_reference(case):
    from rainfusion_compile.kernels.gpu import probe as triton_probe

    _, recall = triton_probe.arm_probe(*case.probe_args(flat=False), 0.9, 0.1)
    torch.testing.assert_close(recall.double(), reference.recall(*case.probe_args(flat=False)), atol=1e-3, rtol=0)
