"""The emoji model: its stages, its command, what a resumed run gives, and what the judge and the protocol measure.

The font is a subset of Noto Color Emoji that lies beside this file, so that nothing has to be installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accel.cli import main
from accel.distill.emoji import stages
from accel.distill.emoji import train as train_emoji
from accel.distill.evaluation import emoji as emoji_quality
from accel.distill.evaluation.evaluate import evaluate
from accel.distill.from_nothing import fit
from accel.distill.from_nothing.tokenizer import write_tokenizer
from accel.distill.sources import emoji
from accel.errors import UserError

FONT = Path(__file__).with_name("NotoColorEmoji-subset.ttf")
TINY = stages.EmojiSettings(
    steps=2,
    batch=2,
    text_steps=2,
    text_subjects=2,
    vae_steps=2,
    vae_batch=2,
    judge_steps=2,
    judge_subjects=2,
    precision="bf16",  # as it is on processors with AMX
)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """A sixth of the rows: encoding all of them would take most of a test's time."""
    monkeypatch.setattr(emoji, "PARTS", {"train": 4, "judge": 4, "held-out": 2, "prompts": 1})
    monkeypatch.setattr(stages, "SHEET_PROMPTS", ("a red heart",))


def _train(folder, hours=0.0):
    return train_emoji.train(TINY, folder, every=1, hours=hours, font=FONT)


