# SPDX-License-Identifier: Apache-2.0
"""Slices that operators pair, spread, pad or copy elsewhere: never over a wrong grid, and never an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from orders.video import D, H, Model, N, T, conv, flat, look, not_wrong, shifted, spatial
from torch import Tensor

Tokens = Callable[[Model, Tensor], Any]
HALVES = torch.tensor([2, 3]), torch.tensor([0, 1])


def one(y: Tensor, i: int, axis: int = 1) -> Tensor:
    """1 at index `i` of an axis of a video, else 0."""
    return torch.eye(y.shape[axis])[i].view([-1 if dim == axis else 1 for dim in range(5)]).to(y)


def named(m: Model, z: Tensor) -> Tensor:
    """Tokens that a table of positions names."""
    return flat(z + m.places)


def backwards(y: Tensor, of: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Frame i of what is made of frame T - 1 - i, all added up."""
    return sum((one(y, i) * of(y, T - 1 - i) for i in range(T)), torch.zeros_like(y))


def by_log_softmax(y: Tensor, j: int) -> Tensor:
    hidden = y - 99 * (1 - one(y, j))
    return hidden - F.log_softmax(hidden, 1)


def by_running_sum(y: Tensor, j: int) -> Tensor:
    found = one(y, j) * y
    return found.cumsum(1) if j < T // 2 else found.flip(1).cumsum(1).flip(1)


def by_norm(y: Tensor, j: int) -> Tensor:
    found = (one(y, j) * y).movedim(1, -1)
    return T * (found - 1000 * F.layer_norm(found, (T,), eps=1e6)).movedim(-1, 1)


def by_logarithm(y: Tensor, j: int) -> Tensor:
    hidden = y.double() - 99 * (1 - one(y, j))
    return (hidden - hidden.softmax(1).log()).to(y)


def by_group_norm(y: Tensor, j: int) -> Tensor:
    found = (one(y, j) * y).permute(0, 2, 3, 4, 1).flatten(0, 2)
    spread = T * (found - 1000 * F.group_norm(found, D, eps=1e6))
    return spread.unflatten(0, (y.shape[0], *y.shape[2:4])).movedim(-1, 1)


def by_batch_norm(y: Tensor, j: int) -> Tensor:
    found = (one(y, j) * y).movedim(1, -1).flatten(0, 3)[None]
    spread = T * (found - 1000 * F.batch_norm(found, None, None, training=True, eps=1e6))
    return spread[0].unflatten(0, (y.shape[0], *y.shape[2:])).movedim(-1, 1)


def swapped(pair: Callable[[Tensor, Tensor], Tensor]) -> Tokens:
    """Halves of the frames, each by an operator that pairs it with the other one."""
    return lambda m, y: flat(torch.cat([pair(y[:, :2], y[:, 2:]), pair(y[:, 2:], y[:, :2])], 1))


