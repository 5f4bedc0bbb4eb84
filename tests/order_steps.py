# SPDX-License-Identifier: Apache-2.0
"""What drawn models do to the order of their tokens between patches and attention. Every step has a form that keeps it."""

from __future__ import annotations

from collections.abc import Callable

from order_models import TEXT, WIDTH, Draft

Step = Callable[[Draft], None]
GRID_STEPS: list[tuple[float, Step]] = []
TOKEN_STEPS: list[tuple[float, Step]] = []


def step(grid: float = 0, tokens: float = 0) -> Callable[[Step], Step]:
    """Register a step for `y` with a dim each for T, H, W, and for ``[B, N, D]``, with weights."""

    def add(function: Step) -> Step:
        for weight, table in ((grid, GRID_STEPS), (tokens, TOKEN_STEPS)):
            if weight:
                table.append((weight, function))
        return function

    return add


def at(axis: int, index: str) -> str:
    """What selects along `axis` in brackets."""
    return ", ".join([":"] * axis + [index])


# --- one axis in an order --------------------------------------------------------------------------------------------


@step(grid=5)
def lists(draft: Draft) -> None:
    """Python lists of frames, rows or columns."""
    a = draft.axis()
    n = draft.size(draft.dims[a])
    order = draft.order(n)
    pick = draft.rng.choice(
        [
            f"torch.stack([y.select({a}, i) for i in {order}], {a})",
            f"torch.stack([y.unbind({a})[i] for i in {order}], {a})",
            f"torch.stack([y[{at(a, 'i')}] for i in {order}], dim={a})",
            f"torch.cat([y.narrow({a}, i, 1) for i in {order}], {a})",
            f"torch.cat([y[{at(a, 'i:i + 1')}] for i in {order}], dim={a})",
            f"torch.cat([y.split(1, {a})[i] for i in {order}], {a})",
            f"torch.concat([y.chunk({n}, {a})[i] for i in {order}], {a})",
            f"torch.cat([y.tensor_split({n}, {a})[i] for i in {order}], {a})",
            f"torch.cat([part.unsqueeze({a}) for part in [y.unbind({a})[i] for i in {order}]], {a})",
            f"torch.stack([y.select({a}, i).clone() * 2 for i in {order}], {a})",
        ]
    )
    draft(f"y = {pick}")


@step(grid=2)
def sorted_lists(draft: Draft) -> None:
    """Lists that are changed in place."""
    a = draft.axis()
    n = draft.size(draft.dims[a])
    changes = ["parts.reverse()", "parts.insert(0, parts.pop())", f"parts[0], parts[{n - 1}] = parts[{n - 1}], parts[0]"]
    change = draft.rng.choice(changes) if draft.lie(0.7) else "parts = [part for part in parts]"
    draft(f"parts = list(y.unbind({a}))", change, f"y = torch.stack(parts, {a})")


@step(grid=3)
def pieces(draft: Draft) -> None:
    """Slices, which are put together again."""
    a = draft.axis()
    n = draft.size(draft.dims[a])
    cut = draft.rng.randrange(1, n) if n > 1 else 0
    first, second = at(a, f":{cut}"), at(a, f"{cut}:")
    if draft.lie(0.7):
        wrong = [
            f"torch.cat([y[{second}], y[{first}]], {a})",
            f"torch.cat([y[{at(a, '::2')}], y[{at(a, '1::2')}]], {a})",
            f"torch.cat([y, y], {a}).narrow({a}, {cut}, {n})",
            f"torch.cat([y[{first}], y[{second}].flip({a})], {a})",
            f"torch.cat([y[{first}].flip({a}), y[{second}]], {a})",
            f"torch.cat(y.split([{cut}, {n - cut}], {a})[::-1], {a})",
            f"y.repeat({', '.join('2' if i == a else '1' for i in range(len(draft.dims)))}).narrow({a}, {cut}, {n})",
        ]
        draft(f"y = {draft.rng.choice(wrong)}")
    else:
        right = [
            f"torch.cat([y[{first}], y[{second}]], {a})",
            f"torch.cat(y.split([{cut}, {n - cut}], {a}), {a})",
            f"torch.cat([y, y], {a}).narrow({a}, 0, {n})",
        ]
        draft(f"y = {draft.rng.choice(right)}")


