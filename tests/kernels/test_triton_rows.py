# SPDX-License-Identifier: Apache-2.0
"""Rows as Triton's kernels read them: offsets, copies of what is not aligned, and the phases drawn of queries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import triton
import triton.language as tl
from random_tables import DEVICE, make_qkv

from rainfusion_compile.kernels.gpu.rows import aligned_rows, row_strides, rows_of, sampled_blocks
from rainfusion_compile.kernels.phases import draws


@triton.jit
def draw_kernel(q, order, sampled, out, tokens, heads, stride_b, stride_h, stride_s):
    head = tl.program_id(0)
    q += (head // heads * stride_b + head % heads * stride_h) * 8
    count, shift = sampled_blocks(q, order, tokens, stride_s, sampled, 1)
    tl.store(out + 2 * head, count)
    tl.store(out + 2 * head + 1, shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_phases_are_drawn_as_on_the_cpu(dtype: torch.dtype):
    q = make_qkv(2, 5, 1, 37, 16, dtype)[0]
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1)).int().to(DEVICE)
    for phases in (1, 7, 2**31 - 1):
        sampled = F.pad(torch.tensor([[1, 2], [11, phases]], dtype=torch.int32, device=DEVICE), (0, 3))
        out = torch.empty(10, 2, dtype=torch.int32, device=DEVICE)
        draw_kernel[(10,)](q, order, sampled, out, 37, 5, *row_strides(rows_of(q))[0])
        assert out[:, 0].tolist() == [11] * 10
        assert out[:, 1].tolist() == (draws(q, order) % phases).flatten().tolist()


def test_wide_strides_use_wide_offsets():
    assert row_strides(rows_of(torch.empty(1, 1, 3, 8, device="meta")))[1].name == "int32"
    far = torch.empty(0, device="meta").as_strided((1, 1, 3, 8), (0, 8, 2**30, 1))
    strides, offset = row_strides(rows_of(far))
    assert (strides, offset.name) == ([0, 0, 2**27], "int64")
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8, got 12"):
        row_strides(rows_of(torch.empty(1, 1, 3, 12)))


def test_only_rows_out_of_step_with_16_bytes_are_copied():
    packed = torch.randn(2, 5, 3, 4, 32, dtype=torch.bfloat16)  # [B, S, 3, H, D], a fused projection
    repeated = packed[:, :, 1, :1].transpose(1, 2).expand(2, 4, 5, 32)
    views = (packed[:, :, 1].transpose(1, 2), packed[..., 8:24][:, :, 0].transpose(1, 2), packed[:, :, 0, :1], repeated)
    for view in views:
        assert aligned_rows(view) is view
    shifted = torch.randn(2 * 4 * 5 * 32 + 1, dtype=torch.bfloat16)[1:].view(2, 4, 5, 32)
    narrow = torch.randn(2, 4, 5, 34, dtype=torch.bfloat16)[..., 2:]
    scattered = torch.randn(2, 4, 32, 5, dtype=torch.bfloat16).transpose(2, 3)
    alike = torch.randn(2, 4, 1, 32, dtype=torch.bfloat16).expand(2, 4, 5, 32)
    for view in (shifted, narrow, scattered, alike):
        copy = aligned_rows(view)
        assert copy is not view
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        assert torch.equal(copy, view)
