# SPDX-License-Identifier: Apache-2.0
"""The scene model's files: safetensors of at most 16 MiB each.

The weights that ship are 8-bit: a large matrix is int8 with a float16 scale for each row, the rest float16. All that is
measured is measured on the model as it loads from these files, so rounding is part of the model and of no result.
A checkpoint to train on from holds the weights in float16 besides, without the optimiser's state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality.scenes.model import CONFIG, build_model

FOLDER = Path(__file__).parent / "weights"  # of the model that is measured
FILE_BYTES = 16 * 2**20 - 2**16  # room for the header
LARGE = 2**16  # elements from which on a matrix is stored in 8 bits
SCALE = ".row_scale"


def save_model(model: HunyuanVideoTransformer3DModel, folder: Path) -> None:
    """Write config.json and weights-<number>.safetensors, in 8 bits."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: model.config[name] for name in CONFIG}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    _write(rounded(model.state_dict()), folder, "weights")


def load_model(folder: Path) -> HunyuanVideoTransformer3DModel:
    """The model that `save_model` wrote, float32 on the CPU.

    Raises:
        FileNotFoundError: `folder` holds no model.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model in {folder}: train one with benchmarks/quality/train_scenes.py")
    model = build_model(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(restored(_read(folder, "weights")))
    return model.eval()


def save_checkpoint(model: HunyuanVideoTransformer3DModel, folder: Path) -> None:
    """Write the weights as they are trained, checkpoint-<number>.safetensors, in float16."""
    _write({name: weight.half() for name, weight in model.state_dict().items()}, folder, "checkpoint")


def load_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The state that `save_checkpoint` wrote, float32.

    Raises:
        FileNotFoundError: `folder` holds no checkpoint.
    """
    return {name: weight.float() for name, weight in _read(folder, "checkpoint").items()}


def rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state as it is stored: int8 and float16."""
    stored = {}
    for name, weight in state.items():
        if weight.ndim != 2 or weight.numel() < LARGE:
            stored[name] = weight.half()
            continue
        scale = (weight.abs().amax(1, keepdim=True) / 127).half().clamp_min(torch.finfo(torch.float16).tiny)
        stored[name] = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
        stored[name + SCALE] = scale
    return stored


def restored(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `rounded` made, as float32."""
    return {
        name: weight.float() * stored[name + SCALE].float() if name + SCALE in stored else weight.float()
        for name, weight in stored.items()
        if not name.endswith(SCALE)
    }


def _write(state: dict[str, Tensor], folder: Path, stem: str) -> None:
    for old in folder.glob(f"{stem}-*.safetensors"):
        old.unlink()
    for number, part in enumerate(_parts(state), 1):
        save_file(part, folder / f"{stem}-{number}.safetensors")


def _parts(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, weight in state.items():
        if part and size + weight.nbytes > FILE_BYTES:
            yield part
            part, size = {}, 0
        part[name] = weight.contiguous().cpu()
        size += weight.nbytes
    yield part


def _read(folder: Path, stem: str) -> dict[str, Tensor]:
    files = sorted(folder.glob(f"{stem}-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no {stem}-<number>.safetensors in {folder}")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    return state
