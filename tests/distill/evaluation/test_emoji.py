"""The judge of emoji: what it finds, and its figures of images whose quality is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accel.distill.evaluation import emoji as emoji_quality
from accel.distill.from_nothing.parts import text_encoder
from accel.distill.from_nothing.tokenizer import token_ids, write_tokenizer
from accel.distill.sources import emoji

FONT = Path(__file__).parents[1] / "emoji" / "NotoColorEmoji-subset.ttf"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A judge of random weights, as it is written, and the folder."""
    folder = tmp_path_factory.mktemp("judge")
    data = emoji.dataset("train", FONT)
    tokenizer = write_tokenizer(folder / "tokenizer", emoji.words(data.glyphs))
    torch.manual_seed(0)
    model = emoji_quality.ImageText(text_encoder(emoji_quality.JUDGE_TEXT, tokenizer))
    prompts, held_out = emoji.dataset("prompts", FONT), emoji.dataset("held-out", FONT)
    judge = emoji_quality.made_judge(model, tokenizer, prompts, held_out, data)
    emoji_quality.save_judge(judge, folder / "out", folder / "tokenizer")
    return judge, folder / "out"


def test_a_judge_is_the_same_after_it_was_written(stored):
    judge, folder = stored
    again = emoji_quality.open_judge(folder)
    assert again.prompts == judge.prompts and again.real == judge.real
    images = emoji_quality.every_image(emoji.dataset("prompts", FONT))
    wanted = range(len(images))
    assert emoji_quality.evaluate(images, wanted, again) == emoji_quality.evaluate(images, wanted, judge)
    assert {path.suffix for path in folder.rglob("*.*")} <= {".json", ".txt", ".safetensors"}


def test_the_background_of_every_drawing_is_read_off_its_corners():
    data = emoji.dataset("judge", FONT)
    wanted = [emoji.COLOURS[number] for number in data.rows.colour.tolist()]
    found = emoji_quality.backgrounds(emoji_quality.every_image(data))
    assert sum(one == other for one, other in zip(found, wanted, strict=True)) > 0.95 * len(wanted)


def test_features_of_a_text_do_not_depend_on_the_texts_beside_it(stored):
    judge, _ = stored
    ids = token_ids(judge.tokenizer, ["a red heart", "a picture of a pizza on blue", ""], emoji_quality.LENGTH)
    together = judge.model.read(ids)
    alone = torch.cat([judge.model.read(row[None]) for row in ids])
    assert torch.allclose(together, alone, atol=1e-5) and torch.isfinite(together).all()


def test_the_judge_reads_every_caption_to_its_end(stored):
    judge, _ = stored
    data = emoji.dataset("judge", FONT)
    texts = sorted({text for row in range(len(data)) for text in data.captions(row)})
    assert (token_ids(judge.tokenizer, texts, emoji_quality.LENGTH)[:, -1] == judge.tokenizer.eos_token_id).all()


def test_worse_images_are_farther_from_the_real_ones(stored):
    judge, _ = stored
    images = emoji_quality.every_image(emoji.dataset("prompts", FONT))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distances = [
        emoji_quality.evaluate(images + level * noise, range(len(images)), judge)["frechet_distance"]
        for level in (0.0, 0.3, 1.0)
    ]
    assert distances[0] < distances[1] < distances[2]


def test_accuracy_is_the_share_of_images_that_find_their_own_prompt(stored, monkeypatch):
    judge, _ = stored
    images = emoji_quality.every_image(emoji.dataset("prompts", FONT))
    monkeypatch.setattr(emoji_quality, "found_prompts", lambda judge, images: torch.arange(len(images)).numpy())
    assert emoji_quality.evaluate(images, range(len(images)), judge)["prompt_accuracy"] == 1
    moved = [(number + 1) % len(images) for number in range(len(images))]
    assert emoji_quality.evaluate(images, moved, judge)["prompt_accuracy"] == 0
