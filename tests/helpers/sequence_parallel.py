# SPDX-License-Identifier: Apache-2.0
"""What each of two processes does in tests/runtime/test_sequence_parallel.py: its part of a video, and all of it.

Under sequence parallelism by Ulysses, each rank has a run of the tokens with all heads, and for attention all tokens
with its share of the heads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

import rainfusion_compile

all_gather: Any = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor  # as torch 2.11 calls it
Grid = tuple[int, int, int]
GRIDS = ((5, 10, 12), (5, 12, 10), (4, 10, 12))  # split inside a frame, but for the last one
FIXED = {"min_tokens": 1, "arm": "recall", "recall_target": 0.0, "min_recall": 0.0}  # by no rank's heads but one's own
WIDTH, HEADS, KV_HEADS = 64, 4, 2


class Found(NamedTuple):
    """What one rank saw: grids of sparse attentions, reasons of dense ones, and the largest error of the output.

    `error`: against what one process computes by itself in the same way. `left_out`: how far that is from dense.
    """

    grids: set[Any]
    reasons: set[Any]
    error: float = 0.0
    left_out: float = 0.0


def exchanged(x: Tensor, group: Any) -> Tensor:
    """``[B, n, H, D]``, a part of the tokens, as ``[B, H / P, N, D]``."""
    size = dist.get_world_size(group)
    x = x.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4).contiguous()
    x = funcol.wait_tensor(funcol.all_to_all_single(x, None, None, group))
    return x.flatten(0, 1).permute(1, 2, 0, 3)


def returned(x: Tensor, group: Any) -> Tensor:
    """``[B, H / P, N, D]`` as ``[B, n, H, D]``."""
    size = dist.get_world_size(group)
    x = x.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4).contiguous()
    x = funcol.wait_tensor(funcol.all_to_all_single(x, None, None, group))
    return x.flatten(0, 1).permute(1, 2, 0, 3)


def part(x: Tensor, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def turned(x: Tensor, angles: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)


class Block(nn.Module):
    """One layer of grouped queries; a group of ranks to do it in, or none."""

    def __init__(self, group: Any, kv_heads: int = KV_HEADS) -> None:
        super().__init__()
        self.group = group
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * 16) for heads in (HEADS, kv_heads, kv_heads))
        self.out = nn.Linear(HEADS * 16, WIDTH)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, 16)) for linear in (self.q, self.k, self.v))
        if angles is not None:
            q, k = turned(q, angles), turned(k, angles)
        if self.group is None:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        else:
            q, k, v = (exchanged(part, self.group) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        y = y.transpose(1, 2) if self.group is None else returned(y, self.group)
        return x + self.out(y.flatten(2))


class Video(nn.Module):
    """Latents to tokens and through two blocks, on one process or on all ranks of a group."""

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.group = group
        self.patch = nn.Conv3d(4, WIDTH, 1)
        self.blocks = nn.ModuleList(Block(group) for _ in range(2))
        self.register_buffer("table", torch.outer(torch.arange(16.0), 100 ** (-torch.arange(8) / 8)))

    def forward(self, latents: Tensor) -> Tensor:
        x = self.patch(latents)
        t, h, w = x.shape[2:]
        places = (self.table[:t].view(t, 1, 1, 8), self.table[:h].view(1, h, 1, 8), self.table[:w].view(1, 1, w, 8))
        angles = torch.cat([one.expand(t, h, w, 8)[..., :n] for one, n in zip(places, (4, 2, 2), strict=True)], -1)
        x, angles = x.flatten(2).transpose(1, 2), angles.reshape(1, t * h * w, 1, 8)
        if self.group is not None:
            x, angles = part(x, 1), part(angles, 1)
        for block in self.blocks:
            x = block(x, angles)
        return x if self.group is None else gathered(x, self.group)


def gathered(x: Tensor, group: Any) -> Tensor:
    return funcol.wait_tensor(all_gather(x.contiguous(), 1, group))


class Order(nn.Module):
    """One attention over tokens that are split and put together again in some way."""

    def __init__(self, split: Callable[[Tensor], Tensor], put: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.split, self.put = split, put or (lambda x: exchanged(x, dist.group.WORLD))
        self.patch, self.qkv = nn.Conv3d(4, 32, 1), nn.Linear(32, 96)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.split(self.patch(latents).flatten(2).transpose(1, 2))
        q, k, v = map(self.put, self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2))
        return F.scaled_dot_product_attention(q, k, v)


class Rows(Order):
    """Each rank has some rows of all frames."""

    def forward(self, latents: Tensor) -> Tensor:
        return super().forward(part(latents, 3))


def reversed_parts(x: Tensor) -> Tensor:
    return x.chunk(2, 1)[1 - dist.get_rank()]


def uneven(x: Tensor) -> Tensor:
    """Runs of two lengths, as a list of sizes tells."""
    rank, count = dist.get_rank(), x.shape[1] * 2
    sizes = [count // 2 - 1, count // 2 + 1]
    x = x.unflatten(2, (2, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
    x = funcol.wait_tensor(funcol.all_to_all_single(x, [sizes[rank]] * 2, sizes, dist.group.WORLD))
    return x.permute(1, 2, 0, 3)


def heads_only(x: Tensor) -> Tensor:
    """All ranks have all tokens, and hand each other heads: each has the same ones twice."""
    x = x.unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4).contiguous()
    return (
        funcol.wait_tensor(funcol.all_to_all_single(x, None, None, dist.group.WORLD))
        .permute(1, 0, 2, 3, 4)
        .flatten(1, 2)
    )


def inside_out(x: Tensor) -> Tensor:
    """The parts' first tokens, then their second ones."""
    return exchanged(x, dist.group.WORLD).unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3)


