# SPDX-License-Identifier: Apache-2.0
"""From a video, from images or from tokens to `y`: one dim each for samples, frames, rows, columns and features."""

from __future__ import annotations

from collections.abc import Callable

from orders.disturbance import Source
from orders.draft import WIDTH, Draft

Start = Callable[[Draft], tuple[tuple[int, ...], Source]]
STARTS: list[tuple[float, Start]] = []


def start(weight: float) -> Callable[[Start], Start]:
    def add(function: Start) -> Start:
        STARTS.append((weight, function))
        return function

    return add


def _video(draft: Draft, dims: str, patch: tuple[int, int, int]) -> tuple[tuple[int, ...], Source]:
    """Shape and dims of a latent."""
    sizes = {
        "B": ("sample", draft.size("B")),
        "C": ("", 4),
        "T": ("frame", draft.size("T") * patch[0]),
        "H": ("row", draft.size("H") * patch[1]),
        "W": ("col", draft.size("W") * patch[2]),
    }
    named = tuple(sizes[label] for label in dims)
    return tuple(size for _, size in named), Source(named)


def _patch(draft: Draft, time: bool = True) -> tuple[int, int, int]:
    return draft.rng.choice([(1, 1, 1), (1, 1, 1), (1, 2, 2), (1, 1, 2), (2, 1, 1) if time else (1, 2, 1)])


@start(4)
def conv3d(draft: Draft) -> tuple[tuple[int, ...], Source]:
    patch = _patch(draft)
    dims = draft.rng.choice(["BCTHW", "BCTHW", "BTCHW"])
    shape = _video(draft, dims, patch)
    conv = draft.module(f"nn.Conv3d(4, {WIDTH}, {patch}, {patch})")
    draft(f"y = {conv}(x)" if dims == "BCTHW" else f"y = {conv}(x.transpose(1, 2))")
    draft.dims = "BDTHW"
    return shape


@start(3)
def conv2d_over_frames(draft: Draft) -> tuple[tuple[int, ...], Source]:
    patch = _patch(draft, time=False)
    dims = draft.rng.choice(["BCTHW", "BTCHW"])
    shape = _video(draft, dims, patch)
    conv = draft.module(f"nn.Conv2d(4, {WIDTH}, {patch[1:]}, {patch[1:]})")
    if dims == "BCTHW":
        draft("x = x.transpose(1, 2)")
    b, t = draft.shape("BT")
    draft(f"y = {conv}(x.flatten(0, 1)).unflatten(0, ({b}, {t}))")
    draft.dims = "BTDHW"
    return shape


@start(3)
def conv2d_of_each_frame(draft: Draft) -> tuple[tuple[int, ...], Source]:
    patch = _patch(draft, time=False)
    dims = draft.rng.choice(["BCTHW", "BTCHW"])
    shape = _video(draft, dims, patch)
    conv = draft.module(f"nn.Conv2d(4, {WIDTH}, {patch[1:]}, {patch[1:]})")
    frames, place = draft.order(draft.size("T")), draft.rng.choice([1, 2])
    look = draft.rng.choice(["x[:, :, i]", "x.select(2, i)"] if dims == "BCTHW" else ["x[:, i]", "x.select(1, i)"])
    if draft.coin():
        draft(f"y = torch.stack([{conv}({look}) for i in {frames}], {place})")
    else:
        draft("frames = []", f"for i in {frames}:", f"    frames.append({conv}({look}).unsqueeze({place}))")
        draft(f"y = torch.cat(frames, {place})")
    draft.dims = "BTDHW" if place == 1 else "BDTHW"
    return shape


@start(2)
def conv2d_along_time(draft: Draft) -> tuple[tuple[int, ...], Source]:
    """A convolution over frames and columns of every row, or over frames and rows of every column."""
    shape = _video(draft, "BCTHW", (1, 1, 1))
    conv = draft.module(f"nn.Conv2d(4, {WIDTH}, 1)")
    draft.plain = False
    b, h, w = draft.shape("BHW")
    if draft.coin():
        draft(f"y = {conv}(x.permute(0, 3, 1, 2, 4).flatten(0, 1)).unflatten(0, ({b}, {h}))")
        draft.dims = "BHDTW"
    else:
        draft(f"y = {conv}(x.permute(0, 4, 1, 2, 3).flatten(0, 1)).unflatten(0, ({b}, {w}))")
        draft.dims = "BWDTH"
    return shape