def copied(copy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tokens:
    """Halves of the frames, each copied to where the other one was."""

    def tokens(m: Model, y: Tensor) -> Tensor:
        z = copy(torch.zeros_like(y), HALVES[0], y[:, :2])
        return named(m, copy(z, HALVES[1], y[:, 2:]))

    return tokens


def everywhere(index: Tensor, source: Tensor) -> Tensor:
    return index.view(1, -1, 1, 1, 1).expand(source.shape)


def assigned(z: Tensor, index: Tensor, source: Tensor) -> Tensor:
    z = z.clone()
    z[:, index] = source
    return z


def placed(then: Callable[[Tensor], Tensor], last: Callable[[Tensor], Tensor]) -> Tokens:
    """Frames that numbers put in places, and each changed before they are added up."""
    return lambda m, y: named(
        m, last(sum((then(one(y, i) * y[:, 3 - i : 4 - i]) for i in range(T)), torch.zeros_like(then(y))))
    )


def pairs(y: Tensor) -> Tensor:
    return y.unflatten(1, (2, 2))


def only(y: Tensor, i: int) -> Tensor:
    """Frame i, and far less everywhere else."""
    return one(y, i) * y - 99 * (1 - one(y, i))


def masks_of_data(m: Model, y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    for i in range(T):
        z = torch.where(one(y, i) + 0 * y > 0.5, y[:, T - 1 - i : T - i], z)
    return flat(z)


def picked_into_slots(m: Model, y: Tensor) -> Tensor:
    z = torch.empty_like(y)
    for i in range(T):
        z[:, i] = 0 * y[:, i] + (one(y, T - 1 - i) * y).sum(1)
    return flat(z)


def neighbour(y: Tensor) -> Tensor:
    """The other frame of each pair."""
    return (pairs(y).sum(2, keepdim=True) - pairs(y)).flatten(1, 2)


def spread(y: Tensor, i: int) -> Tensor:
    return spatial(one(y, i) * y, lambda z: 3 * F.avg_pool3d(z, (3, 1, 1), 1, (1, 0, 0)))


EVEN = (torch.arange(T) % 2 == 0).view(T, 1, 1, 1)
CASES: dict[str, Tokens] = {
    "lerp of halves": swapped(lambda a, b: torch.lerp(a, b, 1.0)),
    "sum of halves": swapped(lambda a, b: 0 * a + b),
    "halves beside each other": swapped(lambda a, b: torch.cat([a, b], -1)[..., D:]),
    "lerp of columns": lambda m, y: flat(
        torch.cat([y[:, :, :, 2:4].lerp(y[:, :, :, :2], 1.0), y[:, :, :, :2].lerp(y[:, :, :, 2:4], 1.0)], 3)
    ),
    "queries and keys of two halves": lambda m, y: flat(torch.cat([y[:, :2], y[:, 2:]], -1)).split(D, -1),
    "log_softmax": lambda m, y: flat(backwards(y, by_log_softmax)),
    "norm": lambda m, y: flat(backwards(y, by_norm)),
    "softmax and its logarithm": lambda m, y: flat(backwards(y, by_logarithm)),
    "group norm": lambda m, y: flat(backwards(y, by_group_norm)),
    "batch norm": lambda m, y: flat(backwards(y, by_batch_norm)),
    "placed, then split": placed(lambda z: z.unflatten(1, (2, 2)), lambda z: z.flatten(1, 2)),
    "placed, then twice": placed(lambda z: torch.cat([z, z], 1), lambda z: z[:, :T]),
    "placed, then convolved": placed(lambda z: conv(z, padding=(1, 0, 0)), lambda z: z[:, 1 : T + 1]),
    "halves turned, resampled": lambda m, y: flat(
        spatial(torch.cat([y[:, 2:], y[:, :2]], 1), lambda z: F.interpolate(z, scale_factor=(2, 1, 1)))
    ),
    "reflected": lambda m, y: flat(spatial(y, lambda z: F.pad(z, (0, 0, 0, 2, 0, 0), mode="reflect"))),
    "reflected and cut": lambda m, y: flat(spatial(y, lambda z: F.pad(z, (0, 0, 0, 0, 3, 0), mode="reflect"))[:, :T]),
    "embedding": lambda m, y: named(
        m,
        F.embedding(torch.arange(T).flip(0) + 0, y.transpose(0, 1).flatten(1))
        .view(T, -1, *y.shape[2:])
        .transpose(0, 1),
    ),
    "glu": lambda m, y: named(m, F.glu(torch.cat([y.flip(1), 0 * y + 99], 1), 1)),
    "other numbers of the same bytes": lambda m, y: named(
        m, flat(y).flip(1).mT.contiguous().view(torch.int16).view(y.dtype).mT.unflatten(1, (T, H, -1))
    ),
    "index_copy": copied(lambda z, index, half: z.index_copy(1, index, half)),
    "index_add": copied(lambda z, index, half: z.index_add(1, index, half)),
    "scatter": copied(lambda z, index, half: z.scatter(1, everywhere(index, half), half)),
    "assignment": copied(assigned),
    "put": lambda m, y: named(
        m, torch.zeros_like(y).put(torch.arange(y.numel()).view(-1, T, N // T * D).flip(1).reshape(-1), y.reshape(-1))
    ),
    "a shift by a convolution, round and round": lambda m, y: flat(shifted(y, 0, "circular")),
    "single frames stacked": lambda m, y: flat(
        torch.cat([torch.stack([y[:, :1], y[:, 1:2]])[1], torch.stack([y[:, 1:2], y[:, :1]])[1], y[:, 2:]], 1)
    ),
    "a matrix made of positions": lambda m, y: named(
        m, torch.einsum("st,bthwd->bshwd", (torch.arange(T)[:, None] + torch.arange(T) == T - 1).to(y), y)
    ),
    "a parameter for a matrix": lambda m, y: named(
        m, torch.einsum("xst,bthwd->xbshwd", m.places[:, :, 0, 0, :T], y)[0]
    ),
    "running sums": lambda m, y: flat(backwards(y, by_running_sum)),
    "shifts by convolutions, chosen": lambda m, y: flat(EVEN * shifted(y, 2) + ~EVEN * shifted(y, 0)),
    "spread by pooling": lambda m, y: flat(
        one(y, 0) * spread(y, 1) + one(y, 1) * spread(y, 0) + (one(y, 2) + one(y, 3)) * y
    ),
    "sums less one": lambda m, y: flat(neighbour(y)),
    "a picked frame in another's name": lambda m, y: flat(
        torch.stack([0 * y[:, i] + (one(y, 3 - i) * y).sum(1) for i in range(T)], 1)
    ),
    "digits exchanged, paired with the axis": lambda m, y: named(
        m, torch.lerp(y, y.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2), 1.0)
    ),
    "queries and keys of two samples": lambda m, y: (
        flat(torch.lerp(y[:1], y[1:], 0.0)),
        flat(torch.lerp(y[:1], y[1:], 1.0)),
    ),
    "twice a mean less one": lambda m, y: flat((2 * pairs(y).mean(2, keepdim=True) - pairs(y)).flatten(1, 2)),
    "both ends less one": lambda m, y: flat(
        (pairs(y).amax(2, keepdim=True) + pairs(y).amin(2, keepdim=True) - pairs(y)).flatten(1, 2)
    ),
    "shifts by convolutions, by where": lambda m, y: flat(torch.where(EVEN, shifted(y, 2), shifted(y, 0))),
    "shifts by convolutions, by lerp": lambda m, y: flat(torch.lerp(shifted(y, 0), shifted(y, 2), EVEN.to(y))),
    "spread by a convolution": lambda m, y: flat(
        backwards(
            y,
            lambda y, j: spatial(
                one(y, j) * y,
                lambda z: F.conv3d(z, torch.ones(D, 1, 2 * T - 1, 1, 1).to(y), padding=(T - 1, 0, 0), groups=D),
            ),
        )
    ),
    "spread by the largest": lambda m, y: flat(
        backwards(y, lambda y, j: spatial(only(y, j), lambda z: F.max_pool3d(z, (2 * T - 1, 1, 1), 1, (T - 1, 0, 0))))
    ),
    "running maxima": lambda m, y: flat(
        backwards(y, lambda y, j: only(y, j).cummax(1)[0] if j < T // 2 else only(y, j).flip(1).cummax(1)[0].flip(1))
    ),
    "picked frames in others' places": picked_into_slots,
    "picked frames side by side": lambda m, y: flat(
        torch.cat([0 * y[:, i : i + 1] + (one(y, T - 1 - i) * y).sum(1, keepdim=True) for i in range(T)], 1)
    ),
    "the largest in another's name": lambda m, y: flat(
        torch.stack([0 * y[:, i] + only(y, T - 1 - i).amax(1) for i in range(T)], 1)
    ),
    "single rows stacked": lambda m, y: flat(
        torch.cat(
            [torch.stack([y[:, :, :1], y[:, :, 1:2]])[1], torch.stack([y[:, :, 1:2], y[:, :, :1]])[1], y[:, :, 2:]], 2
        )
    ),
    "a matrix of all positions": lambda m, y: (torch.arange(N)[:, None] + torch.arange(N) == N - 1).to(y) @ flat(y),
    "attention of positions": lambda m, y: (
        torch.softmax(-1e4 * (torch.arange(N)[:, None] + torch.arange(N) - N + 1).abs().to(y), -1) @ flat(y)
    ),
    "the first frame for those before": lambda m, y: flat(
        spatial(y, lambda z: F.pad(z, (0, 0, 0, 0, 3, 0), mode="replicate"))[:, :T]
    ),
    "by masks of data": lambda m, y: flat(sum((one(y, i) + 0 * y) * y[:, T - 1 - i : T - i] for i in range(T))),
    "where data says so": masks_of_data,
    "halves turned, pooled by themselves": lambda m, y: torch.cat(
        [spatial(half, lambda z: F.avg_pool3d(z, (2, 1, 1))) for half in (y[:, 2:], y[:, :2])], 1
    ).flatten(1, 3),
    "halves turned, resampled by themselves": lambda m, y: torch.cat(
        [spatial(half, lambda z: F.interpolate(z, scale_factor=(2, 1, 1))) for half in (y[:, 2:], y[:, :2])], 1
    ).flatten(1, 3),
    "halves turned, of every other frame": lambda m, y: flat(
        torch.cat(
            [
                spatial(half, lambda z: F.interpolate(z, scale_factor=(2, 1, 1)))[:, ::2]
                for half in (y[:, 2:], y[:, :2])
            ],
            1,
        )
    ),
    "another sample's frames": lambda m, y: flat(torch.cat([y[:, :2], y.roll(1, 0)[:, 2:]], 1)),
    "another sample's frames, turned": lambda m, y: flat(torch.cat([y[:, :2], y.flip(0)[:, 2:]], 1)),
    "another sample's frames, by index": lambda m, y: flat(torch.cat([y[:, :2], y[torch.tensor([1, 0])][:, 2:]], 1)),
    "frame-wise patch embed": lambda m, y: torch.cat(
        [
            F.conv3d(y[:, i : i + 1].movedim(-1, 1), torch.eye(D).view(D, D, 1, 1, 1).to(y), stride=(1, 2, 1)).movedim(
                1, -1
            )
            for i in (3, 2, 1, 0)
        ],
        1,
    ).flatten(1, 3),
    "causal chunks": lambda m, y: flat(
        torch.cat(
            [
                spatial(
                    p,
                    lambda v: F.conv3d(
                        F.pad(v, (0, 0, 0, 0, 2, 0)),
                        torch.tensor([0.0, 0, 1]).view(1, 1, 3, 1, 1).expand(D, 1, 3, 1, 1).to(v),
                        groups=D,
                    ),
                )
                for p in (y[:, 2:], y[:, :2])
            ],
            1,
        )
    ),
    "padded tiles of rows": lambda m, y: flat(
        torch.cat(
            [
                spatial(
                    p,
                    lambda v: F.conv3d(
                        F.pad(v, (0, 0, 1, 1)),
                        torch.tensor([0.0, 1, 0]).view(1, 1, 1, 3, 1).expand(D, 1, 1, 3, 1).to(v),
                        groups=D,
                    ),
                )
                for p in (y[:, :, 3:], y[:, :, :3])
            ],
            2,
        )
    ),
    "compressed history behind": lambda m, y: torch.cat(
        [y[:, 2:], spatial(y[:, :2], lambda v: F.avg_pool3d(v, (2, 1, 1)))], 1
    ).flatten(1, 3),
    "first frame last": lambda m, y: torch.cat(
        [spatial(y[:, 1:], lambda v: F.avg_pool3d(v, (3, 1, 1))), y[:, :1]], 1
    ).flatten(1, 3),
    "video and its pooled self": lambda m, y: torch.cat(
        [y, spatial(y, lambda v: F.avg_pool3d(v, (2, 1, 1)))], 1
    ).flatten(1, 3),
    "odd, then even, upsampled": lambda m, y: torch.cat(
        [
            spatial(y[:, 1::2], lambda v: F.interpolate(v, scale_factor=(2, 1, 1))),
            spatial(y[:, ::2], lambda v: F.interpolate(v, scale_factor=(2, 1, 1))),
        ],
        1,
    ).flatten(1, 3),
    "per-sample scatter": lambda m, y: named(
        m, torch.zeros_like(y).index_put((torch.arange(2)[:, None], torch.tensor([[3, 2, 1, 0]] * 2)), y)
    ),
    "scatter by coordinates": lambda m, y: named(
        m,
        torch.zeros_like(y)
        .movedim(0, 2)
        .index_put(
            (torch.arange(T).flip(0).repeat_interleave(H), torch.arange(H).repeat(T)), y.flatten(1, 2).transpose(0, 1)
        )
        .movedim(2, 0),
    ),
    "by copy_ that broadcasts": lambda m, y: flat(
        sum((one(y, i) * torch.empty_like(y).copy_(y[:, 3 - i : 4 - i]) for i in range(T)), 0 * y)
    ),
    "by replicate pad": lambda m, y: flat(
        sum(
            (
                one(y, i)
                * spatial(y[:, 3 - i : 4 - i], lambda v, i=i: F.pad(v, (0, 0, 0, 0, 3 - i, i), mode="replicate"))
                for i in range(T)
            ),
            0 * y,
        )
    ),
    "kept tokens put elsewhere": lambda m, y: named(
        m,
        torch.zeros_like(flat(y))
        .index_copy(1, torch.arange(N).flip(0)[:60], flat(y)[:, torch.arange(60)])
        .index_copy(1, torch.arange(60).flip(0), flat(y)[:, torch.arange(60, N)])
        .view(y.shape),
    ),
    "stacked frames copied": lambda m, y: named(
        m,
        torch.zeros_like(y)
        .index_copy(1, torch.tensor([0, 2]), torch.stack([y[:, 3], y[:, 1]], 1))
        .index_copy(1, torch.tensor([1, 3]), torch.stack([y[:, 2], y[:, 0]], 1)),
    ),
    "by a linear layer of one feature": lambda m, y: flat(
        sum(
            (F.linear(y[:, 3 - i, ..., None], torch.eye(T)[:, i : i + 1].to(y)).movedim(-1, 1) for i in range(T)), 0 * y
        )
    ),
    "by an outer product": lambda m, y: flat(
        sum(
            ((torch.eye(T)[:, i : i + 1].to(y) @ y[:, 3 - i].flatten(1)[:, None]).view(y.shape) for i in range(T)),
            0 * y,
        )
    ),
    "no frames left": lambda m, y: flat(torch.cat([y, F.pad(y, (0, 0, 0, 0, 0, 0, -2, -2))], 1)),
}


@pytest.mark.parametrize("start", ["conv", "linear"])
@pytest.mark.parametrize("name", CASES)
def test_mixtures(name: str, start: str) -> None:
    not_wrong(CASES[name], start)


@pytest.mark.parametrize(
    "of",
    [
        lambda total: total.cumsum(0),
        lambda total: total.scatter(0, torch.tensor(0), 1.0),
        lambda total: total.index_fill(0, torch.tensor(0), 1.0),
    ],
)
def test_what_is_done_to_a_number_raises_nothing(of: Callable[[Tensor], Tensor]) -> None:
    look(lambda m, y: flat(y + of(y.sum())))
