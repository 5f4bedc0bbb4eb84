# SPDX-License-Identifier: Apache-2.0
"""From `y` to tokens, text and attention."""

from __future__ import annotations

from orders.draft import TEXT, WIDTH, Draft


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
        draft("y = torch.cat([r, y.flatten(2, 3)], 2).flatten(1, 2)")
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
        others = [
            "y.flip(0)",
            "y.roll(1, 0)",
            "y[list(range(len(y)))[::-1]]",
            "y.flip(1)",
            "torch.stack(y.unbind(0)[::-1])",
        ]
        others += ["torch.cat([y[1:], y[:1]])", "y.roll(1, 1)", "torch.cat([y[:, 1:], y[:, :1]], 1)"]
        keys = draft.rng.choice(others)
    values = keys if draft.coin(0.7) or not second else "y"

    def linear(size: int) -> str:
        return draft.module(f"nn.Linear({WIDTH}, {size})")

    draft("def heads(z):", "    return z.unflatten(-1, (2, 16)).transpose(1, 2)")
    if keys == "y" and draft.coin():
        draft(f"q, k, v = {linear(3 * WIDTH)}(y).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)")
    else:
        draft(
            f"k, v = heads({linear(WIDTH)}({keys})), heads({linear(WIDTH)}({values}))", f"q = heads({linear(WIDTH)}(y))"
        )
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
