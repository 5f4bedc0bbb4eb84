# SPDX-License-Identifier: Apache-2.0
"""The examples: procedural video, the demo model's files, loss and sampler, and a training that learns."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import demo_model  # noqa: E402
import demo_pictures  # noqa: E402
import procedural_video as pv  # noqa: E402
import train_demo_model  # noqa: E402


def clips(batch: int = 4, size: tuple[int, int, int] = (5, 16, 20), seed: int = 0, **kwargs: Any) -> pv.Clips:
    return pv.make_clips(batch, *size, generator=torch.Generator().manual_seed(seed), **kwargs)


def scene(**changes: str) -> Tensor:
    """Labels of one plain scene: a red circle that goes right over a still background."""
    words = {slot: values[0] for slot, values in pv.SLOTS.items()}
    words |= {"motion 1": "right", "shape 2": "none"} | {slot.replace("_", " "): word for slot, word in changes.items()}
    return pv.labels_from(words)


def test_clips_have_the_shape_and_range_asked_for() -> None:
    made = clips(64, (3, 11, 17), text_dim=40)
    assert made.video.shape == (64, 3, 3, 11, 17)
    assert made.caption.shape == (64, pv.CAPTION_TOKENS, 40)
    assert made.video.dtype == made.caption.dtype == torch.float32
    assert made.video.isfinite().all()
    assert made.video.abs().max() <= 1
    assert made.video.std() > 0.1


def test_a_seed_gives_the_same_clips_again() -> None:
    assert torch.equal(clips(seed=3).video, clips(seed=3).video)
    assert not torch.equal(clips(seed=3).video, clips(seed=4).video)


@pytest.mark.parametrize("slot", pv.SLOTS)
def test_every_value_of_a_slot_draws_and_has_its_own_caption(slot: str) -> None:
    base = dict(zip(pv.SLOTS, (values[0] for values in pv.SLOTS.values()), strict=True))
    labels = torch.cat([pv.labels_from({**base, slot: value}) for value in pv.SLOTS[slot]])
    made = clips(len(labels), labels=labels)
    assert made.video.isfinite().all()
    captions = made.caption.flatten(1)
    assert len(captions.unique(dim=0)) == len(captions)


def test_the_caption_of_an_absent_object_says_nothing_of_it() -> None:
    one, other = scene(colour_2="red"), scene(colour_2="blue")
    assert torch.equal(pv.caption_tokens(one, 32), pv.caption_tokens(other, 32))
    assert "red circle" in pv.describe(one[0])
    assert " and " not in pv.describe(one[0])


def centre(video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean column and row [T] of what is red in one video [3, T, H, W]."""
    red = (video[0] - video[1]).clamp_min(0)
    across = torch.arange(red.shape[2]).float()
    down = torch.arange(red.shape[1]).float()
    total = red.sum((1, 2))
    return (red.sum(1) @ across) / total, (red.sum(2) @ down) / total


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_objects_move_as_the_caption_says(motion: str, axis: int, sign: int) -> None:
    video = clips(1, (5, 48, 56), labels=scene(motion_1=motion, background_colour="navy")).video[0]
    moved = centre(video)[axis].diff() * sign
    still = centre(video)[1 - axis].diff()
    assert (moved > 0.5).all()
    assert (still.abs() < 0.25).all()


def test_wrong_scenes_are_named() -> None:
    with pytest.raises(ValueError, match="cannot be 'hexagon'"):
        scene(shape_1="hexagon")
    with pytest.raises(ValueError, match="need exactly the slots"):
        pv.labels_from({"shape 1": "circle"})
    with pytest.raises(ValueError, match="at least"):
        pv.caption_tokens(scene(), pv.MIN_TEXT_DIM - 1)
    with pytest.raises(ValueError, match="positive"):
        clips(0)


def test_the_demo_model_is_small_and_fits_no_block_size() -> None:
    model = demo_model.build_model()
    assert sum(p.numel() for p in model.parameters()) * 2 < 8e6
    tokens = demo_model.FRAMES * (demo_model.HEIGHT // 2) * (demo_model.WIDTH // 2)
    assert tokens == 8736
    assert tokens % 64


SPARSE = {
    "name": "blocks.0.attn1",
    "status": "sparse",
    "patterns": [["spatial", "dense"]],
    "sparsity": [[0.6, 0.0]],
    "error": [[0.04, 0.0]],
    "layer_error": [0.03],
    "recall": [[0.97, 0.5]],
    "density": [[0.36, 1.0]],
}
CROSS = dict.fromkeys(SPARSE) | {"name": "blocks.0.attn2", "status": "dense"}


def tiny_model() -> Any:
    torch.manual_seed(0)
    return demo_model.build_model(num_attention_heads=2, attention_head_dim=16, ffn_dim=32, num_layers=1)


def test_models_survive_their_files(tmp_path: Path) -> None:
    model = tiny_model()
    demo_model.save_model(model, tmp_path)
    again = demo_model.load_model(tmp_path)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight.half().float(), rtol=0, atol=0)
    assert "_name_or_path" not in (tmp_path / "config.json").read_text()
    with pytest.raises(FileNotFoundError, match="no model"):
        demo_model.load_model(tmp_path / "nowhere")