FACTORIES = (
    "torch.empty_like(y)",
    "torch.zeros_like(y)",
    "torch.full_like(y, 0.5)",
    "y.new_zeros(y.shape)",
    "y.new_empty(y.shape)",
    "torch.empty(y.shape, dtype=y.dtype)",
    "torch.zeros(y.size(), dtype=y.dtype)",
    "y.clone()",
    "torch.rand_like(y)",
)


@step(grid=5)
def slots(draft: Draft) -> None:
    """Frames, rows or columns are written into a tensor one by one."""
    a = draft.axis()
    n = draft.size(draft.dims[a])
    order = draft.order(n)
    write = draft.rng.choice(
        [
            f"z[{at(a, 'i')}] = y[{at(a, 'j')}]",
            f"z.select({a}, i).copy_(y.select({a}, j))",
            f"z.narrow({a}, i, 1).copy_(y.narrow({a}, j, 1))",
            f"z[{at(a, 'i:i + 1')}] = y[{at(a, 'j:j + 1')}]",
            f"z[{at(a, 'j')}] = y[{at(a, 'i')}]",
            f"z.unbind({a})[i].copy_(y.unbind({a})[j])",
        ]
    )
    draft(f"z = {draft.rng.choice(FACTORIES)}", f"for i, j in enumerate({order}):", f"    {write}", "y = z")


@step(grid=4, tokens=4)
def indexed(draft: Draft) -> None:
    """Operators that take an order as a tensor."""
    a = draft.axis()
    n = draft.size(draft.dims[a])
    order = draft.order(n)
    draft.plain = False
    index = draft.constant(f"torch.tensor({order})")
    view = [1] * len(draft.dims)
    view[a] = n
    wide = f"{index}.view({', '.join(map(str, view))}).expand(y.shape)"
    spelled = [
        f"y = y.index_select({a}, {index})",
        f"y = torch.index_select(y, {a}, {index}, out=y.new_empty(y.shape))",
        f"y = y[{at(a, index)}]",
        f"y = y.gather({a}, {wide})",
        f"y = torch.take_along_dim(y, {index}.view({', '.join(map(str, view))}), {a})",
        f"y = torch.zeros_like(y).scatter({a}, {wide}, y)",
        f"y = torch.empty_like(y).index_copy({a}, {index}, y)",
        f"y = torch.zeros_like(y).index_add_({a}, {index}, y)",
        f"y = y.clone().index_copy_({a}, {index}, y)",
        f"z = torch.empty_like(y)\nz[{at(a, index)}] = y\ny = z",
        f"y = y.index_select({a}, {index}.argsort())",
        f"y = y[{at(a, str(order))}]",
        f"y = torch.stack([y.select({a}, i) for i in {order}], {a}) + 0" if n < 8 else f"y = y.index_select({a}, {index})",
    ]
    draft(*draft.rng.choice(spelled).split("\n"))


@step(grid=2, tokens=1)
def turned(draft: Draft) -> None:
    """flip, roll; or both ways."""
    a = draft.axis()
    n = draft.size(draft.dims[a])
    if draft.lie(0.7):
        draft.rng.shuffle(spelled := [f"y = y.flip({a})", f"y = torch.roll(y, 1, {a})", f"y = y.roll(shifts={n // 2}, dims={a})"])
        draft(spelled[0])
    else:
        spelled = [f"y = y.flip({a}).flip({a})", f"y = y.roll(1, {a}).roll(-1, {a})", "y = y.clone()", f"y = y.roll({n}, {a})"]
        draft(draft.rng.choice(spelled))
        draft.plain = draft.plain and "clone" in draft.body[-1]


