# SPDX-License-Identifier: Apache-2.0
"""What the operators accept, told once for all engines: a ``ValueError`` names the argument and what it may be.

What tables and choices contain is looked at where it lies on the CPU; on a GPU that would wait for the device, so the
kernels there bound every index that they read instead (:mod:`rainfusion_compile.kernels.gpu.rows`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.nn.functional import pad

from rainfusion_compile.sparsity.block_tables import AttentionTables, ProbeTables
from rainfusion_compile.sparsity.candidates import MAX_CANDIDATES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MASK_DTYPES = (torch.bool, *DTYPES, torch.float64)
INT8_NEEDS = "precision='int8' needs a GPU of compute capability 9.0 (H100, H200), head_dim 128 and a 16-bit dtype"
INFERENCE_ONLY = "sparse video attention has no gradient; it is for inference"


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check_devices(q: Tensor, **others: Tensor | None) -> None:
    """That all lie on the device of ``q``."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}; all tensors must be on one device")


def check_row(layout: Tensor) -> None:
    """A row of :mod:`layout_codec`, whose numbers are checked as they are decoded."""
    if layout.device.type != "cpu" or layout.dtype != torch.int64 or layout.dim() != 1:
        found = f"{layout.dtype} {list(layout.shape)} {layout.device}"
        raise ValueError(f"layout must be int64 [n] on the CPU; got {found}")


def check_operands(q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None) -> None:
    """Queries, keys, values and the key mask of every operator.

    Raises:
        TypeError: if one is no tensor.
        ValueError: for a shape, dtype or device that no engine takes.
        NotImplementedError: if one carries a tangent of forward-mode differentiation, which would be lost.
    """
    given = {"q": q, "k": k} | {name: x for name, x in (("v", v), ("key_mask", key_mask)) if x is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    check_devices(**given)
    values, size, key_size = k if v is None else v, q.shape, k.shape
    fits = len(size) == len(key_size) == 4 and key_size == values.shape
    if not fits or key_size[2:] != size[2:] or key_size[0] != size[0]:
        raise ValueError(f"q must be [B, H, S, D] and k, v [B, Hk, S, D]; got {_shapes(given)}")
    (batch, heads, tokens, head_dim), kv_heads = size, key_size[1]
    if not heads or not kv_heads:
        raise ValueError(f"q and k must have at least one head; got {_shapes(given)}")
    _require(heads % kv_heads == 0, f"{heads} query heads are not a multiple of {kv_heads} key heads")
    accepted = "must be a multiple of 8 from 16 to 256"
    _require(head_dim in range(16, 257, 8), f"head_dim (the last axis of q) {accepted}; got {head_dim}")
    if not q.dtype == k.dtype == values.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {values.dtype}")
    _dtype("q", q, DTYPES)
    if key_mask is not None:
        hint = "" if key_mask.is_floating_point() else "; of a mask of 0 and 1, pass key_mask.bool()"
        _dtype("key_mask", key_mask, MASK_DTYPES, hint)
        shape = tuple(key_mask.shape)
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2] != tokens:
            raise ValueError(f"key_mask must be [B or 1, H or 1, S] or [B or 1, S]; got {list(shape)}")
    if forward_ad._current_level >= 0:  # tangents do not reach an operator under torch.func.jvp, but are lost there too
        dual = (t for t in given.values() if t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None)
        if eager_transforms.JVP_NESTING or any(True for _ in dual):
            raise NotImplementedError(f"{INFERENCE_ONLY}: forward-mode differentiation (jvp) would lose its tangents")


def _shapes(given: dict[str, Tensor]) -> str:
    return ", ".join(str(list(tensor.shape)) for name, tensor in given.items() if name != "key_mask")


def _check_precision(tables: AttentionTables | ProbeTables, q: Tensor) -> None:
    """That no CPU is asked to multiply integers; which GPUs can, their engine knows."""
    _require(not tables.int8 or q.device.type != "cpu", f"{INT8_NEEDS}; got q on {q.device}")


