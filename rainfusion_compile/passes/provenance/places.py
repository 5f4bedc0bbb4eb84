# SPDX-License-Identifier: Apache-2.0
"""Slices of tokens that numbers put in places: ``e_i * y[:, j : j + 1]`` is frame `j` in place `i`, if `e_i` says so.

What numbers hold is not known here, so nor is where a slice stands that they are multiplied by or chosen with. One may
be anywhere, as the first frame is where it is a condition of all. Several are in an unknown order. What is added to all
tokens alike, with no numbers that tell one place from another, is not placed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from torch import Tensor

from rainfusion_compile.passes.provenance.axes import is_of_data, leaves, origins, product, resolve
from rainfusion_compile.passes.provenance.axis import Axis, Cut, Dim, Dims, find, size_of
from rainfusion_compile.passes.provenance.lineage import Placed, lineage_of, single_indices


def in_places(
    tensors: Sequence[Tensor], dims: Sequence[Dims], out: Sequence[Dim], but: int | None = None, *, weighs: bool | None
) -> tuple[list[Dim], frozenset[Placed]]:
    """Dims of what pairs the elements of tensors, lost where several slices were put in places; and those slices.

    ``dims``: those of the ``tensors``; ``out``: what these make together; ``but``: the dim that tensors stand side by
    side in; ``weighs``: whether an operator weighs its operands with each other, and so may put slices in places; None
    if it adds them: then numbers may. These are what is computed from no input, or broadcast itself, as masks are.
    """
    lineages = [lineage_of(tensor) for tensor in tensors]
    before = frozenset[Placed]().union(*(one.placed for one in lineages))
    if not before and not any(one.cuts or one.picks for one in lineages):
        return list(out), before
    found, axes = list(out), {axis for at, dim in enumerate(out) if at != but for axis in resolve(dim)}
    placed = {one for one in before if axes.isdisjoint(leaves(one.along))}
    count = size_of(axis for dim in out for axis in dim)
    for number, dim in enumerate(out):
        if number == but or size_of(dim) == 1:
            continue
        back = len(out) - number
        own = [each[-back] if back <= len(each) else () for each in dims]
        operands = list(zip(tensors, own, strict=True))
        wide = [tensor for tensor, each in operands if size_of(each) > 1]
        by_numbers = weighs is not False and any(not _of_inputs(one) or one.numel() < count for one in wide)
        places = by_numbers if weighs is None else weighs
        found[number], here = together(operands, dim, places=places, moves=by_numbers)
        placed |= here
        if _both_beside_each(operands, dim):
            found[number] = (Axis(2, lost="what two have in common, beside each of them"),)
    return found, frozenset(placed)


def _both_beside_each(operands: Sequence[tuple[Tensor, Dim]], dim: Dim) -> bool:
    """Whether something of the two indices of a dim, as their sum, meets each of them: less one, it is the other."""
    if size_of(dim) != 2 or not any(size_of(own) == 2 and _of_inputs(tensor) for tensor, own in operands):
        return False
    picks = (pick for tensor, own in operands if size_of(own) == 1 for pick in lineage_of(tensor).picks)
    return any(find(pick.whole) in resolve(dim) for pick in picks)


def together(
    operands: Sequence[tuple[Tensor, Dim]], dim: Dim, *, places: bool, moves: bool = False, written: Dim = ()
) -> tuple[Dim, set[Placed]]:
    """A dim, lost if several slices of one axis were put in places along it; and those slices.

    ``operands``: tensors, each with its own dim there; ``places``: whether it is said where those with none stand;
    ``moves``: whether numbers choose from what may have moved; ``written``: of a part of the dim, what numbers put
    there.
    """
    indices: list[tuple[Axis, set[object]]] = []
    for axis in map(find, written):
        cuts = [one.cut for one in (axis, *chain(*axis.parts)) if one.cut is not None]
        indices += [(whole, {cut[1:] for cut in cuts if find(cut.whole) is whole}) for whole in _wholes(cuts)]
    kept = any(axis.permuted for axis in resolve(written))  # some tokens, in an order that is not followed
    for tensor, own in operands:
        if size_of(own) == 1:
            indices += [*_slices(tensor, None if kept else size_of(dim)).items()] if places else []
            continue
        placed = [one for one in lineage_of(tensor).placed if _stands(one, own, tensor)]
        indices += [(whole, {one.at for one in placed if find(one.whole) is whole}) for whole in _wholes(placed)]
        indices += [*_moved(tensor, own).items()] if moves else []
    found = {whole: [at for one, at in indices if one is whole] for whole, _ in indices}
    if any(len(set[object]().union(*each)) > max(map(len, each)) for each in found.values()):
        return (Axis(size_of(dim), lost="numbers that put tokens in places"),), set()
    if size_of(dim) == 1:
        return dim, set()
    return dim, {Placed(product(resolve(dim)), whole, at) for whole, each in found.items() for at in set().union(*each)}


def _wholes(slices: Iterable[Cut | Placed]) -> set[Axis]:
    return {find(one.whole) for one in slices}


def _stands(one: Placed, dim: Dim, tensor: Tensor) -> bool:
    """Whether what was put in a place stands along a dim of a tensor: anywhere, if the axis that it was put in is none
    of the tensor's any more."""
    along = set(leaves(one.along))
    dims: Dims = getattr(tensor, "_rainfusion_dims", ())
    return not along.isdisjoint(resolve(dim)) or along.isdisjoint(axis for each in dims for axis in resolve(each))


def _of_inputs(tensor: Tensor) -> bool:
    return bool(lineage_of(tensor).inputs)


def _slices(tensor: Tensor, size: int | None) -> dict[Axis, set[object]]:
    """By axis of tokens, the single indices of it that a tensor was computed from, and what was picked of it; not all,
    as those of a mean are.

    What a table alone names may be tokens if it is as long as the dim that they stand along; so long is an axis of
    which something was picked, if the dim has a size.
    """
    if not _of_inputs(tensor):
        return {}
    singles = single_indices(lineage_of(tensor).cuts).items()
    found: dict[Axis, set[object]] = {whole: {*at} for whole, at in singles if len(at) < whole.size}
    for pick in lineage_of(tensor).picks:
        if (whole := find(pick.whole)).size == size or size is None:
            found.setdefault(whole, set()).add(pick.by)
    return {whole: at for whole, at in found.items() if is_of_data(whole) or (whole.size == size and in_a_table(whole))}


def _moved(tensor: Tensor, dim: Dim) -> dict[Axis, set[object]]:
    """By axis of a dim, what may have moved along it."""
    axes, found = resolve(dim), dict[Axis, set[object]]()
    for pick in lineage_of(tensor).picks if _of_inputs(tensor) else ():
        if pick.moved and not {*leaves(pick.whole)}.isdisjoint(axes):
            found.setdefault(find(pick.whole), set()).add(pick.by)
    return found


def in_a_table(axis: Axis) -> bool:
    """Whether a parameter or a mesh has an axis, and not as its channels."""
    places = [place for one in origins(axis) for place in one.sources]
    return any(not source.rank or (source.parameter and dim < source.rank - 1) for source, dim in places)
