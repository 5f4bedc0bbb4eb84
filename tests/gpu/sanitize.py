# SPDX-License-Identifier: Apache-2.0
"""The probe, and attention by one of the two kernels, on small shapes, for compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py portable hopper int8
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py portable hopper int8

Neither should find anything. compute-sanitizer must be 2026.4 or later (`pip install nvidia-cuda-sanitizer-api` brings
it, under nvidia/cu13/): racecheck of 2025.3 reports a word that Triton's own `warp_specialize` guards with a barrier.
"""

import argparse
import dataclasses

import torch
from torch import Tensor

from rainfusion_compile.kernels import operators
from rainfusion_compile.options import Options
from rainfusion_compile.sparsity.block_tables import BlockTables, block_tables
from rainfusion_compile.sparsity.layout import VideoLayout
from rainfusion_compile.sparsity.patterns import PATTERNS

LAYOUT = VideoLayout((9, 14, 19), (0, 7))
RULES = (Options(error=0.5), Options(arm="recall", recall_target=0.9, min_recall=0.5))
# kernel: (query block, dtype, head dims). Query blocks of 64 are the portable kernel's on every GPU.
CASES = {
    "hopper": [(128, torch.bfloat16, (128, 96, 72, 64)), (128, torch.float16, (128,))],
    "int8": [(128, torch.bfloat16, (128,)), (128, torch.float16, (128,))],
    "portable": [
        (64, torch.bfloat16, (64, 96, 128)),
        (128, torch.bfloat16, (32, 40, 160, 256)),
        (64, torch.float32, (64, 96, 128)),
    ],
}


def check_coverage(tables: BlockTables, sampled: bool) -> None:
    """Every candidate must have rows of several tiles. Windows alone: spatial ones in runs of memory, the others
    gathered. With samples: rows that begin with blocks of these, and go on with others."""
    first_run = len(tables.key_order) // tables.block_k - -(-LAYOUT.tokens // tables.block_k)
    for number, name in enumerate(tables.patterns):
        kept = tables.block_mask(number)
        middle = kept[len(kept) // 2]
        count, phases = tables.sampled[int(tables.rows[number, len(kept) // 2]), :2].tolist()
        assert (count > 0) == (sampled or name == "textural"), (name, "the middle row must sample")
        assert phases > 1 or not count, (name, "there is only one phase")
        assert middle[first_run:].any() == (name == "spatial" and not sampled), name
        assert int(middle.sum()) >= 4, (name, "the middle row must have several tiles")
        assert count < int(middle.sum()) < LAYOUT.tokens // tables.block_k, (name, "the middle row must be sparse")


def attend(
    block_q: int, dtype: torch.dtype, head_dim: int, patterns: tuple[str, ...], sampled: bool, int8: bool
) -> None:
    device = torch.device("cuda")
    t = block_tables(
        LAYOUT, sparsity=0.6, patterns=patterns, sampled=sampled, int8=int8, block_q=block_q, device=device
    )
    check_coverage(t, sampled)
    hidden = torch.zeros(1, 1, LAYOUT.tokens, device=device, dtype=torch.bool)
    hidden[..., -5:] = True
    bias = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, -3)
    choice = torch.arange(4, device=device, dtype=torch.int32)[None] % (len(t.patterns) + 1)
    assert set(choice[0].tolist()) == {*range(len(t.patterns) + 1)}, "a head of each candidate, one dense"
    for mask in (None, ~hidden, bias):
        wide = torch.randn(3, 1, LAYOUT.tokens, choice.shape[1], head_dim, device=device, dtype=dtype)
        q, k, v = wide.permute(0, 1, 3, 2, 4)
        k, v = k[:, :2], v[:, :2]
        scale = head_dim**-0.5
        for rule in RULES:
            _, errors, recall = operators.arm_probe(q, k, v, mask, *t.probe_arguments, scale, *rule.rule(device))
            assert bool(errors.isfinite().all() & recall.isfinite().all())
        out = operators.block_sparse_attention(q, k, v, choice, mask, *t.attention_arguments, scale)
        assert out.isfinite().all()
    for wrong in (-1, LAYOUT.tokens, 2**31 - 1):
        attend_to_nonsense(t, q, k, v, choice, mask, wrong)


def attend_to_nonsense(
    t: BlockTables, q: Tensor, k: Tensor, v: Tensor, choice: Tensor, mask: Tensor, wrong: int
) -> None:
    """Numbers that point nowhere, one table after the other: only that kernels end, and stay inside, counts."""
    scale = q.shape[-1] ** -0.5
    for name in ("order", "key_order", "rows", "row_ptr", "indices", "sampled", "samples", "keys"):
        field = getattr(t, name).clone()
        field.flatten()[1::3] = wrong
        nonsense = dataclasses.replace(t, **{name: field})
        operators.block_sparse_attention(q, k, v, choice, mask, *nonsense.attention_arguments, scale)
        operators.arm_probe(q, k, v, mask, *nonsense.probe_arguments, scale, *RULES[0].rule(q.device))
    operators.block_sparse_attention(q, k, v, torch.full_like(choice, wrong), mask, *t.attention_arguments, scale)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+", choices=list(CASES))
    kernels = parser.parse_args().kernels
    if {"hopper", "int8"} & {*kernels} and torch.cuda.get_device_capability()[0] != 9:
        parser.error(f"the Hopper kernel needs a GPU of compute capability 9, not {torch.cuda.get_device_capability()}")
    torch.manual_seed(0)
    for name in kernels:
        for block_q, dtype, head_dims in CASES[name]:
            for head_dim in head_dims:
                attend(block_q, dtype, head_dim, PATTERNS, sampled=False, int8=name == "int8")
                attend(block_q, dtype, head_dim, ("spatial", "textural"), sampled=True, int8=name == "int8")
        torch.cuda.synchronize()
        print("ran", name)


if __name__ == "__main__":
    main()