def check_attention(tables: AttentionTables, q: Tensor, choice: Tensor) -> None:
    """Block tables and choice of ``block_sparse_attention`` for these queries."""
    order, key_order, rows, row_ptr, indices, sampled, weight, selected, free, block_q, block_k, _ = tables
    _check_precision(tables, q)
    batch, heads, tokens, _ = q.shape
    _require(block_q >= 1 and block_k >= 1, f"block_q and block_k must be at least 1; got {block_q} and {block_k}")
    _fit(q, torch.int32, choice=(choice, (batch, heads)), order=(order, (tokens,)), key_order=(key_order, None))
    _fit(q, torch.int32, rows=(rows, (*rows.shape[:1], -(-tokens // block_q))))
    _fit(q, torch.int32, row_ptr=(row_ptr, None), indices=(indices, None))
    row_count = row_ptr.numel() - 1  # of a vector; `len` of a tensor takes a microsecond
    some = row_count > 0 and rows.shape[0] > 0 and indices.numel() > 0
    _require(some, "rows, row_ptr and indices must list at least one row of one key block")
    _fit(q, torch.int32, sampled=(sampled, (row_count, 5)), free=(free, (-(-tokens // block_k),)))
    _fit(q, torch.float32, weight=(weight, (row_count,)))
    _fit(q, torch.int32, selected=(selected, (rows.shape[0] - 1 if selected.numel() else 0,)))
    runs = -(-tokens // block_k) * block_k
    wanted = f"whole blocks of {block_k}, the last of them {tokens} tokens in memory order, filled up"
    whole = key_order.numel() % block_k == 0 and key_order.numel() >= runs
    _require(whole, f"key_order must be {wanted}; got {key_order.numel()} entries")
    if q.device.type != "cpu":
        return
    _permutation("order", order)
    _range("key_order", key_order, tokens)
    gathered, listed, in_memory = key_order.tensor_split([max(len(key_order) - 2 * runs, 0), len(key_order) - runs])
    as_they_lie = torch.equal(in_memory[:tokens], torch.arange(tokens, dtype=torch.int32))
    _require(as_they_lie, f"key_order must end with the tokens 0 to {tokens - 1} as they lie in memory, filled up")
    ordered = len(listed) != runs or torch.equal(listed[:tokens], order)
    _require(ordered, "key_order must have the tokens of order, filled up, before those as they lie in memory")
    _range("rows", rows, len(row_ptr) - 1)
    rising = row_ptr[0] == 0 and row_ptr[-1] == len(indices) and (row_ptr.diff() > 0).all()
    _require(
        bool(rising), f"row_ptr must rise from 0 to {len(indices)}, the length of indices, by at least one block each"
    )
    _range("indices", indices, len(key_order) // block_k)
    rises = indices.diff() > 0
    rises[row_ptr[1:-1].long() - 1] = True  # from one row to the next
    _require(bool(rises.all()), "indices must rise in each row: a row names a key block once at most")
    _sampled_once(gathered.view(-1, block_k), rows, row_ptr, indices, sampled)
    own = pad(selected, (0, len(rows) - len(selected)))[:, None]
    fits = (sampled[rows.long(), 2] == own) | (sampled[rows.long(), 2] == 0)
    _require(bool(fits.all()), "selected must be what sampled says of the rows of each candidate, or more")
    _selected(len(gathered) // block_k, row_ptr, indices, sampled, free, block_k)
    _range("choice", choice, len(rows))


def check_limits(q: Tensor, limits: Tensor) -> None:
    """What the ARM chooses by: any numbers, for all samples of these queries or one by one."""
    _fit(q, torch.float32, limits=(limits, (1 if limits.shape[:1] == (1,) else q.shape[0], 2)))
    if q.device.type == "cpu" and bool(limits.isnan().any()):
        raise ValueError(f"limits must be numbers; got {limits.tolist()}")


def check_probe(tables: ProbeTables, q: Tensor, limits: Tensor) -> None:
    """Block tables and limits of ``arm_probe`` for these queries."""
    *tensors, stride, block_q, block_k, _ = tables
    order, keys, samples, sample_blocks, sample_keep, excess, directions, density, selected, free = tensors
    _check_precision(tables, q)
    tokens, candidates, count = q.shape[2], density.numel(), samples.numel()
    _require(block_q >= 1 and block_k >= 1, f"block_q and block_k must be at least 1; got {block_q} and {block_k}")
    fits = stride >= 1 and block_k % stride == 0
    _require(fits, f"stride must divide block_k, which is {block_k}; got {stride}")
    _fit(q, torch.float32, density=(density, None), directions=(directions, (256, 16)))
    most = MAX_CANDIDATES
    _require(1 <= candidates <= most, f"density must be that of 1 to {most} candidates, got {candidates}")
    check_limits(q, limits)
    _fit(q, torch.int32, order=(order, (tokens,)), samples=(samples, None))
    _fit(q, torch.int32, keys=(keys, (-(-tokens // stride),)))
    _require(count > 0, "samples must name at least one token; got none")
    _fit(q, torch.float32, excess=(excess, (candidates, count)))
    _fit(q, torch.int32, sample_keep=(sample_keep, (count, -(-tokens // block_k))))
    chosen = candidates if selected.numel() else 0
    _fit(q, torch.int32, sample_blocks=(sample_blocks, (count,)), selected=(selected, (chosen,)))
    _fit(q, torch.int32, free=(free, (-(-tokens // block_k),)))
    if q.device.type == "cpu":
        _permutation("order", order)
        _range("keys", keys, tokens)
        _range("samples", samples, tokens)
        _range("sample_blocks", sample_blocks, -(-tokens // block_q))
        _range("free", free, 2)
        _range("selected", selected, int(free.sum()) + 1)


def tensors_of(tables: AttentionTables | ProbeTables) -> dict[str, Tensor]:
    return {name: value for name, value in tables._asdict().items() if isinstance(value, Tensor)}


def _dtype(name: str, tensor: Tensor, accepted: Sequence[torch.dtype], hint: str = "") -> None:
    if tensor.dtype not in accepted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise ValueError(f"{name} must be of dtype {names}; got {tensor.dtype}{hint}")


def _fit(q: Tensor, dtype: torch.dtype, **wanted: tuple[Tensor, tuple[int, ...] | None]) -> None:
    """Device, dtype and sizes (None: one axis of any length) of tensors, each in one piece of memory."""
    device = q.device
    for name, (tensor, shape) in wanted.items():
        fits = tensor.dim() == 1 if shape is None else tensor.shape == shape
        if fits and tensor.dtype is dtype and tensor.device == device and tensor.is_contiguous():
            continue
        check_devices(q, **{name: tensor})
        _dtype(name, tensor, (dtype,))
        if not fits:
            sizes, found = "[any]" if shape is None else list(shape), list(tensor.shape)
            raise ValueError(f"{name} must be {sizes} for these queries and blocks; got {found}")
        if name != "choice":
            raise ValueError(f"{name} must be contiguous; got strides {tensor.stride()}")


def _range(name: str, tensor: Tensor, stop: int) -> None:
    if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < stop:
        raise ValueError(f"{name} must be of 0 to {stop - 1}; it reaches from {tensor.min()} to {tensor.max()}")


def _sampled_once(listed: Tensor, rows: Tensor, row_ptr: Tensor, indices: Tensor, sampled: Tensor) -> None:
    """That the first blocks of rows, as many as they say, are samples, and that no candidate samples a token twice.

    Only the blocks before those of ``order``, of which ``listed`` has the tokens, can be samples.
    """
    begins = row_ptr.long()
    counts = pad((indices < len(listed)).cumsum(0), (1, 0))[begins].diff()
    own = torch.where(sampled[:, 2] == 0, sampled[:, 0], 0).long()  # where heads select blocks, samples are not listed
    agree = torch.equal(own, counts) and bool((sampled[:, 1] >= 1).all())
    _require(agree, "sampled must count each row's blocks before those of order, and their phases, at least one")
    for candidate in rows if len(listed) else ():
        own = torch.zeros(len(sampled), dtype=torch.bool)
        own[candidate.long()] = True
        phases = torch.zeros(len(listed), dtype=torch.int64)  # by the block of the first, 0 elsewhere
        phases[indices[_ranges(begins[:-1][own], counts[own])].long()] = (
            sampled[own, 1].long().repeat_interleave(counts[own])
        )
        first = phases.nonzero().flatten()
        beyond = first[first + phases[first] > len(listed)].tolist()[:1]
        _require(
            not beyond, f"sampled must have no more phases than blocks are listed; got too many for block {beyond}"
        )
        once = not len(first) or int(torch.bincount(listed[_ranges(first, phases[first])].flatten()).max()) == 1
        _require(once, "key_order must name a token once at most in the blocks that a candidate samples")


def _selected(gathered: int, row_ptr: Tensor, indices: Tensor, sampled: Tensor, free: Tensor, block_k: int) -> None:
    """Rows whose heads select key blocks: all free ones are either selected or sampled, and none is listed."""
    _range("free", free, 2)
    _require(bool((sampled >= 0).all()), "sampled must hold no negative numbers")
    selecting = sampled[:, 2] > 0
    if not bool(selecting.any()):
        return
    count, phases, selected, first, _ = sampled[selecting].long().unbind(1)
    whole = bool((phases >= 1).all()) and not bool((block_k % (4 * phases)).any())  # kernels read keys by fours
    _require(whole, f"sampled must have phases that divide block_k / 4 = {block_k // 4}, where heads select blocks")
    all_there = bool((count * phases + selected == int(free.sum())).all())
    _require(all_there, f"sampled must count, selected or sampled, all {int(free.sum())} free blocks of order")
    inside = bool((first + len(free) <= gathered).all())
    _require(inside, f"sampled must name granules among the {gathered} first blocks of key_order")
    listed = indices[_ranges(row_ptr.long()[:-1][selecting], row_ptr.diff().long()[selecting])].long() - gathered
    apart = bool(((listed >= 0) & (listed < len(free))).all()) and not bool(free[listed].any())
    _require(apart, "indices must list, in rows whose heads select blocks, blocks of order that are not free")


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """All of ``start``, ``start + 1``, ... up to ``start + length``, one range after the other."""
    before = lengths.cumsum(0) - lengths
    return (starts - before).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def _permutation(name: str, tensor: Tensor) -> None:
    _range(name, tensor, len(tensor))
    if tensor.numel() and int(torch.bincount(tensor, minlength=len(tensor)).max()) > 1:
        raise ValueError(f"{name} must name each of {len(tensor)} tokens once; some are repeated, others missing")