def _weights(pipeline, judge):
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.vae, judge.model)
    return [tensor for part in parts for tensor in part.state_dict().values()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the command writes, trained for two steps a stage."""
    folder = tmp_path_factory.mktemp("emoji")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "PARTS", {"train": 4, "judge": 4, "held-out": 2, "prompts": 1})
        patch.setattr(stages, "SHEET_PROMPTS", ("a red heart",))
        places = ["--out", str(folder / "out"), "--run", str(folder / "run"), "--font", str(FONT)]
        sizes = "--guidance 2 --choose 2 --images 4 --sample-steps 2 --threads 1".split()
        assert train_emoji.main([*places, *options, *sizes]) == 0
    return folder


# ------------------------------------------------------------------------------------------------------------ stages


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole = _train(tmp_path / "whole")
    save_checkpoint = fit.save_checkpoint

    def die_in_the_unet(path, state):
        save_checkpoint(path, state)
        if path.stem == "unet" and state["step"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit, "save_checkpoint", die_in_the_unet)
        _train(tmp_path / "killed")
    resumed = _train(tmp_path / "killed")
    for one, other in zip(_weights(*whole[:2]), _weights(*resumed[:2]), strict=True):
        assert torch.equal(one, other)
    assert whole[0].vae.config.scaling_factor == resumed[0].vae.config.scaling_factor


def test_the_batches_of_the_image_text_model_hold_two_different_rows_of_each_family():
    data = emoji.dataset("train", FONT)
    keys = data.rows.glyph * len(emoji.COLOURS) + data.rows.colour
    families = stages.members(data)
    rows = stages.pairs_of_families(families, keys, 5, torch.Generator().manual_seed(0)).view(5, 2)
    names = [[data.glyphs[int(data.rows.glyph[row])].family for row in pair] for pair in rows]
    assert all(one == other for one, other in names) and len({one for one, _ in names}) == 5
    assert (keys[rows[:, 0]] != keys[rows[:, 1]]).all()


def test_the_image_text_model_learns_which_caption_belongs_to_which_image(tmp_path):
    data = emoji.dataset("train", FONT)
    tokenizer = write_tokenizer(tmp_path / "tokenizer", emoji.words(data.glyphs))
    torch.manual_seed(0)
    model = emoji_quality.ImageText(stages.text_encoder(emoji_quality.JUDGE_TEXT, tokenizer))
    families, keys = stages.members(data), data.rows.glyph * len(emoji.COLOURS) + data.rows.colour

    def contrast(generator):
        rows = stages.pairs_of_families(families, keys, 6, generator)
        tokens = stages.caption_ids(data, tokenizer, rows, generator, emoji_quality.LENGTH)
        return emoji_quality.contrastive_loss(model, data.images(rows), tokens)

    with torch.no_grad():
        before = contrast(torch.Generator().manual_seed(5)).item()
    stage = fit.Stage(name="judge", steps=25, batch=6, learning_rate=1e-3, run=tmp_path, every=100, ema=0.8, seed=0)
    fit.fit(stage, model, contrast)
    with torch.no_grad():
        assert contrast(torch.Generator().manual_seed(5)).item() < 0.85 * before


def test_the_vae_loss_sees_outlines_that_a_mean_error_does_not():
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:] = 1.0
    blurred = image.clone()
    blurred[..., 3], blurred[..., 4] = 0.25, 0.75  # 0.0625 of mean absolute error, on the outline
    flat = image + 0.0625

    class Same(torch.nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def encode(self, images):
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            posterior = DiagonalGaussianDistribution(torch.zeros(1, 8, 2, 2))
            return type("Encoded", (), dict(latent_dist=posterior))

        def decode(self, latents):
            return type("Decoded", (), dict(sample=self.answer))

    losses = [stages.vae_loss(Same(made), image, torch.Generator()).item() for made in (image, flat, blurred)]
    assert losses[0] == 0 and losses[1] == pytest.approx(0.0625 + 4 * 0.0625**2) and losses[2] > 1.5 * losses[1]


# ----------------------------------------------------------------------------------------------------------- command


def test_the_command_writes_a_pipeline_a_judge_and_a_card(made):
    teacher = made / "out" / "teacher"
    quality = json.loads((teacher / "quality.json").read_text())
    assert quality["images"] == 4 and quality["guidance"] == 2 and quality["steps"]["unet"] == 2
    assert json.loads((teacher / "sampler.json").read_text()) == {"name": "dpmpp_2m", "steps": 2, "guidance": 2}
    card = (teacher / "README.md").read_text()
    assert f"{quality['frechet_distance']:.3f}" in card and f"{quality['parameters']['unet']:,}" in card
    assert (made / "run" / "sheet.png").is_file()
    assert {path.suffix for path in teacher.rglob("*.*")} <= {".json", ".txt", ".md", ".safetensors"}, "no pickle"


def test_a_missing_font_is_an_error_that_says_what_to_install(tmp_path, capsys):
    assert train_emoji.main(["--run", str(tmp_path), "--font", str(tmp_path / "none.ttf")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "no such font" in said and "apt-get install fonts-noto-color-emoji" in said


def test_a_run_does_not_go_on_with_other_drawings(made, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "MIRRORED", 0.5)
    run = ["--run", str(made / "run"), "--out", str(made / "other"), "--font", str(FONT)]
    assert train_emoji.main(run) == 1
    assert "begun with other drawings" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_the_protocol_measures_with_the_judge_that_is_named(made, tmp_path, capsys):
    judge = made / "out" / "judge"
    fast = dict(reference=judge, limit=4, steps=2, batch=2)
    result = evaluate(made / "out" / "teacher", "emoji", tmp_path / "out", **fast)
    names = {figure["name"]: figure for figure in result["figures"]}
    assert result["reference"]["kind"] == "judge of emoji" and len(result["reference"]["sha256"]) == 64
    assert 0 <= names["prompt accuracy"]["value"] <= 1 and "real" in names["background accuracy"]
    stored = json.loads((made / "out" / "teacher" / "quality.json").read_text())
    assert names["prompt accuracy"]["value"] == stored["prompt_accuracy"], "the same images as the card's"
    assert names["Frechet distance"]["value"] == pytest.approx(stored["frechet_distance"], rel=0.05)
    with pytest.raises(UserError, match="prompts, and emoji has 500 images"):
        evaluate(made / "out" / "teacher", "emoji", tmp_path / "all", reference=judge)
    arguments = ["evaluate", "digits", "--protocol", "emoji", "--out", str(tmp_path / "none")]
    assert main([*arguments, "--reference", str(tmp_path)]) != 0
    assert "holds no judge of emoji" in capsys.readouterr().err
