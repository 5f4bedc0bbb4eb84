# SPDX-License-Identifier: Apache-2.0
"""Grids that rotary tables show whose angles mix the three coordinates.

An angle ``a t + b r + c w``, with numbers of its own for each head and channel, is no function of one coordinate. But
from a token to the next it grows by one amount inside a row, by another at the end of each row, and by a third at the
end of each frame. Cosines and sines together tell these steps, and the steps three sizes.

Which axis is time no step tells. Proved is that the outer one counts up from 0 while the other two lie evenly around
0: of two tokens that face each other across the middle of the first frame, the angles add up to nothing. Where all
three begin at 0, nothing is read. A frame may be mirrored, which no window can tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rainfusion_compile.runtime.positions import LONGEST_ROW
from rainfusion_compile.sparsity.layout import Grid

_SAME, _OTHER = 1e-3, 1e-2  # differences of numbers of size 1 that are none, and that are some


def read_turns(cosines: Tensor, sines: Tensor, min_tokens: int = 0) -> tuple[int, Grid] | None:
    """The dimension that runs over tokens, and their grid, where two tensors of one shape prove one; else None.

    Args:
        cosines, sines: of any floating dtype, tokens along one dimension; others may be channels, heads, samples.
        min_tokens: dimensions of fewer are not looked at.
    """
    alike = cosines.shape == sines.shape and cosines.dtype == sines.dtype and cosines.device == sines.device
    if not alike or cosines.dim() < 2 or not cosines.is_floating_point() or cosines.numel() == 0:
        return None
    dims = [dim for dim, size in enumerate(cosines.shape) if size >= max(min_tokens, 4)]
    if not dims or cosines.layout != torch.strided or not _turn(cosines.flatten()[:64], sines.flatten()[:64]):
        return None
    if not _turn(cosines, sines):
        return None
    turns = torch.complex(cosines.float(), sines.float())
    grids = [(dim, grid_of_turns(turns.movedim(dim, 0).flatten(1))) for dim in dims]
    found = [(dim, grid) for dim, grid in grids if grid is not None]
    return found[0] if len(found) == 1 else None


def _turn(cosines: Tensor, sines: Tensor) -> bool:
    return bool(((cosines.float() ** 2 + sines.float() ** 2 - 1).abs() <= _SAME).all())


def grid_of_turns(turns: Tensor) -> Grid | None:
    """The grid of complex numbers of size 1 ``[tokens, columns]``; None if they do not prove one."""
    steps = turns[1:] * turns[:-1].conj()
    width = _period(steps, LONGEST_ROW)
    if width is None:
        return None
    lines = steps[width - 1 :: width]
    one_frame = _differs(lines, lines[0]) is False
    height = len(lines) + 1 if one_frame else _period(lines, len(lines))
    if height is None:
        return None
    frames = lines[height - 1 :: height]
    if len(turns) % (width * height) or (len(frames) > 1 and _differs(frames[1:], frames[0]) is not False):
        return None
    first = turns[: width * height]
    centred = _differs(first * first.flip(0), torch.ones_like(first[0])) is False
    ends = turns[0] * turns[-1]
    if not centred or (len(frames) and _differs(ends[None], torch.ones_like(ends)) is not True):
        return None
    return len(turns) // (width * height), height, width


def _period(steps: Tensor, longest: int) -> int | None:
    """After how many steps there is one that is not like those before, if all others come in such runs; at least 2."""
    differ = (steps[:longest] - steps[0]).abs().amax(1)
    if not bool((differ >= _OTHER).any()):
        return None
    period = int((differ >= _OTHER).int().argmax()) + 1
    inside = torch.arange(1, len(steps) + 1, device=steps.device) % period != 0
    regular = period > 1 and _differs(steps[inside], steps[0]) is False
    return period if regular else None


def _differs(numbers: Tensor, one: Tensor) -> bool | None:
    """Whether some of these rows differ from this one; None where it cannot be told."""
    most = float((numbers - one).abs().max())
    return True if most >= _OTHER else False if most <= _SAME else None
