# SPDX-License-Identifier: Apache-2.0
"""What is known of a tensor is believed while it holds what it held, whoever writes into it in whatever way."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ranks
import torch
import torch.nn.functional as F
from compared import carried_by, shown_by
from hypothesis import given
from hypothesis import strategies as st
from processes import run_ranks
from torch import Tensor, nn

import rainfusion_compile
from rainfusion_compile.passes.provenance.known_tokens import CarriedDim, FromInput, Run
from rainfusion_compile.runtime import carry, contents, outside_knowledge
from rainfusion_compile.runtime.carry import attach
from rainfusion_compile.runtime.contents import Agreement, fingerprint
from rainfusion_compile.runtime.outside_knowledge import Listener, PositionInputs

GRIDS = ((4, 6, 10), (4, 10, 6))  # as many tokens


@torch.library.custom_op("rainfusion_tests::lies", mutates_args=())
def lies(tensor: Tensor, new: Tensor) -> Tensor:
    """Says that it writes into nothing."""
    tensor.copy_(new)
    return new.clone()


def preserved(tensor: Tensor, new: Tensor) -> None:
    with torch.autograd._unsafe_preserve_version_counter(tensor):
        tensor.copy_(new)


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy_": lambda tensor, new: tensor.copy_(new),
    "data": lambda tensor, new: tensor.data.copy_(new),
    "other data": lambda tensor, new: setattr(tensor, "data", new.clone()),
    "detach": lambda tensor, new: tensor.detach().copy_(new),
    "numpy": lambda tensor, new: tensor.numpy().__setitem__(..., new.numpy()),
    "storage": lambda tensor, new: tensor.untyped_storage().copy_(new.contiguous().untyped_storage()),
    "set_": lambda tensor, new: tensor.set_(new.clone()),
    "preserved": preserved,
    "dlpack": lambda tensor, new: torch.from_dlpack(tensor.__dlpack__()).copy_(new),
    "pointer": lambda tensor, new: ctypes.memmove(tensor.data_ptr(), new.contiguous().data_ptr(), new.nbytes),
    "operator that lies": lies,
}
writes = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


def table(grid: tuple[int, int, int]) -> Tensor:
    """Angles, ``[tokens, 12]``."""
    places = torch.stack(torch.meshgrid(*(torch.arange(float(size)) for size in grid), indexing="ij"), -1)
    return (places.flatten(0, 2)[:, :, None] * 1e4 ** -(torch.arange(4) / 4)).flatten(1)


def grid_of(carried: Any) -> Any:
    return next((dim.grid for dim in carried[0] or () if dim), None)


def tokens(dim: int, dims: int, identity: Any = 0) -> Any:
    return tuple(CarriedDim((2, 2, 3), (0, 0), identity) if place == dim else None for place in range(dims))


def noted(tensor: Tensor, dim: int = 1) -> Tensor:
    """The tensor, noted to have 12 tokens along a dimension."""
    attach([tensor], (tokens(dim, tensor.dim()),), ())
    return tensor


# --- contents --------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.int16, torch.bool)


@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from(["dense", "one-hot", "signs"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_fingerprints_see_every_move(
    dtype: torch.dtype, shape: list[int], dim: int, kind: str, strided: bool, random: Any
):
    dim %= len(shape)
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    tensor = torch.randn(shape, generator=generator)
    if kind == "one-hot":
        tensor = (tensor == tensor.amax(-1, keepdim=True)).float()
    elif kind == "signs":
        tensor = tensor.sign()
    tensor = tensor.to(dtype)
    if strided:
        tensor = tensor.mT if tensor.dim() > 1 else tensor.repeat_interleave(2)[::2]
    seen = fingerprint(tensor, dim)
    assert seen.shape == (tensor.shape[dim],)
    assert seen.dtype == torch.int64
    assert torch.equal(fingerprint(tensor.clone(), dim), seen)
    for axis in range(tensor.dim()):
        order = list(range(tensor.shape[axis]))
        random.shuffle(order)
        moved = tensor.index_select(axis, torch.tensor(order))
        alike = bool((moved.movedim(dim, 0) == tensor.movedim(dim, 0)).all())
        assert torch.equal(fingerprint(moved, dim), seen) == alike


@pytest.mark.parametrize("shape", [(0,), (5, 0), (0, 5), (3, 0, 2), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprints_of_little(shape: tuple[int, ...], dtype: torch.dtype):
    tensor = torch.zeros(shape, dtype=dtype)
    for dim, size in enumerate(shape):
        assert fingerprint(tensor, dim).shape == (size,)


def test_fingerprints_of_odd_tensors(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(7, 6)
    whole = fingerprint(tensor, 0)
    monkeypatch.setattr(contents, "_AT_ONCE", 50)  # two tokens at once
    assert torch.equal(fingerprint(tensor, 0), whole)
    assert fingerprint(torch.randn(3, 1).expand(3, 5), 1).unique().numel() == 1
    assert fingerprint(torch.randn(33).bfloat16()[1:].view(4, 8), 0).shape == (4,)
    assert fingerprint(torch.randn(2).bfloat16()[::2], 0).shape == (1,)
    conjugate = torch.randn(3, 4, dtype=torch.complex64).conj()
    assert torch.equal(fingerprint(conjugate, 0), fingerprint(conjugate.resolve_conj(), 0))
    assert fingerprint(nn.Parameter(tensor), 0).requires_grad is False


def test_tensors_agree_bit_by_bit():
    nan = torch.tensor([[float("nan"), 1.0]])
    zero = torch.zeros(2, 2)
    pairs = {
        "nan": (nan, nan.clone()),
        "signs of zero": (zero, -zero),
        "strides": (torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).T.contiguous().T),
        "shapes": (zero, zero[:1]),
        "dtypes": (zero, zero.int()),
        "devices": (zero, zero.to("meta")),
        "complex": (torch.polar(zero + 1, zero + 2).conj(), torch.polar(zero + 1, zero + 2).conj().clone()),
        "last bit": (zero + 1, torch.nextafter(zero + 1, zero)),
        "nothing": (zero[:0], zero[:0]),
        "words": (torch.ones(4, 2), torch.ones(4, 2)),
        "last bit of words": (zero + 1, torch.stack([zero[0] + 1, torch.nextafter(zero[1] + 1, zero[1])])),
        "across words": (torch.ones(3, 3)[:, 1:], torch.ones(3, 2)),
        "columns": (torch.ones(4, 4)[:, ::2], torch.ones(4, 2)),
        "negative": (torch.ones(4, dtype=torch.complex64).conj().imag, -torch.zeros(4)),
        "complex in pairs": (torch.ones(2, 2, dtype=torch.complex128).T, torch.ones(2, 2, dtype=torch.complex128)),
        "gradients": (torch.ones(3, 3, requires_grad=True), torch.ones(3, 3)),
    }
    differ = {"signs of zero", "shapes", "dtypes", "devices", "last bit", "last bit of words"}
    assert Agreement(pairs).wait() == pairs.keys() - differ
    assert Agreement({}).wait() == set()


# --- tables and notes ------------------------------------------------------------------------------------------------


@writes
def test_a_table_says_what_it_holds(write: Callable[[Tensor, Tensor], object]):
    inputs, tensor = PositionInputs(min_tokens=4), table(GRIDS[0])
    for grid in (GRIDS[1], GRIDS[0], GRIDS[1]):
        shown_by([tensor], inputs)
        write(tensor, table(grid))
        assert grid_of(shown_by([tensor], inputs)) == grid
    write(tensor, tensor.flip(0).clone())
    assert shown_by([tensor], inputs) == (None,)


@writes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_note_is_of_what_the_tensor_held(write: Callable[[Tensor, Tensor], object], dtype: torch.dtype):
    for change in (lambda x: x.flip(1), lambda x: x.roll(1, 1), lambda x: x.flip(0), lambda x: x * 2):
        tensor = noted(torch.randn(2, 12, 3).to(dtype))
        assert grid_of(carried_by([tensor])) == (2, 2, 3)
        original = tensor.clone()
        write(tensor, change(tensor).contiguous())
        assert carried_by([tensor]) == (None,)
        write(tensor, original)  # what was found untrue once is forgotten
        assert carried_by([tensor]) == (None,)


def test_a_tensor_with_other_tokens_is_not_the_same_tokens():
    one, other = noted(torch.randn(1, 12, 3)), noted(torch.randn(1, 12, 3))
    attach([third := torch.randn(1, 12, 3)], (tokens(1, 3, FromInput(0, 1)),), [one])
    assert [dims[1].identity for dims in carried_by([one, other, third])] == [0, 1, 0]
    third.data.copy_(other)
    assert carried_by([one, third])[1] is None
    one.data.copy_(other)
    assert carried_by([one]) == (None,)
    attach([fourth := torch.randn(1, 12, 3)], (tokens(1, 3, FromInput(0, 1)),), [one])
    assert [dims[1].identity for dims in carried_by([other, fourth])] == [0, 1]


def test_notes_do_not_go_into_copies_and_files(tmp_path):
    tensor = noted(torch.randn(2, 12, 3))
    torch.save({"x": tensor}, tmp_path / "file")
    loaded = torch.load(tmp_path / "file")["x"]
    torch.testing.assert_close(loaded, tensor)
    assert carried_by([loaded, copy.deepcopy(tensor), tensor.clone()]) == (None,) * 3
    assert grid_of(carried_by([tensor])) == (2, 2, 3)


def test_notes_of_views_do_not_go_into_copies_and_files_of_their_memory(tmp_path):
    memory = torch.randn(2, 12, 6)
    noted(memory[..., :3])
    torch.save({"x": memory}, tmp_path / "file")
    for copied in (torch.load(tmp_path / "file")["x"], copy.deepcopy(memory), memory.clone()):
        assert carried_by([copied[..., :3]]) == (None,)
    assert grid_of(carried_by([memory[..., :3]])) == (2, 2, 3)


def test_views_carry_what_all_of_their_memory_does():
    tensor = noted(torch.randn(2, 12, 3))
    tokens_at = {
        "itself": (tensor[:], 1),
        "more dims": (tensor.view(1, 2, 12, 3, 1), 2),
        "fewer dims": (tensor.flatten(), None),
        "a sample": (tensor[0], None),
        "fewer tokens": (tensor[:, 4:10], 1),
        "every other token": (tensor[:, ::2], None),
        "fewer channels": (tensor[..., :2], None),
        "turned": (tensor.transpose(1, 2), None),
        "samples turned": (tensor.transpose(0, 1), None),
        "bits": (tensor.view(torch.int32), None),
    }
    for name, (view, place) in tokens_at.items():
        found = carried_by([view])[0]
        assert [number for number, dim in enumerate(found or ()) if dim] == ([] if place is None else [place]), name
        run = found and place is not None and found[place].run
        assert (run or None) == (Run(4, 10, 12) if name == "fewer tokens" else None)
    view = tensor[:]
    tensor[0, 3] = 7.0
    assert carried_by([view]) == (None,)


def test_subclasses_and_other_objects_carry_nothing():
    class Mine(Tensor):
        pass

    mine = torch.randn(2, 12, 3).as_subclass(Mine)
    attach([mine, 3, None], (tokens(1, 3),) * 3, ())
    assert carried_by([mine, 3, None, "text"]) == (None,) * 4


def test_nothing_is_believed_while_a_cuda_graph_is_recorded(monkeypatch: pytest.MonkeyPatch):
    tensor, places, inputs = noted(torch.randn(2, 12, 3)), table(GRIDS[0]), PositionInputs(min_tokens=4)
    shown_by([places], inputs)
    for module in (carry, outside_knowledge):
        monkeypatch.setattr(module, "capturing", lambda: True)
    assert carried_by([tensor]) == (None,)
    assert shown_by([places], inputs) == (None,)
    assert carried_by([noted(torch.randn(2, 12, 3))]) == (None,)
    monkeypatch.undo()
    assert grid_of(carried_by([tensor])) == (2, 2, 3)
    assert grid_of(shown_by([places], inputs)) == GRIDS[0]


def test_a_call_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch):
    waits = []
    plain = contents._on_host
    monkeypatch.setattr(contents, "_on_host", lambda flags: waits.append(flags) or plain(flags))
    listener = Listener(rainfusion_compile.Options(min_tokens=1))
    args = [noted(torch.randn(2, 12, 3)), table(GRIDS[0]), table(GRIDS[0]), noted(torch.randn(12, 3), 0)]
    first = listener.listen(args).wait()
    assert all(first.carried)
    waits.clear()
    assert listener.listen(args).wait() == first
    assert len(waits) == 1
    waits.clear()
    listener.listen([torch.randn(2, 12, 3)] * 4).wait()
    assert len(waits) <= 1
    waits.clear()
    Listener(rainfusion_compile.Options(min_tokens=1)).listen([torch.randn(2, 12, 3), 5]).wait()
    assert not waits


@pytest.mark.timeout(300)
def test_collectives(tmp_path):
    tables = tuple(map(table, GRIDS))
    meeting = str(tmp_path / "meeting")
    run_ranks(ranks.in_place_of, lambda rank: (GRIDS, tables, rank, meeting), seconds=240)


# --- compiled models -------------------------------------------------------------------------------------------------


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs that are run as they are, for what Inductor does to them is not in question."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda gm, examples, **settings: gm)
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 144)

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 24)).permute(2, 0, 3, 1, 4)
        if cos is not None:
            q, k = (z * cos + torch.cat([-z[..., 12:], z[..., :12]], -1) * sin for z in (q, k))
        return F.scaled_dot_product_attention(q, k, v)


def rotary(grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    angles = table(grid).repeat(1, 2)
    return angles.cos(), angles.sin()


def grids(model: Callable[..., Tensor], *args: Tensor) -> set[Any]:
    """The grids that attention was sparse over; None where it was dense."""
    with torch.no_grad(), rainfusion_compile.observe() as report:
        model(*args)
    entries = report.to_dict()["attentions"]
    assert entries
    return {tuple(entry["grid"]) if entry["status"] == "sparse" else None for entry in entries}


@writes
def test_a_block_whose_tables_are_written_into(write: Callable[[Tensor, Tensor], object], uncompiled: None):
    block = torch.compile(Block(), backend="rainfusion", options={"min_tokens": 1})
    x, tables = torch.randn(1, 240, 48), rotary(GRIDS[0])
    for grid in (*GRIDS, *GRIDS):
        for tensor, new in zip(tables, rotary(grid), strict=True):
            write(tensor, new)
        assert grids(block, x, *tables) == {grid}
    write(tables[1], torch.rand(240, 24))
    write(tables[0], torch.rand(240, 24))
    assert grids(block, x, *tables) == {None}


@writes
@pytest.mark.parametrize("dynamic", [False, True])
def test_tokens_that_are_written_into_between_two_graphs(
    write: Callable[[Tensor, Tensor], object], dynamic: bool, uncompiled: None
):
    patch = nn.Conv3d(4, 48, 1)
    settings = {"backend": "rainfusion", "dynamic": dynamic, "options": {"min_tokens": 1}}
    first = torch.compile(lambda x: patch(x).flatten(2).transpose(1, 2).contiguous(), **settings)
    second = torch.compile(Block(), **settings)
    for change in (None, lambda x: x.flip(1), None, lambda x: x.unflatten(1, GRIDS[0]).transpose(2, 3).flatten(1, 3)):
        with torch.no_grad():
            x = first(torch.randn(1, 4, *GRIDS[0]))
            if change is not None:
                write(x, change(x).contiguous())
        assert grids(second, x) == {GRIDS[0] if change is None else None}