def test_the_sampler_finds_the_video_that_the_velocity_points_to() -> None:
    """Flow matching's exact velocity towards a known clip must lead to that clip, whatever the number of steps."""
    target = clips(2).video
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))

    def velocity(mixed: Tensor, timestep: Tensor, caption: Tensor, return_dict: bool) -> tuple[Tensor]:
        level = (timestep / demo_model.TIME_SCALE).view(-1, 1, 1, 1, 1)
        return ((mixed - target) / level,)

    caption = torch.zeros(2, 1, 32)
    for steps in (1, 5):
        made = demo_model.sample_video(velocity, noise, caption, steps=steps)
        torch.testing.assert_close(made, target, atol=1e-4, rtol=0)


def test_the_exact_velocity_has_no_loss() -> None:
    video = clips(2).video
    noise = torch.randn_like(video)
    level = torch.tensor([0.2, 0.9])
    loss = demo_model.flow_matching_loss(lambda *_, **__: (noise - video,), video, video, level, noise)
    assert loss == 0


def test_validation_does_not_depend_on_the_batch() -> None:
    model, data = tiny_model(), demo_model.validation_set(6, 3, 8, 12)
    one, all_at_once = (demo_model.validation_loss(model, data, torch.device("cpu"), batch=n) for n in (1, 6))
    assert one == pytest.approx(all_at_once, rel=1e-5)


def test_training_learns_and_writes_its_files(tmp_path: Path) -> None:
    arguments = (
        "--steps 60 --scale tiny --device cpu --warmup 5 --lr 4e-3 --log-every 10 --validate-seconds 1 --preview"
    )
    log = train_demo_model.train(train_demo_model.parse([*arguments.split(), "--out", str(tmp_path)]))
    losses = [entry[2] for entry in log["curve"]]
    assert losses[-1] < 0.5 * losses[0]
    assert {stage["frames"] for stage in log["stages"]} == {3, 5}
    assert json.loads((tmp_path / "training_log.json").read_text()) == json.loads(json.dumps(log))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "preview.png",
        "training_log.json",
    ]
    arguments = "--steps 2 --scale tiny --device cpu --warmup 1 --lr 1e-5"
    more = train_demo_model.parse([*arguments.split(), "--init-from", str(tmp_path), "--out", str(tmp_path / "more")])
    continued = train_demo_model.train(more)
    assert continued["validation"][-1][2] == pytest.approx(log["validation"][-1][2], rel=0.05)


def test_training_stops_at_numbers_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = train_demo_model.flow_matching_loss
    monkeypatch.setattr(train_demo_model, "flow_matching_loss", lambda *inputs: broken(*inputs) * float("nan"))
    arguments = ["--steps", "2", "--scale", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(FloatingPointError, match="after 2 steps"):
        train_demo_model.train(train_demo_model.parse(arguments))
    assert not list(tmp_path.iterdir())


def test_pictures_are_drawn(tmp_path: Path) -> None:
    from PIL import Image

    video = clips(1, (4, 8, 10)).video[0]
    demo_pictures.save_gif({"dense": video, "sparse": video}, tmp_path / "videos.gif", zoom=2)
    with Image.open(tmp_path / "videos.gif") as gif:
        assert gif.n_frames == 4
        assert gif.size == (2 * 10 * 2 + 6, 8 * 2 + 20)
    demo_pictures.save_head_map([[SPARSE, CROSS]], tmp_path / "heads.png", "title", steps=[2])
    assert (tmp_path / "heads.png").stat().st_size > 1000


def test_the_demo_tells_and_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own part, with compilation and report replaced: dense and "sparse" are the same eager model."""

    class Report:
        def to_dict(self) -> dict[str, Any]:
            return {"attentions": [SPARSE, CROSS]}

    backends = []

    def compile_nothing(model: Any, backend: str, **_: Any) -> Any:
        backends.append(backend)
        return model

    monkeypatch.setattr(demo.torch, "compile", compile_nothing)
    monkeypatch.setattr(demo.rainfusion_compile, "observe", lambda: contextlib.nullcontext(Report()))
    for name, size in (("FRAMES", 3), ("HEIGHT", 8), ("WIDTH", 12)):
        monkeypatch.setattr(demo, name, size)
    demo_model.save_model(tiny_model(), tmp_path / "weights")
    out = tmp_path / "out"
    arguments = ["--weights", str(tmp_path / "weights"), "--out", str(out), "--steps", "3", "--dense-steps", "1"]
    result = demo.main([*arguments, "--device", "cpu", "--guidance", "2", "--random-scene"])
    assert backends == ["inductor", "rainfusion"]
    assert result["realised_density"] == pytest.approx(0.68)
    assert result["psnr_db"] is None  # the videos are the same
    assert sorted(path.name for path in out.iterdir()) == ["heads.png", "result.json", "videos.gif"]