@step(grid=3, tokens=2)
def multiplied(draft: Draft) -> None:
    """A product with a permutation matrix along an axis."""
    a = draft.axis()
    n = draft.size(draft.dims[a])
    draft.plain = False
    matrix = draft.constant(f"torch.eye({n})[{draft.order(n)}]")
    letters = draft.dims.lower()
    moved = letters.replace(letters[a], "z")
    spelled = [
        f"y = torch.einsum('z{letters[a]},{letters}->{moved}', {matrix}, y)",
        f"y = ({matrix} @ y.movedim({a}, -2)).movedim(-2, {a})",
        f"y = F.linear(y.movedim({a}, -1), {matrix}).movedim(-1, {a})",
        f"y = torch.tensordot({matrix}, y, dims=([1], [{a}])).movedim(0, {a})",
    ]
    draft(draft.rng.choice(spelled))


@step(grid=1.5)
def cropped(draft: Draft) -> None:
    """Fewer frames, rows or columns, in order."""
    a = draft.axis()
    n = draft.size(draft.dims[a])
    if n > 2:
        spelled = [(n - 1, "1:"), (n - 1, ":-1"), (-(-n // 2), "::2"), (n - 2, "1:-1")]
        draft.sizes[draft.dims[a]], index = draft.rng.choice(spelled)
        draft(f"y = y[{at(a, index)}]")
        draft.plain = draft.plain and index != "::2"


# --- several axes ----------------------------------------------------------------------------------------------------


@step(grid=3)
def permuted(draft: Draft) -> None:
    dims = list(draft.dims)
    draft.rng.shuffle(dims)
    draft.permute("".join(dims))


def _swapped(draft: Draft) -> list[int]:
    """Two neighbouring dims of frames, rows and columns."""
    places = [i for i in range(len(draft.dims) - 1) if draft.dims[i] in "THW" and draft.dims[i + 1] in "THW"]
    return [draft.rng.choice(places)] if places else []


@step(grid=2)
def reshaped(draft: Draft) -> None:
    """Two dims exchanged and the old sizes put over them; or exchanged twice."""
    for a in _swapped(draft):
        shape = draft.shape()
        if draft.lie(0.7):
            draft(f"y = y.transpose({a}, {a + 1}).reshape({shape})")
        else:
            draft(f"y = y.flatten({a}, {a + 1}).reshape({shape})")


@step(grid=3)
def polyphase(draft: Draft) -> None:
    """An axis as two digits; the digits exchanged, or not."""
    axes = [(i, k) for i, label in enumerate(draft.dims) if label in "THW" for k in (2, 3)]
    axes = [(i, k) for i, k in axes if draft.size(draft.dims[i]) % k == 0 and k < draft.size(draft.dims[i])]
    if axes:
        a, k = draft.rng.choice(axes)
        n = draft.size(draft.dims[a])
        swap = f".transpose({a}, {a + 1})" if draft.lie(0.7) else draft.rng.choice(["", ".contiguous()", " * 2"])
        draft(f"y = y.unflatten({a}, ({n // k}, {k})){swap}", f"y = y.flatten({a}, {a + 1})")


@step(grid=2)
def windows(draft: Draft) -> None:
    """Tiles of two axes one after the other; and back, or not."""
    dims = [d for d in "THW" if d in draft.dims and draft.size(d) % 2 == 0]
    if len(dims) < 2:
        return
    one, two = dims[-2:]
    rest = "".join(d for d in draft.dims if d not in (one, two))
    draft.permute(rest + one + two)
    r, (h, w) = len(rest), draft.shape(one + two)
    shape = draft.shape()
    draft(f"y = y.unflatten({r + 1}, ({w // 2}, 2)).unflatten({r}, ({h // 2}, 2)).transpose({r + 1}, {r + 2})")
    if draft.lie(0.7):
        draft(f"y = y.reshape({shape})")
    else:
        draft(f"y = y.flatten({r}, {r + 3}).unflatten({r}, ({h // 2}, {w // 2}, 2, 2))")
        draft(f"y = y.transpose({r + 1}, {r + 2}).reshape({shape})")


@step(grid=2)
def pixels(draft: Draft) -> None:
    """Space to depth and back."""
    if not all(d in draft.dims and draft.size(d) % 2 == 0 for d in "HW"):
        return
    draft.permute("".join(d for d in "BTDHW" if d in draft.dims))
    if draft.coin():
        draft("y = F.pixel_shuffle(F.pixel_unshuffle(y, 2), 2)")
    else:
        lead, h, w = len(draft.dims) - 3, draft.size("H"), draft.size("W")
        view = f"y.unflatten({lead + 1}, ({h // 2}, 2)).unflatten({lead + 3}, ({w // 2}, 2))"
        draft(f"y = {view}", f"y = y.flatten({lead + 3}, {lead + 4}).flatten({lead + 1}, {lead + 2})")
    draft.plain = False


@step(grid=6)
def convolved(draft: Draft) -> None:
    """A convolution over dims that may not be what it takes them for."""
    labels = [d for d in "THW" if d in draft.dims]
    mix = draft.coin(0.35)
    kind = draft.rng.randrange(5) if len(labels) == 3 else 4
    if kind == 0:  # [B, D, T, H * W]
        kernel = "(1, 3)" if mix else "1"
        conv = draft.module(f"operators.near(nn.Conv2d({WIDTH}, {WIDTH}, {kernel}, padding='same'))")
        labels = labels if draft.coin(0.7) else draft.rng.sample(labels, 3)
        draft.permute("BD" + "".join(labels))
        a, b, c = draft.shape("".join(labels))
        if draft.coin():
            draft(f"y = {conv}(y.flatten(3)).unflatten(3, ({b}, {c}))")
        else:
            draft(f"y = {conv}(y.flatten(2, 3)).unflatten(2, ({a}, {b}))")
    elif kind == 1:  # a convolution over three dims in any order
        kernel = draft.rng.choice(["(3, 3, 3)", "(3, 1, 1)"]) if mix else "1"
        conv = draft.module(f"operators.near(nn.Conv3d({WIDTH}, {WIDTH}, {kernel}, padding='same'))")
        labels = labels if draft.coin() else draft.rng.sample(labels, 3)
        draft.permute("BD" + "".join(labels))
        draft(f"y = {conv}(y)")
    elif kind == 2:  # [B * one, D, two, three]
        kernel = draft.rng.choice(["3", "(3, 1)", "(1, 3)"]) if mix else "1"
        conv = draft.module(f"operators.near(nn.Conv2d({WIDTH}, {WIDTH}, {kernel}, padding='same'))")
        labels = labels if draft.coin() else draft.rng.sample(labels, 3)
        draft.permute("B" + labels[0] + "D" + "".join(labels[1:]))
        draft(f"y = {conv}(y.flatten(0, 1)).unflatten(0, {draft.shape('B' + labels[0])})")
    elif kind == 3:  # [B * H * W, D, T] and the like
        kernel = "3" if mix else "1"
        conv = draft.module(f"operators.near(nn.Conv1d({WIDTH}, {WIDTH}, {kernel}, padding='same'))")
        labels = draft.rng.sample(labels, 3)
        draft.permute("B" + "".join(labels[:2]) + "D" + labels[2])
        draft(f"y = {conv}(y.flatten(0, 2)).unflatten(0, {draft.shape('B' + ''.join(labels[:2]))})")
    else:  # [B, D, N]
        conv = draft.module(f"nn.Conv1d({WIDTH}, {WIDTH}, 1)")
        draft.permute("BD" + "".join(labels))
        draft(f"y = {conv}(y.flatten(2)).unflatten(2, {draft.shape(''.join(labels))})")


@step(grid=3, tokens=3)
def unknown(draft: Draft) -> None:
    """An operator without a rule."""
    a = draft.axis()
    n = draft.size(draft.dims[a])
    order = draft.order(n)
    draft.plain = False
    again = draft.name("p") if draft.coin() else ""  # a table that the tokens meet before and after
    if again:
        shape = [1 if label == "B" else draft.size(label) for label in draft.dims]
        draft.init.append(f"self.{again} = nn.Parameter(torch.randn({shape}))")
        draft(f"y = y + self.{again}")
    op = "torch.ops.orders"
    near = _swapped(draft)
    spelled = [
        f"y = {op}.pick(y, {a}, {order})",
        f"y = y.clone()\n{op}.pick_(y, {a}, {order})",
        f"z = torch.empty_like(y)\n{op}.pick_out(y, {a}, {order}, z)\ny = z",
        f"z = y.clone()\n{op}.pick_out(y, {a}, {order}, z)\ny = z",
        f"z = torch.empty_like(y)\nz.copy_({op}.pick(y, {a}, {order}))\ny = z",
        f"z = torch.zeros_like(y)\nz[:] = {op}.pick(y, {a}, {order})\ny = z",
        f"y = torch.zeros_like(y) + {op}.pick(y, {a}, {order})",
        f"y = torch.where(torch.ones_like(y).bool(), {op}.pick(y, {a}, {order}), 0.0)",
        f"y = y.contiguous().clone()\nz = y.view(y.shape)\n{op}.pick_(z, {a}, {order})",
        f"y = y.contiguous().clone()\n{op}.pick_(y.unsqueeze(0), {a + 1}, {order})",
        f"y = y.contiguous().clone()\nz = y[:1]\n{op}.pick_(y, {a}, {order})\ny = torch.cat([z, y[1:]])",
    ]
    if near and draft.lie(0.5):
        spelled = [f"y = {op}.scramble(y, {near[0]}, {near[0] + 1})"]
    draft(*draft.rng.choice(spelled).split("\n"))
    if again:
        draft(f"y = y + self.{again}")


@step(grid=4, tokens=4)
def aliased(draft: Draft) -> None:
    """Writes through one view and reads through another; or into the tensor itself."""
    a = draft.axis()
    n = draft.size(draft.dims[a])
    other = draft.rng.choice([f"y.flip({a}).clone()", f"y.roll(1, {a})", f"y.flip({a})"]) if draft.lie(0.8) else "y * 2"
    turned_ = other.replace("y", "s")
    shape = draft.shape()
    last = len(shape) - 1
    spelled = [
        f"s = y.flatten(1, {last})\ny.copy_({other})\ny = s.unflatten(1, {shape[1:]})",
        f"s = y.view(y.shape)\ny.copy_({other})\ny = s",
        f"s = y.view(y.shape)\ns.copy_({turned_})",
        f"s = y.flatten(0, 1).unflatten(0, {shape[:2]})\ns[:] = {turned_}",
        f"y[:] = {other}",
        f"y[...] = {other}",
        f"y.copy_({other})",
        f"s = y[:]\ns.mul_(0).add_({other.replace('y', 'k')})\ny = s".replace("s = y[:]", "k = y.clone()\ns = y[:]"),
        f"s = y.transpose(0, 1)\ny.copy_({other})\ny = s.transpose(0, 1)",
        f"s = y.detach()\ns.copy_({turned_})",
    ]
    if n > 1 and n < 8:
        i, j = draft.rng.sample(range(n), 2)
        if not draft.lie(0.8):
            j = i
        spelled.append(
            f"s = y.select({a}, {i}).clone()\ny.select({a}, {i}).copy_(y.select({a}, {j}))\ny.select({a}, {j}).copy_(s)"
        )
        spelled.append(f"s = y[{at(a, str(i))}].clone()\ny[{at(a, str(i))}] = y[{at(a, str(j))}]\ny[{at(a, str(j))}] = s")
    draft("y = y.contiguous().clone()", *draft.rng.choice(spelled).split("\n"))


@step(grid=4, tokens=3)
def tables(draft: Draft) -> None:
    """Positions are added: the same table twice, tables of each axis, or one of all."""
    labels = [d for d in draft.dims if d in "THWN"]
    kind = draft.rng.randrange(3)

    def table(which: str) -> str:
        return draft.parameter(*(draft.size(d) if d in which + "D" else 1 for d in draft.dims))

    if kind == 0:
        draft(f"y = y + {table(''.join(labels))}")
    elif kind == 1:
        draft(f"y = y + {' + '.join(table(d) for d in labels)}")
    else:
        draft(*(f"y = y + {table(d)}" for d in labels))


@step(grid=2, tokens=2)
def pointwise(draft: Draft) -> None:
    """What leaves every token where it is."""
    dims = draft.dims
    if dims[-1] == "D":
        spelled = [
            f"y = {draft.module(f'nn.LayerNorm({WIDTH})')}(y)",
            f"y = y + F.gelu({draft.module(f'nn.Linear({WIDTH}, {WIDTH})')}(y))",
            "y = F.silu(y) + y",
            "y = y.clone()",
            "y = F.rms_norm(y, (y.shape[-1],))",
            "y = F.dropout(y, 0.1, self.training)",
        ]
    else:
        spelled = ["y = F.silu(y) + y", "y = y.contiguous()", "y = y * 2 - 1", "y = y.flip(0)"]
    draft(draft.rng.choice(spelled))


@step(grid=1, tokens=2)
def strided(draft: Draft) -> None:
    """as_strided and unfold: of dims as they lie, or exchanged."""
    draft.plain = False
    shape = list(draft.shape())
    strides = [0] * len(shape)
    step_ = 1
    for i in reversed(range(len(shape))):
        strides[i], step_ = step_, step_ * shape[i]
    a = draft.axis()
    n = draft.size(draft.dims[a])
    again = draft.parameter(*(1 if label == "B" else draft.size(label) for label in draft.dims)) if draft.coin() else ""
    if again:
        draft(f"y = y + {again}")
    same = [b for b, label in enumerate(draft.dims) if label in "THW" and b != a and shape[b] == n]
    if draft.lie(0.7) and same:
        strides[a], strides[same[0]] = strides[same[0]], strides[a]
        draft(f"y = y.contiguous().as_strided({tuple(shape)}, {tuple(strides)})")
    elif draft.lie(0.7) and n > 1:
        draft(f"y = torch.cat([y, y], {a}).unfold({a}, {n}, 1).select({a}, 1).movedim(-1, {a})")
    elif draft.coin():
        draft(f"y = y.contiguous().as_strided({tuple(shape)}, {tuple(strides)})")
    else:
        draft(f"y = y.unfold({a}, 1, 1).squeeze(-1)")
    if again:
        draft(f"y = y + {again}")


@step(tokens=2)
def unraveled(draft: Draft) -> None:
    """Tokens as a grid, in the grid's own order or another, with its own sizes or others, and back."""
    if draft.size("N") != draft.size("T") * draft.size("H") * draft.size("W"):
        return
    sizes, order = list(draft.shape("THW")), [1, 2, 3]
    if draft.lie(0.3):
        draft.rng.shuffle(sizes)
    if draft.lie(0.6):
        draft.rng.shuffle(order)
    draft(f"y = y.unflatten(1, {tuple(sizes)}).permute(0, {', '.join(map(str, order))}, 4).flatten(1, 3)")


# --- from y to tokens to attention -----------------------------------------------------------------------------------


def flatten(draft: Draft) -> None:
    """`y` as ``[B, N, D]``."""
    labels = [d for d in "THW" if d in draft.dims]
    chance = draft.rng.random()
    if draft.lie(0.35):
        draft.rng.shuffle(labels)
    dims = "".join(labels)
    count = len(dims)
    draft.sizes["N"] = 1
    for d in dims:
        draft.sizes["N"] *= draft.size(d)
    b, n = draft.shape("BN")
    if not draft.honest and chance < 0.06:  # samples or channels in the sequence
        if draft.coin():
            draft.permute("B" + dims + "D")
            draft(f"y = y.flatten(0, {count}).unsqueeze(0)")
            draft.sizes["N"], draft.sizes["B"] = b * n, 1
        else:
            draft.permute("BD" + dims[1:] + dims[0])
            draft(f"y = {draft.module(f'nn.Linear({draft.size(dims[0])}, {WIDTH})')}(y.flatten(1, {count}))")
            draft.sizes["N"] = n // draft.size(dims[0]) * WIDTH
    elif chance < 0.12 and count == 3:  # one axis in the batch
        draft.permute("B" + dims + "D")
        draft(f"y = y.flatten(0, 1).flatten(1, {count - 1})")
        draft.sizes["B"], draft.sizes["N"] = b * draft.size(dims[0]), n // draft.size(dims[0])
    elif chance < 0.16 and count == 3:  # a register token for each frame: the video's tokens are not together any more
        draft.permute("B" + dims + "D")
        many = draft.size(dims[0])
        draft(f"r = {draft.parameter(1, 1, 1, WIDTH)}.expand({b}, {many}, 1, {WIDTH})")
        draft(f"y = torch.cat([r, y.flatten(2, 3)], 2).flatten(1, 2)")
        draft.sizes["N"] = n + many
        draft.plain = False
    elif chance < 0.3:
        draft.permute("B" + dims + "D")
        order = draft.order(draft.size(dims[0]))
        ends = "" if count == 2 else f".flatten(1, {count - 1})"
        draft(f"y = torch.cat([y[:, i]{ends} for i in {order}], 1)")
    elif chance < 0.5:
        draft.permute("BD" + dims)
        draft(draft.rng.choice(["y = y.flatten(2).transpose(1, 2)", f"y = y.reshape({b}, {WIDTH}, {n}).mT"]))
    elif chance < 0.6:
        draft.permute("B" + dims + "D")
        draft(f"z = y.new_zeros({b}, {n}, {WIDTH})", f"z[:, :{n}] = y.reshape({b}, -1, {WIDTH})", "y = z")
    else:
        draft.permute("B" + dims + "D")
        draft(draft.rng.choice([f"y = y.flatten(1, {count})", f"y = y.reshape({b}, -1, {WIDTH})"]))
    draft.dims = "BND"


def second_video(draft: Draft) -> bool:
    return not draft.honest and draft.coin(0.12)


def _surround(draft: Draft, videos: list[str]) -> bool:
    """Text before, after or around the tokens; dropped again, or padded. Whether the text is an input."""
    n = draft.size("N")
    given = draft.coin()
    text = "text" if given else draft.parameter(1, TEXT, WIDTH) + ".expand(len(y), -1, -1)"
    if given:
        draft("text = text[:1].expand(len(y), -1, -1)")
    around = draft.rng.randrange(3)
    whole = ([text, "{}"], ["{}", text], [f"{text}[:, :2]", "{}", f"{text}[:, 2:]"])[around]
    chance, begin = draft.rng.random(), (TEXT, 0, 2)[around]
    for y in videos:
        draft(f"{y} = torch.cat([{', '.join(whole).format(y)}], 1)")
        if chance < 0.3:
            draft(f"{y} = {y}[:, {begin}:{begin + n}]")
        elif chance < 0.5:
            draft(f"{y} = F.pad({y}, (0, 0, 0, 3))")
        elif chance < 0.6 and around == 2:
            draft(f"{y} = {y}[:, {begin}:]")
    return given


def _meet(draft: Draft) -> None:
    """A second video, and what it shares with the first."""
    draft("u = self.tokens(x2)")
    if draft.coin():
        table = draft.parameter(1, draft.size("N"), WIDTH)
        draft(f"y = y + {table}", f"u = u + {table}")
    meetings = [
        "pass",
        "u = u + 0 * y",
        "u = u * torch.sigmoid(y)",
        "u = torch.where(y > 0, u, 0.5 * u)",
        "u = u * (y > -100)",
        "u = u.masked_fill(y > 100, 0.0)",
        "u = torch.lerp(u, y, 0.0)",
        "u = torch.zeros_like(y) + u",
        "u = torch.empty_like(y).copy_(u)",
        "u = u.clamp(max=y.abs() + 100)",
    ]
    draft(draft.rng.choice(meetings))


def _rotary(draft: Draft, tokens: int) -> None:
    """Queries and keys turned by tables: of parameters, or of a mesh of the video's sizes."""
    t, h, w = draft.shape("THW")
    if draft.coin() and tokens == t * h * w:
        mesh = ", ".join(f"torch.arange({n})" for n in (t, h, w))
        draft(f"angle = torch.stack(torch.meshgrid({mesh}, indexing='ij'), -1).flatten(0, 2).to(y)")
        draft("angle = torch.cat([angle, angle, angle[:, :2]], 1)")
        cos, sin = "angle.cos()", "angle.sin()"
        draft("angle = torch.cat([angle, angle], 1)")
    else:
        cos, sin = draft.parameter(tokens, 16), draft.parameter(tokens, 16)
    draft("def turn(z):", f"    return z * {cos} + torch.cat([-z[..., 8:], z[..., :8]], -1) * {sin}")
    draft("q, k = turn(q), turn(k)")


def attend(draft: Draft, second: bool) -> bool:
    """Text, tokens of queries, keys and values, attention; whether there is text. Sizes B and N are those of `y`."""
    if second:
        _meet(draft)
    text = draft.coin(0.35)
    given = text and _surround(draft, ["y", "u"] if second else ["y"])
    keys = "u" if second else "y"
    if not second and draft.lie(0.15):
        others = ["y.flip(0)", "y.roll(1, 0)", "y[list(range(len(y)))[::-1]]", "y.flip(1)", "torch.stack(y.unbind(0)[::-1])"]
        others += ["torch.cat([y[1:], y[:1]])", "y.roll(1, 1)", "torch.cat([y[:, 1:], y[:, :1]], 1)"]
        keys = draft.rng.choice(others)
    values = keys if draft.coin(0.7) or not second else "y"

    def linear(size: int) -> str:
        return draft.module(f"nn.Linear({WIDTH}, {size})")

    draft("def heads(z):", "    return z.unflatten(-1, (2, 16)).transpose(1, 2)")
    if keys == "y" and draft.coin():
        draft(f"q, k, v = {linear(3 * WIDTH)}(y).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)")
    else:
        draft(f"k, v = heads({linear(WIDTH)}({keys})), heads({linear(WIDTH)}({values}))", f"q = heads({linear(WIDTH)}(y))")
    if draft.coin(0.3) and not text:
        _rotary(draft, draft.size("N"))
    draft("o = F.scaled_dot_product_attention(q, k, v)")
    if draft.coin(0.15) and not second:
        draft("y = y + o.transpose(1, 2).flatten(2)")
        if draft.lie(0.5):
            turns = ["y = y.flip(1)", "y = torch.cat([y[:, 1:], y[:, :1]], 1)", "y.copy_(y.flip(1).clone())"]
            draft(draft.rng.choice(turns))
        draft(f"q, k, v = {linear(3 * WIDTH)}(y).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)")
        draft("o = F.scaled_dot_product_attention(q, k, v)")
    draft("return o")
    return given