@start(3)
def linear_of_patches(draft: Draft) -> tuple[tuple[int, ...], Source]:
    patch = _patch(draft)
    dims = draft.rng.choice(["BCTHW", "BTCHW", "BTHWC"])
    shape = _video(draft, dims, patch)
    (a, b, c), (t, h, w) = patch, draft.shape("THW")
    linear = draft.module(f"nn.Linear({4 * a * b * c}, {WIDTH})")
    if patch == (1, 1, 1):
        moved = {"BCTHW": ".permute(0, 2, 3, 4, 1)", "BTCHW": ".permute(0, 1, 3, 4, 2)", "BTHWC": ""}[dims]
        draft(f"y = {linear}(x{moved})")
    else:
        split = {"B": [draft.size("B")], "C": [4], "T": [t, a], "H": [h, b], "W": [w, c]}
        names = [name for label in dims for name in (label, label.lower())[: len(split[label])]]
        places = [names.index(name) for name in "BTHWCthw"]
        view = ", ".join(str(size) for label in dims for size in split[label])
        draft(f"y = {linear}(x.reshape({view}).permute({', '.join(map(str, places))}).flatten(4))")
    draft.dims = "BTHWD"
    return shape


@start(2)
def tokens(draft: Draft) -> tuple[tuple[int, ...], Source]:
    """Tokens as they come; a mesh or tables may say over what they run: by convention frames, rows, columns."""
    b, t, h, w = draft.shape("BTHW")
    dims = (("sample", b), ("frame", t), ("row", h), ("col", w), ("", 4))
    draft.plain = False
    draft(f"y = {draft.module(f'nn.Linear(4, {WIDTH})')}(x)")
    draft.dims = "BND"
    draft.sizes["N"] = t * h * w
    kind = draft.rng.randrange(5)
    if kind < 2:
        arguments = ", ".join(f"torch.arange({n})" for n in (t, h, w))
        mesh = f"torch.stack(torch.meshgrid({arguments}, indexing='ij'), -1)"
        if draft.lie():  # tokens stand in another order than the mesh names its axes in
            order = draft.rng.sample([0, 1, 2], 3)
            dims = (dims[0], *(dims[1 + place] for place in order), dims[4])
            mesh += f".permute({', '.join(map(str, order))}, 3)"
            draft.sizes.update(zip("THW", (dims[1 + place][1] for place in range(3)), strict=True))
            t, h, w = draft.shape("THW")
        elif draft.coin(0.3):
            mesh = f"torch.cartesian_prod({arguments})"
        draft(f"mesh = {mesh}.reshape(-1, 3).to(y)")
        draft(f"y = y + {draft.module(f'nn.Linear(3, {WIDTH})')}(mesh)")
    elif kind == 2:
        draft(f"y = y + {draft.parameter(1, t, h, w, WIDTH)}.flatten(1, 3)")
    elif kind == 3:
        a, b_, c = (draft.parameter(*s, WIDTH) for s in ((t, 1, 1), (1, h, 1), (1, 1, w)))
        draft(f"y = y + ({a} + {b_} + {c}).flatten(0, 2)")
    if draft.coin():
        draft(f"y = y.unflatten(1, ({t}, {h}, {w}))")
        draft.dims = "BTHWD"
    return (b, t * h * w, 4), Source(dims)


@start(2)
def images(draft: Draft) -> tuple[tuple[int, ...], Source]:
    """No frames at all."""
    b, h, w = draft.shape("BHW")
    patch = draft.rng.choice([1, 1, 2])
    if draft.coin(0.7):
        conv = draft.module(f"nn.Conv2d(4, {WIDTH}, {patch}, {patch})")
        draft(f"y = {conv}(x)")
        draft.dims = "BDHW"
    else:
        patch, draft.plain = 1, False
        draft(f"y = {draft.module(f'nn.Linear(4, {WIDTH})')}(x.permute(0, 2, 3, 1))")
        draft.dims = "BHWD"
    draft.sizes["T"] = 1
    dims = (("sample", b), ("", 4), ("row", h * patch), ("col", w * patch))
    return (b, 4, h * patch, w * patch), Source(dims)
