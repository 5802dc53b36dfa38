"""Emoji as data: glyphs and their names, captions, rows, images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from accel.distill.sources import emoji, emoji_glyphs
from accel.distill.sources.open_data import open_data
from accel.errors import UserError

FONT = Path(__file__).parents[1] / "emoji" / "NotoColorEmoji-subset.ttf"


@pytest.fixture(scope="module")
def data():
    return emoji.dataset("train", FONT)


@pytest.fixture(scope="module")
def by_name(data):
    return {glyph.names[0]: glyph for glyph in data.glyphs}


def test_glyphs_are_sequences_too_and_are_called_by_their_words(by_name):
    assert {"red heart", "flag of japan", "firefighter", "waving hand with dark skin"} <= set(by_name)
    assert by_name["red heart"].names[1] == "heart"
    assert by_name["waving hand with dark skin"].family == by_name["waving hand"].family == "waving hand"
    assert by_name["firefighter"].text == "\U0001f9d1\u200d\U0001f692", "two characters that the font joins"
    assert not by_name["left arrow"].mirrors and by_name["pizza"].mirrors
    assert all(name.isascii() and name == name.lower() for glyph in by_name.values() for name in glyph.names)


def test_no_two_glyphs_have_a_name_in_common(data):
    names = [name for glyph in data.glyphs for name in glyph.names]
    assert len(names) == len(set(names))


def test_captions_are_sentences_that_say_the_background(by_name):
    heart = by_name["red heart"]
    assert emoji.captions(heart, "white")[:2] == ("a red heart", "red heart")
    assert emoji.captions(heart, "orange")[0] == "a red heart on an orange background"
    assert all("blue" in caption for caption in emoji.captions(heart, "blue"))
    others = set(emoji.COLOURS) - {"red", "white"}
    assert not any(others & set(caption.split()) for caption in emoji.captions(heart, "white"))
    assert len(set(emoji.captions(heart, "red"))) == len(emoji.captions(heart, "red")) > 5


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("orange heart", "an orange heart"),
        ("clinking glasses", "clinking glasses"),
        ("octopus", "an octopus"),
        ("wine glass", "a wine glass"),
        ("face with tears of joy", "a face with tears of joy"),
        ("flag of japan", "the flag of japan"),
        ("cat with wry eyes", "a cat with wry eyes"),
    ],
)
def test_a_name_gets_the_article_that_it_has_in_a_sentence(name, sentence):
    assert emoji.with_article(name) == sentence


def test_training_never_has_the_pairs_that_are_held_out_and_the_judge_has_them(data):
    def pairs(part):
        rows = emoji.dataset(part, FONT).rows
        return {(int(g), emoji.COLOURS[int(c)]) for g, c in zip(rows.glyph, rows.colour, strict=True)}

    def held_out(part):
        return {pair for pair in pairs(part) if emoji.is_held_out(data.glyphs[pair[0]], pair[1])}

    assert not held_out("train") and held_out("judge")
    coloured = {pair for pair in pairs("held-out") if pair[1] != "white"}
    assert coloured and coloured == held_out("held-out")
    assert held_out("prompts"), "some prompts ask for a pair that was never seen"


def test_prompts_ask_for_one_glyph_of_a_family(data):
    prompts = emoji.dataset("prompts", FONT)
    families = [data.glyphs[int(number)].family for number in prompts.rows.glyph]
    assert len(families) == len(set(families)) == len({glyph.family for glyph in data.glyphs})


def test_half_of_the_rows_are_on_white_and_the_table_is_the_same_every_time(data):
    share = (data.rows.colour == 0).float().mean().item()
    assert 0.4 < share < 0.65
    again = emoji.table(data.glyphs, "train")
    assert all(torch.equal(value, vars(again)[name]) for name, value in vars(data.rows).items())


def test_an_image_is_the_drawing_on_its_background(data, by_name):
    number = data.glyphs.index(by_name["red heart"])
    one = torch.tensor([1.0])
    rows = emoji.Rows(torch.tensor([number]), torch.tensor([7]), 0.9 * one, 0 * one, 0 * one, torch.tensor([False]))
    image = ((emoji.composed(data.drawn, rows)[0] + 1) * 127.5).round()
    assert image[:, 0, 0].tolist() == list(emoji.BACKGROUNDS["blue"])
    red, green, blue = image[:, 32, 32].tolist()
    assert red > 200 and green < 100 and blue < 100


def test_shift_scale_and_mirror_do_what_they_say(data, by_name):
    number = data.glyphs.index(by_name["waving hand"])

    def mask(scale=0.6, right=0.0, down=0.0, mirrored=False):
        values = [torch.tensor([value]) for value in (number, 1, scale, right, down, mirrored)]
        image = emoji.composed(data.drawn, emoji.Rows(*values))[0]
        return image.amax(0) > -0.9  # on black

    usual = mask()
    assert torch.equal(torch.roll(usual, 8, 1), mask(right=8 / 64)), "eight pixels to the right"
    assert torch.equal(torch.roll(usual, -4, 0), mask(down=-4 / 64)), "four pixels up"
    assert torch.equal(usual.flip(1), mask(mirrored=True)) and not torch.equal(usual, usual.flip(1))
    ratio = mask(scale=0.3).sum() / usual.sum()
    assert ratio == pytest.approx(0.25, abs=0.05), "a quarter, and pixels that the outline only touches"


def test_a_source_gives_items_and_one_identity(data):
    item = data[3]
    assert item.image.size == (64, 64) and item.image.mode == "RGB" and item.captions == data.captions(3)
    rendered = ((data.images(torch.tensor([3]))[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(item.image), rendered.astype(np.uint8))
    assert data.identity == emoji.dataset("train", FONT).identity != emoji.dataset("judge", FONT).identity


def test_emoji_are_training_images_by_name(monkeypatch):
    monkeypatch.setattr(emoji_glyphs, "FONTS", (str(FONT),))
    assert len(open_data("emoji")) > len(open_data("emoji", split="held-out")) > 0
    with pytest.raises(UserError, match="no split 'test'"):
        open_data("emoji", split="test")
    with pytest.raises(UserError, match="no classes"):
        open_data("emoji", classes=True)


def test_a_system_without_the_font_is_told_the_package(monkeypatch):
    monkeypatch.setattr(emoji_glyphs, "FONTS", ("/nowhere/NotoColorEmoji.ttf",))
    with pytest.raises(UserError, match="not installed") as caught:
        open_data("emoji")
    assert "fonts-noto-color-emoji" in caught.value.fix


def test_a_font_without_colour_bitmaps_is_refused(tmp_path):
    (tmp_path / "font.ttf").write_bytes(b"not a font")
    with pytest.raises(UserError, match="no colour bitmaps"):
        emoji_glyphs.glyphs(tmp_path / "font.ttf")
