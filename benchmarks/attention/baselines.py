# SPDX-License-Identifier: Apache-2.0
"""What sparse attention is compared with: the dense kernels there are, and FlexAttention, dense or with our block mask.

FlexAttention is given every advantage: its queries lie in ``order`` and its keys and values in key blocks
beforehand (not timed), padded so that it needs no bounds checks; its block mask says which blocks are full; and the
fastest of several kernel options counts. So it computes the token pairs that our kernel does, and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks import measure
from benchmarks.attention import flash_attention_3
from rainfusion_compile.sparsity.block_tables import BlockTables

SDPA = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "Flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FA3 = "FA3"
FLEX_BLOCK = (128, 64)
FLEX_OPTIONS: tuple[dict[str, Any], ...] = tuple(
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_stages": 3, "ROWS_GUARANTEED_SAFE": True, **options}
    for options in ({"num_warps": 8}, {"num_warps": 4}, {"num_warps": 8, "USE_TMA": True})
)


DenseKernel = Callable[..., Tensor]  # (q, k, v, mask) [B, H, S, D]; a RuntimeError for what it does not take


def sdpa(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Dense attention by one backend of ``scaled_dot_product_attention``, or a ``RuntimeError``."""
    with sdpa_kernel([SDPA[name]]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dense_kernels() -> dict[str, DenseKernel]:
    """All by name, those that tend to be fastest first: FlashAttention-3 if it is here, then PyTorch's."""
    flash_3 = {FA3: flash_attention_3.attention} if flash_attention_3.available() else {}
    return flash_3 | {name: partial(sdpa, name) for name in SDPA}


def dense_times(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> dict[str, float]:
    """Milliseconds of each dense kernel that runs here and takes these tensors."""
    return dict(_timed(q, k, v, mask))


def best_dense(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> tuple[str, float]:
    """The faster of the first two dense kernels that run here and take these tensors, and its milliseconds.

    Raises RuntimeError if there is none.
    """
    times = dict(itertools.islice(_timed(q, k, v, mask), 2))
    if not times:
        raise RuntimeError(f"no dense kernel of {', '.join(dense_kernels())} runs here")
    best = min(times, key=times.__getitem__)
    return best, times[best]


def _timed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Iterator[tuple[str, float]]:
    for name, kernel in dense_kernels().items():
        try:
            ms = measure.median_ms(partial(kernel, q, k, v, mask))
        except RuntimeError as error:
            _explain(name, error)
            continue
        yield name, ms


def float8_ms(q: Tensor, k: Tensor, v: Tensor) -> float | None:
    """Milliseconds of FlashAttention-3 over these tensors in float8, made so beforehand; None if it does not run."""
    eighths = [x.to(flash_attention_3.FP8) for x in (q, k, v)]
    try:
        return measure.median_ms(lambda: flash_attention_3.attention(*eighths))
    except RuntimeError as error:
        _explain(f"{FA3} in float8", error)
        return None


def dense_flex_ms(q: Tensor, k: Tensor, v: Tensor) -> float | None:
    """Milliseconds of FlexAttention without a mask; None if it does not run here."""
    flex = compiled_flex()
    try:
        return measure.median_ms(lambda: flex(q, k, v), rep_ms=50)
    except Exception as error:
        _explain("dense FlexAttention", error)
        return None


def _explain(what: str, error: Exception) -> None:
    """A baseline that does not run here is left out, never in silence."""
    print(f"{what}: {(str(error).splitlines() or [repr(error)])[0][:150]}", flush=True)


def compiled_flex(**options: Any) -> Callable[..., Tensor]:
    """``flex(q, k, v, block_mask)``, compiled for the shapes it is called with."""

    def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None = None) -> Tensor:
        out = flex_attention(q, k, v, block_mask=block_mask, kernel_options=options or None)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return out

    return torch.compile(flex, fullgraph=True, dynamic=False)


def flex_columns(tables: Sequence[BlockTables]) -> int:
    """Key blocks to lay out so that one compiled kernel serves all these tables: even, as 128 keys divide then."""
    most = max(len(t.key_blocks) for t in tables)
    return most + most % 2


def flex_tensors(q: Tensor, k: Tensor, v: Tensor, tables: BlockTables, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """``q`` in ``order``, ``k`` and ``v`` in key blocks, contiguous, padded to whole blocks."""

    def gather(x: Tensor, order: Tensor, length: int) -> Tensor:
        return F.pad(x.index_select(2, order), (0, 0, 0, length - len(order))).contiguous()

    q_length, k_length = tables.rows.shape[1] * tables.block_q, columns * tables.block_k
    keys = torch.cat([F.pad(block, (0, tables.block_k - len(block))) for block in tables.key_blocks])
    return gather(q, tables.order, q_length), gather(k, keys, k_length), gather(v, keys, k_length)


def flex_mask(tables: BlockTables, chosen: Sequence[int], columns: int) -> BlockMask:
    """The block mask of the pattern that each head took, over ``columns`` key blocks."""
    assert (tables.block_q, tables.block_k) == FLEX_BLOCK
    full = torch.stack([tables.block_mask(pattern) for pattern in range(len(tables.patterns) + 1)])
    lengths = torch.zeros(columns, dtype=torch.int64, device=full.device)
    lengths[: full.shape[-1]] = torch.tensor([len(block) for block in tables.key_blocks], device=full.device)
    full = F.pad(full, (0, columns - full.shape[-1]))
    partial = full & (lengths < tables.block_k)  # blocks that are cut short
    full &= ~partial
    heads = torch.tensor(chosen, device=full.device)

    def in_block(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key % FLEX_BLOCK[1] < lengths[key // FLEX_BLOCK[1]]

    def block_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
        counts, indices = mask.sum(-1), mask.int().argsort(dim=-1, descending=True, stable=True)
        return counts.int()[heads][None].contiguous(), indices.int()[heads][None].contiguous()

    return BlockMask.from_kv_blocks(
        *block_lists(partial),
        *block_lists(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=in_block,
        seq_lengths=(full.shape[-2] * tables.block_q, columns * tables.block_k),
        compute_q_blocks=False,
    )


class SparseFlex:
    """FlexAttention under our block masks; finds its fastest options once for each head_dim that has none known."""

    def __init__(self, known: dict[int, dict[str, Any]]) -> None:
        self.options = dict(known)

    def compile(self, q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Callable[..., Tensor] | None:
        """The compiled function with the fastest options for these tensors' head_dim; None if none of them runs."""
        head_dim = q.shape[-1]
        if head_dim not in self.options:
            times = [(self._time(options, q, k, v, block_mask), options) for options in FLEX_OPTIONS]
            best, options = min(times, key=lambda item: item[0])
            if best == float("inf"):
                return None
            self.options[head_dim] = options
        return compiled_flex(**self.options[head_dim])

    def _time(self, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> float:
        flex = compiled_flex(**options)
        try:
            return measure.median_ms(lambda: flex(q, k, v, block_mask), rep_ms=50)
        except Exception as error:  # whatever a compiler raises: these options do not work here
            _explain(f"FlexAttention with {options}", error)
            return float("inf")
