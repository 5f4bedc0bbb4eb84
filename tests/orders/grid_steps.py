# SPDX-License-Identifier: Apache-2.0
"""What drawn models do to several axes or to all tokens: views, convolutions, unknown operators, writes, positions."""

from __future__ import annotations

from orders.draft import WIDTH, Draft, at, step


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
        draft("y = F.pixel_shuffle(F.pixel_unshuffle(y.contiguous(), 2), 2)")  # it refuses channels-last videos
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
        spelled.append(
            f"s = y[{at(a, str(i))}].clone()\ny[{at(a, str(i))}] = y[{at(a, str(j))}]\ny[{at(a, str(j))}] = s"
        )
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