ORDERS: dict[str, Callable[[], nn.Module]] = {
    "narrow": lambda: Order(lambda x: x.narrow(1, dist.get_rank() * (x.shape[1] // 2), x.shape[1] // 2)),
    "tensor_split": lambda: Order(lambda x: x.tensor_split(2, 1)[dist.get_rank()]),
    "split": lambda: Order(lambda x: x.split(x.shape[1] // 2, 1)[dist.get_rank()]),
    "parts in the other order": lambda: Order(reversed_parts),
    "every other token": lambda: Order(lambda x: x[:, dist.get_rank() :: 2]),
    "parts of rows": lambda: Rows(lambda x: x),
    "parts inside out": lambda: Order(lambda x: part(x, 1), inside_out),
    "quarters": lambda: Order(lambda x: x.chunk(4, 1)[dist.get_rank()]),
    "uneven": lambda: Order(lambda x: part(x, 1), uneven),
    "heads only": lambda: Order(lambda x: x, heads_only),
    "all tokens twice": lambda: Order(lambda x: x),
    "two videos": lambda: Order(lambda x: part(torch.cat([x, x.flip(0)], 1), 1)),
    "the first part on both": lambda: Order(lambda x: x.chunk(2, 1)[0]),
}


TRUE = ("narrow", "tensor_split", "split", "heads only", "two videos")
"""Of which the graph shows the grid."""


class Ring(Video):
    """Queries of one's own tokens meet each rank's keys in turn."""

    def forward(self, latents: Tensor) -> Tensor:
        x = part(self.patch(latents).flatten(2).transpose(1, 2), 1)
        block = self.blocks[0]
        q, k, v = (linear(x).unflatten(-1, (-1, 16)).transpose(1, 2) for linear in (block.q, block.k, block.v))
        both = funcol.wait_tensor(all_gather(torch.cat([k.flatten(), v.flatten()]), 0, self.group))
        other = both.chunk(2)[1 - dist.get_rank()]
        k, v = other[: k.numel()].view_as(k), other[k.numel() :].view_as(v)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def latents_of(grid: Grid) -> Tensor:
    return torch.randn(2, 4, *grid, generator=torch.Generator().manual_seed(sum(grid)))


def seen(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, set[Any], set[Any]]:
    """The output, the grids of sparse attentions, and the reasons of dense ones over as many tokens as a part has."""
    with torch.no_grad(), rainfusion_compile.observe() as report:
        out = function(*args, **kwargs)
    entries = [entry for entry in report.to_dict()["attentions"] if "9 keys" not in str(entry["reason"])]
    grids = {as_tuples(entry["grid"]) for entry in entries if entry["status"] == "sparse"}
    return out, grids, {entry["reason"] for entry in entries if entry["status"] == "dense"}


def as_tuples(grid: Any) -> Any:
    """A grid, or those of several videos, as a report has them in lists."""
    return tuple(map(as_tuples, grid)) if isinstance(grid, list) else grid


def compiled(model: nn.Module, sparsity: float, dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(
        model, backend="rainfusion", dynamic=dynamic, options={**FIXED, "sparsity": sparsity, **options}
    )


def of_one_process(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What rank 0 computes without the others, told to all of them: each would compute the same."""
    told = [compute(*args, **kwargs) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told)
    return told[0]


def error(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def by_hand(sparsity: float, grids: Sequence[Grid], dynamic: bool | None = None) -> list[Found]:
    """Of several grids by one function, against one process that does the same."""

    def calls(group: Any) -> list[tuple[Any, set[Any], set[Any]]]:
        function = compiled(Video(group), sparsity, dynamic)
        return [seen(function, latents_of(grid)) for grid in grids]

    shared, whole = calls(dist.group.WORLD), of_one_process(calls, None)
    with torch.no_grad():
        dense = [Video()(latents_of(grid)) for grid in grids]
    return [
        Found(found, reasons, error(out, alone), error(alone, plain))
        for (out, found, reasons), (alone, *_), plain in zip(shared, whole, dense, strict=True)
    ]


def outside(how: str) -> list[Found]:
    """Parts that are made by hand, of which no graph shows what they are of."""
    found = []
    torch.manual_seed(0)
    block = Block(None)
    shared = Block(dist.group.WORLD)
    shared.load_state_dict(block.state_dict())
    for grid in GRIDS[1:] if how == "context" else GRIDS[:1]:
        x = torch.randn(2, grid[0] * grid[1] * grid[2], WIDTH, generator=torch.Generator().manual_seed(1))
        whole, *_ = of_one_process(seen, compiled(block, 0.5, grid=grid), x)
        told: Any = rainfusion_compile.video_layout(grid) if how == "context" else contextlib.nullcontext()
        with told, torch.no_grad():
            function = compiled(shared, 0.5, **({"grid": grid} if how == "option" else {}))
            out, grids, reasons = seen(function, part(x, 1).contiguous())
            found.append(Found(grids, reasons, error(out, part(whole, 1)), error(whole, block(x))))
    return found


def orders() -> dict[str, list[Found]]:
    """Split inside a frame, and between two; with the video's grid as an option, and, where it can be seen, without.

    Each is of another size, for what ranks once said of a shape is not forgotten.
    """
    found: dict[str, list[Found]] = {}
    for number, (name, build) in enumerate(ORDERS.items()):
        found[name] = []
        for frames, given in ((5, name not in TRUE), (4, True)):
            grid = frames, 4, 6 + 2 * number
            layout = (grid, grid) if name == "two videos" else grid
            function = compiled(build(), 0.5, **({"grid": layout} if given else {}))
            _, grids, reasons = seen(function, latents_of(grid))
            found[name].append(Found({one == layout for one in grids}, reasons))
    return found


def wan(layers: int) -> Any:
    from diffusers import WanTransformer3DModel

    from benchmarks.zoo.wan import WAN

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": layers}
    return WanTransformer3DModel(**WAN | sizes).eval()


def split(model: Any) -> None:
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: 1  # type: ignore[method-assign]  # it counts no CPUs, and divides by them
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))


def diffusers(sparsity: float, grid: Grid) -> Found:
    """The model's own hooks and attention, as `enable_parallelism` sets them."""
    from benchmarks.zoo.wan import wan_inputs

    model, inputs = wan(1), wan_inputs(grid, 1) | {"return_dict": False}
    with torch.no_grad():
        dense = model(**inputs)[0]
    (whole,), *_ = of_one_process(seen, compiled(model, sparsity), **inputs)
    torch._dynamo.reset()
    split(model)
    (out,), sparse, reasons = seen(compiled(model, sparsity), **inputs)
    return Found(sparse, reasons, error(out, whole), error(whole, dense))


def compiled_first(grid: Grid) -> Found:
    """The same, of two layers, which are graphs of their own: Dynamo breaks where diffusers logs a warning, once."""
    from benchmarks.zoo.wan import wan_inputs

    model = wan(2)
    split(model)
    return Found(*seen(compiled(model, 0.5), **wan_inputs(grid, 1) | {"return_dict": False})[1:])


@contextlib.contextmanager
def ranks(rank: int, size: int, file: str) -> Iterator[None]:
    """In a group of this size; graphs run as they are, for what Inductor does to them is not in question."""
    lookup = torch._dynamo.lookup_backend
    torch._dynamo.lookup_backend = lambda name: (
        (lambda gm, inputs, **config: gm.forward) if name == "inductor" else lookup(name)
    )
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # as in conftest.py
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def work(rank: int, folder: str) -> None:
    with ranks(rank, 2, os.path.join(folder, "meeting")):
        ring = compiled(Ring(dist.group.WORLD), 0.5)
        found: dict[Any, list[Found]] = {
            "diffusers, compiled first": [compiled_first(GRIDS[2])],
            "by hand": by_hand(0.5, GRIDS[::2]),
            "by hand, any size": by_hand(0.5, GRIDS[:2], dynamic=True),
            "by hand, everything": by_hand(0.0, GRIDS[:1]),
            **{f"outside, {how}": outside(how) for how in ("option", "context", "nothing")},
            **orders(),
            "ring": [Found(*seen(ring, latents_of(GRIDS[0]))[1:])],
            "diffusers": [diffusers(0.5, GRIDS[0])],
            "diffusers, everything": [diffusers(0.0, GRIDS[0])],
        }
        torch.save(found, os.path.join(folder, str(rank)))
