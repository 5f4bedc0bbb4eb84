# SPDX-License-Identifier: Apache-2.0
"""The scene model: clips and captions, files, a training that stops and goes on, and the quality bench on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from benchmarks.quality import subjects, train_scenes, video_quality  # isort: skip  # names the folder of the examples
from procedural_video import Clips, labels_from

from benchmarks.quality.rules import BlockMeans, Heaviest
from benchmarks.quality.scenes import captions, model, weights
from benchmarks.quality.scenes.clips import make_scenes

TINY = train_scenes.SCALES["tiny"][0]


def scenes(batch: int = 3, size: tuple[int, int, int] = (3, 24, 32), seed: int = 0, labels: Any = None) -> Clips:
    return make_scenes(batch, *size, generator=torch.Generator().manual_seed(seed), labels=labels)


def scene(**changes: str) -> Tensor:
    """Labels of one scene; slots as keywords, with _ for a space."""
    said = {slot: values[0] for slot, values in captions.SLOTS.items()}
    return labels_from(said | {slot.replace("_", " "): word for slot, word in changes.items()}, captions.SLOTS)


def tiny_model() -> Any:
    """With weights that let everything reach the output, unlike those that training begins with."""
    torch.manual_seed(0)
    made = model.build_model(**TINY)
    for weight in made.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05)
    return made.eval()


def test_a_seed_gives_the_same_scenes_again() -> None:
    one, again, other = scenes(seed=3), scenes(seed=3), scenes(seed=4)
    assert torch.equal(one.video, again.video)
    assert torch.equal(one.caption, again.caption)
    assert not torch.equal(one.video, other.video)
    assert one.video.shape == (3, 3, 3, 24, 32)
    assert one.caption.shape == (3, captions.CAPTION_TOKENS, captions.TEXT_DIM)
    assert one.video.abs().max() <= 1
    assert one.video.std() > 0.1


def test_every_slot_of_an_object_that_is_there_changes_the_caption() -> None:
    base = scene(count="four")
    for place, (slot, values) in enumerate(captions.SLOTS.items()):
        changed = scene(**{"count": "four"} | {slot.replace(" ", "_"): values[-1]})
        if slot != "count":
            differs = (captions.embed(base) != captions.embed(changed)).any(-1)[0]
            assert differs.nonzero().flatten().tolist() == [place]


def test_the_caption_of_an_absent_object_says_nothing() -> None:
    labels = scene(count="three", shape_4="cross", colour_4="blue")
    said = [captions.WORDS[i] for i in captions.words(labels)[0]]
    assert said.count(captions.NOTHING) == len(captions.OBJECT)
    assert torch.equal(captions.embed(labels), captions.embed(scene(count="three", shape_4="ring")))
    assert "cross" not in captions.describe(labels[0])
    video = scenes(1, labels=labels).video
    assert torch.equal(video, scenes(1, labels=scene(count="three", colour_4="red", shape_4="ring")).video)


def test_the_first_object_hides_the_others() -> None:
    shapes = {f"{what}_{n}": word for n in range(1, 5) for what, word in (("shape", "circle"), ("size", "large"))}

    def drawn(count: str, first: str, others: str) -> Tensor:
        colours = {"colour_1": first} | {f"colour_{n}": others for n in (2, 3, 4)}
        return scenes(1, (8, 48, 48), seed=5, labels=scene(count=count, **shapes, **colours)).video[0, 0]

    # How much redder pixels are if these objects are: more than half of what it can be, so not both at one pixel.
    first = (drawn("four", "red", "blue") - drawn("four", "blue", "blue")).abs() > 1.1
    others = (drawn("four", "red", "red") - drawn("four", "red", "blue")).abs() > 1.1
    assert first.sum() > 100
    assert others.sum() > 100
    assert not (first & others).any()
    alone = (drawn("two", "red", "blue") - drawn("two", "blue", "blue")).abs() > 1.1
    assert torch.equal(first, alone)


def test_wrong_scenes_are_named() -> None:
    with pytest.raises(ValueError, match="positive"):
        scenes(0)
    with pytest.raises(ValueError, match=r"labels must be \[3, 32\], got \[1, 32\]"):
        scenes(3, labels=scene())


def test_the_scene_model_is_as_large_as_promised_and_its_files_as_small() -> None:
    made = model.build_model()
    assert sum(weight.numel() for weight in made.parameters()) > 20e6
    stored = weights.rounded(made.state_dict())
    assert sum(part.nbytes for part in stored.values()) < 24 * 2**20


def test_an_attention_without_mask_is_the_class_own() -> None:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

    made = tiny_model()
    clips = scenes(2, (2, 16, 16))
    inputs = (clips.video, torch.tensor([300.0, 900.0]), clips.caption)
    without = model.velocity_of(made)(*inputs)[0]
    for block in (*made.transformer_blocks, *made.single_transformer_blocks):
        block.attn.set_processor(HunyuanVideoAttnProcessor2_0())
    torch.testing.assert_close(model.velocity_of(made)(*inputs)[0], without)
    other = model.velocity_of(made)(*inputs[:2], clips.caption.flip(0))[0]
    assert not torch.allclose(other, without)


def test_the_files_hold_the_model_within_its_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FILE_BYTES", 100_000)
    monkeypatch.setattr(weights, "LARGE", 2**12)
    made = tiny_model()
    weights.save_model(made, tmp_path)
    weights.save_checkpoint(made, tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 4
    assert max(file.stat().st_size for file in files) < 120_000
    shipped, trained = weights.load_model(tmp_path).state_dict(), weights.load_checkpoint(tmp_path)
    assert shipped.keys() == trained.keys() == made.state_dict().keys()
    coarse = 0
    for name, weight in made.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-3, atol=1e-7)
        step = weight.abs().amax(-1, keepdim=True) / 127 if weight.ndim == 2 else weight.abs() * 1e-3
        assert ((shipped[name] - weight).abs() <= 0.52 * step + 1e-7).all()
        coarse += not torch.equal(shipped[name], trained[name])
    assert coarse > 5
    weights.save_model(weights.load_model(tmp_path), tmp_path / "again")
    for name, weight in weights.load_model(tmp_path / "again").state_dict().items():
        torch.testing.assert_close(weight, shipped[name], rtol=2e-3, atol=1e-6)
    with pytest.raises(FileNotFoundError, match="no model in"):
        weights.load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no checkpoint-<number>"):
        weights.load_checkpoint(tmp_path / "again")


def trained(out: Path, arguments: str) -> dict[str, Any]:
    always = ["--scale", "tiny", "--device", "cpu", "--sheet-steps", "2", "--out", str(out)]
    return train_scenes.train(train_scenes.parse([*arguments.split(), *always]))


def test_training_learns_stops_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    arguments = "--lr 4e-3 --warmup 5 --log-every 10 --validate-seconds 0 --save-seconds 0"
    log = trained(tmp_path / "one", f"--steps 60 {arguments}")
    losses = [entry[2] for entry in log["curve"]]
    assert losses[-1] < 0.6 * losses[0]
    assert [stage["frames"] for stage in log["sessions"][0]["stages"]] == [2, 4]
    assert json.loads((tmp_path / "one" / "training_log.json").read_text()) == json.loads(json.dumps(log))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "checkpoint-1.safetensors", "config.json", "sheet.png", "training_log.json", "weights-1.safetensors",
    ]  # fmt: skip

    args = train_scenes.parse(["--steps", "1", "--out", str(tmp_path), "--resume", str(tmp_path / "one"),
                               "--scale", "tiny", "--device", "cpu"])  # fmt: skip
    training, _, stages = train_scenes.start(args)
    assert training.steps == 60
    assert [stage.frames for stage in stages] == [4]
    for name, weight in weights.load_checkpoint(tmp_path / "one").items():
        assert torch.equal(training.model.state_dict()[name], weight)
        assert torch.equal(training.average.state_dict()[name], weight), "the average begins anew"

    more = trained(tmp_path / "two", f"--steps 12 {arguments.replace('4e-3', '1e-4')} --resume {tmp_path / 'one'}")
    assert more["steps"] == 72
    assert len(more["sessions"]) == 2
    assert more["curve"][: len(log["curve"])] == log["curve"]
    assert more["curve"][-1][1] > log["curve"][-1][1]
    assert more["validation"][-1][2] == pytest.approx(log["validation"][-1][2], rel=0.05)


def test_training_keeps_to_its_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_scenes, "LAST_SECONDS", 1.0)
    log = trained(tmp_path, "--minutes 0.1 --log-every 5")
    assert log["steps"] > 5
    assert log["seconds"] < 8
    assert log["curve"][-1][0] == log["steps"]


def test_bad_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ("--steps 0", "--steps must be positive; got 0"),
        ("--minutes 0.1", "--minutes must be more than 0.33; got 0.1"),
        ("--steps 1 --small-share 1", "--small-share must be in [0, 1); got 1.0"),
    ):
        with pytest.raises(SystemExit):
            train_scenes.parse([*arguments.split(), "--out", "nowhere"])
        assert said in capsys.readouterr().err


@pytest.fixture
def subject(tmp_path: Path) -> subjects.Subject:
    weights.save_model(tiny_model(), tmp_path)
    return subjects.scenes(2, torch.device("cpu"), torch.float32, tmp_path, (4, 32, 64))


@torch.no_grad()
def test_the_quality_bench_measures_the_scene_model(subject: subjects.Subject) -> None:
    assert subject.layout.tokens == 4 * 8 * 16 + captions.CAPTION_TOKENS
    bench = video_quality.Bench(subject, 2)
    families = {family: make for family, _, make, _ in video_quality.RUNS}
    for family, make in families.items():
        facts = bench.run(make, 1)
        assert 0.5 < facts["density"] <= 1, family  # half of the steps are dense
        assert facts["psnr_db"] > 5
    exact = bench.run(video_quality.ours(error=0.0), 0)
    assert exact["density"] == 1
    assert exact["psnr_db"] > 80


def test_block_masks_with_every_block_are_dense_attention(subject: subjects.Subject) -> None:
    q, k, v = torch.randn(3, 1, 2, subject.layout.tokens, 32, generator=torch.Generator().manual_seed(0))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for rule in (BlockMeans, Heaviest):
        done = rule(subject.layout, q.device, 0.0).attend(q, k, v)
        torch.testing.assert_close(done.output, dense)
        assert done.density == 1
        assert rule(subject.layout, q.device, 0.6).attend(q, k, v).density < 0.9
