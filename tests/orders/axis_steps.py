# SPDX-License-Identifier: Apache-2.0
"""What drawn models do to one axis: put it in an order, which is its own or another."""

from __future__ import annotations

from orders.draft import Draft, at, step


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
    changes = [
        "parts.reverse()",
        "parts.insert(0, parts.pop())",
        f"parts[0], parts[{n - 1}] = parts[{n - 1}], parts[0]",
    ]
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


@step(grid=4)
def slots_of_two(draft: Draft) -> None:
    """The same through views that index two dims, one of which may be the batch."""
    a = draft.axis()
    b = draft.rng.choice([i for i, label in enumerate(draft.dims) if label in "BTHW" and i != a])
    n, m = draft.size(draft.dims[a]), draft.size(draft.dims[b])
    order = draft.order(n)
    low, high = min(a, b), max(a, b)

    def views(tensor: str, i: str) -> list[str]:
        index = at(a, i).split(", ")
        index += [":"] * (b + 1 - len(index))
        index[b] = "k"
        first, second = (i, "k") if a == low else ("k", i)
        both = ", ".join(index)
        return [
            f"{tensor}[{both}]",
            f"{tensor}.select({high}, {second}).select({low}, {first})",
            f"{tensor}.narrow({a}, {i}, 1).narrow({b}, k, 1)",
            f"{tensor}.narrow({b}, k, 1).select({a}, {i})",
        ]

    number = draft.rng.randrange(4)
    to, source = views("z", "i")[number], views("y", "j")[number]
    write = draft.rng.choice(["{}.copy_({})", "{}.mul_(0).add_({})", "{}.lerp_({}, 1.0)", "{}[...] = {}"])
    loops = [f"for i, j in enumerate({order}):", f"    for k in range({m}):", f"        {write.format(to, source)}"]
    into = draft.rng.choice(["y.clone()", "y.clone()", "torch.zeros_like(y)"])
    draft(f"z = {into}", *loops, "y = z")


@step(grid=3)
def paired(draft: Draft) -> None:
    """Operators that take one slice and another; and writes by masks over all dims but one, or all."""
    draft.plain = False
    a = draft.axis()
    n = draft.size(draft.dims[a])
    order = draft.order(n)
    turned_ = draft.rng.choice([f"y.flip({a})", f"y.roll(1, {a})"]) if draft.lie(0.7) else "(y * 2)"
    last = len(draft.dims) - 1
    loop = f"for i, j in enumerate({order}):"
    slot, other = f".narrow({a}, i, 1)", f"y.narrow({a}, j, 1)"
    spelled = [
        f"z = y.clone()\n{loop}\n    z{slot}.lerp_({other}, 1.0)\ny = z",
        f"z = y.clone()\n{loop}\n    z{slot}.mul_(0.0).add_({other})\ny = z",
        f"y = torch.cat([torch.lerp(y{slot}, {other}, 1.0) for i, j in enumerate({order})], {a})",
        f"y = torch.cat([torch.where(torch.ones_like(y{slot}).bool(), {other}, y{slot})"
        f" for i, j in enumerate({order})], {a})",
        f"y = y.index_put((torch.ones(y.shape[:-1]).bool(),), {turned_}.flatten(0, {last - 1}))",
        f"y = y.masked_scatter(torch.ones_like(y).bool(), {turned_})",
        f"y = torch.where(torch.ones(y.shape).bool(), {turned_}, y)",
    ]
    draft(*draft.rng.choice(spelled).split("\n"))


@step(grid=2)
def added_up(draft: Draft) -> None:
    """Slices that numbers put in places, into nothing or over all the others."""
    draft.plain = False
    a = draft.axis()
    n = draft.size(draft.dims[a])
    shape = ", ".join("-1" if dim == a else "1" for dim in range(len(draft.dims)))
    eye = f"torch.eye({n})"
    made = draft.rng.choice([str, draft.constant, lambda made: draft.module(f"nn.Parameter({made})")])(eye)
    places, mask = f"{made}[i].view({shape}).to(y)", f"{eye}[j].view({shape}).to(y)"
    other = draft.rng.choice(
        [f"y.narrow({a}, j, 1)"] * 4
        + [
            f"({mask} * y).sum({a}, keepdim=True)",
            f"(y - 100 * (1 - {mask})).amax({a}, keepdim=True)",
            f"y.index_select({a}, torch.tensor([j]))",
            f"y.roll(-j, {a}).narrow({a}, 0, 1)",
            f"({eye}[j:j + 1].to(y) @ y.movedim({a}, -2)).movedim(-2, {a})",
            f"y.flatten().view(y.shape).narrow({a}, j, 1)",
        ]
    )
    if draft.rng.random() < 0.3:
        other = f"({other}).flatten().view(y.narrow({a}, 0, 1).shape)"
    chosen = f"torch.where(torch.arange({n}).view({shape}) == i, {other}, z)"
    change = draft.rng.choice(
        [
            f"z = z + {places} * {other}",
            f"z = z + {places} * {other}.expand(y.shape)",
            f"z.addcmul_({places}, {other})",
            f"z = {chosen}",
            f"z = z.lerp({other}, {places})",
            f"z = z * (1 - {places}) + {places} * {other}",
        ]
    )
    replaces = any(word in change for word in ("where", "lerp", "1 -"))
    into = ["torch.zeros_like(y)", "y.new_zeros(y.shape)", "y * 0", "y.clone().zero_()"] + ["y.clone()"] * 2 * replaces
    flat = draft.rng.choice(["z"] * 3 + ["z.flatten().view(z.shape)"])
    draft(f"z = {draft.rng.choice(into)}", f"for i, j in enumerate({draft.order(n)}):", f"    {change}", f"y = {flat}")


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
        f"y = torch.stack([y.select({a}, i) for i in {order}], {a}) + 0"
        if n < 8
        else f"y = y.index_select({a}, {index})",
    ]
    draft(*draft.rng.choice(spelled).split("\n"))


@step(grid=2, tokens=1)
def turned(draft: Draft) -> None:
    """flip, roll; or both ways."""
    a = draft.axis()
    n = draft.size(draft.dims[a])
    if draft.lie(0.7):
        draft.rng.shuffle(
            spelled := [f"y = y.flip({a})", f"y = torch.roll(y, 1, {a})", f"y = y.roll(shifts={n // 2}, dims={a})"]
        )
        draft(spelled[0])
    else:
        spelled = [
            f"y = y.flip({a}).flip({a})",
            f"y = y.roll(1, {a}).roll(-1, {a})",
            "y = y.clone()",
            f"y = y.roll({n}, {a})",
        ]
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
