"""Emoji as drawings with names: the glyphs of Noto Color Emoji, called as Unicode and the `emoji` package call them.

The font draws, nothing of it is stored here: Debian's package fonts-noto-color-emoji, SIL Open Font License 1.1. Names
are those of Unicode's CLDR, the short codes of the `emoji` package (BSD), and the names of Unicode's characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features

from accel.errors import MissingPackage, UserError

FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
)
BITMAP = 109  # the one size, in pixels, of the font's bitmaps; they are 136 wide and 128 high
DRAWING = 128  # side in pixels of a drawing here

TONES = ("medium-light", "medium-dark", "light", "medium", "dark")  # longest first: one is the end of another
_TONE = re.compile(rf" ({'|'.join(TONES)}) skin tone\b")
# Turned round, they would be something else.
_ONE_WAY = re.compile(
    r"\b(left|right|arrows?|clockwise|counterclockwise|clock|o'clock|thirty|button|keycap|flag|facing|letters?|sign"
    r"|symbols?|number|index|medal|calendar|latin|moon|hourglass|japanese|ok|abc|card|mark|banknote|chart|curving)\b"
)
# Grey figures, faces of clocks and lettering: many glyphs that hardly differ at the size of our images.
_ALIKE = re.compile(r"\b(button|keycap|o'clock|thirty|family|input)\b")


@dataclass(frozen=True)
class Glyph:
    """One emoji.

    Attributes:
        text: its characters.
        names: what it may be called, in lower case ASCII, CLDR's short name first.
        family: the first name without a skin tone; glyphs of one family are one subject.
        weight: share of the images, 1 for a subject of its own.
        mirrors: whether it is the same thing turned round.
    """

    text: str
    names: tuple[str, ...]
    family: str
    weight: float
    mirrors: bool


def find_font(font: str | Path | None = None) -> Path:
    """The font file that was named, or the one that this system has.

    Raises:
        UserError: when there is none.
    """
    for path in [font] if font else FONTS:
        if Path(path).is_file():
            return Path(path)
    raise UserError(
        f"no such font: {font}" if font else "Noto Color Emoji is not installed (the drawings of the emoji model)",
        "apt-get install fonts-noto-color-emoji, or name the file: --font NotoColorEmoji.ttf",
    )


def glyphs(font: Path) -> tuple[Glyph, ...]:
    """Every emoji that the font draws as one glyph, but those of two skin tones and Japanese lettering.

    Raises:
        UserError: when the font has no colour bitmaps, or text cannot be shaped.
        MissingPackage: without the package `emoji`.
    """
    try:
        import emoji
    except ImportError as error:
        raise MissingPackage("emoji", "the emoji data", extra="train") from error
    shown = _opened(font)
    known = {
        text: entry for text, entry in emoji.EMOJI_DATA.items() if entry["status"] == emoji.STATUS["fully_qualified"]
    }
    first = {text: _first_name(text, entry["en"]) for text, entry in known.items()}
    drawn = [
        text
        for text, name in first.items()
        if name.count("skin tone") < 2
        and not (name.startswith("japanese") and name.endswith("button"))
        and _is_one_glyph(shown, text)
    ]
    more = {text: _other_names(text, known[text].get("alias", ())) for text in drawn}
    taken = Counter(first.values()) + Counter(name for names in more.values() for name in set(names))
    return tuple(_glyph(text, first[text], [n for n in more[text] if taken[n] == 1]) for text in drawn)


def _glyph(text: str, name: str, others: list[str]) -> Glyph:
    family = _TONE.sub("", name)
    tone = _TONE.search(name)
    flag = _is_flag(text)
    names = (f"{family} with {tone[1]} skin", f"{family}, {tone[1]} skin tone") if tone else (name, *others[:3])
    weight = 0.25 if tone else 0.5 if flag or _ALIKE.search(name) else 1.0
    return Glyph(text, names, family, weight, not flag and not _ONE_WAY.search(name))


def _is_flag(text: str) -> bool:
    """Whether it is two letters that stand for a country."""
    return all(0x1F1E6 <= ord(character) <= 0x1F1FF for character in text)


def _plain(name: str) -> str:
    """Lower case ASCII without brackets: what the tokenizer's merges are learned from."""
    name = name.replace("’", "'").replace("“", "").replace("”", "")
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[()_:]", " ", letters).lower().split())


def _first_name(text: str, code: str) -> str:
    return f"flag of {_plain(code)}" if _is_flag(text) else _plain(code)


def _other_names(text: str, codes: Iterable[str]) -> list[str]:
    """Short codes that are words, and the name of the character if it is a single one."""
    if _is_flag(text):
        return []
    found = [_plain(code) for code in codes if re.fullmatch(r":[a-z_’-]{3,}:", code)]
    characters = text.replace("\ufe0f", "")
    if len(characters) == 1:
        found.append(_plain(unicodedata.name(characters, "").replace("EMOJI ", "")))
    # In names of characters black and white are filled and hollow, whatever colour an emoji has.
    return list(dict.fromkeys(name for name in found if name and not re.search(r"\b(black|white)\b", name)))


# ----------------------------------------------------------------------------------------------------------- drawings


@cache
def _opened(font: Path) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise UserError(
            "this Pillow cannot put characters together to one emoji: it was built without raqm",
            "pip install --force-reinstall pillow: the wheels have it",
        )
    try:
        opened = ImageFont.truetype(str(font), BITMAP, layout_engine=ImageFont.Layout.RAQM)
        width = opened.getlength("\u2764\ufe0f")
    except OSError as error:
        raise UserError(
            f"{font} has no colour bitmaps of {BITMAP} pixels: {error}", "give NotoColorEmoji.ttf"
        ) from None
    if not width:
        raise UserError(f"{font} draws no heart", "give NotoColorEmoji.ttf")
    return opened


def _is_one_glyph(font: ImageFont.FreeTypeFont, text: str) -> bool:
    left, top, right, bottom = font.getbbox(text)
    return bottom - top > BITMAP and right - left < 1.5 * (bottom - top)


def drawings(font: Path, found: Iterable[Glyph]) -> torch.Tensor:
    """The glyphs as uint8 [n, 4, 128, 128]: red, green and blue multiplied by opacity, and opacity."""
    shown = _opened(font)
    return torch.from_numpy(np.stack([_drawing(shown, glyph.text) for glyph in found]))


def _drawing(font: ImageFont.FreeTypeFont, text: str) -> np.ndarray:
    left, top, right, bottom = font.getbbox(text)
    side = max(right - left, bottom - top)
    canvas = Image.new("RGBA", (side, side))
    corner = ((side - right - left) // 2, (side - bottom - top) // 2)
    ImageDraw.Draw(canvas).text(corner, text, font=font, embedded_color=True)
    values = np.asarray(canvas, np.float32)
    opacity = values[..., 3:] / 255
    # Colours of transparent pixels must not run into their neighbours when the drawing is made smaller.
    multiplied = np.concatenate([values[..., :3] * opacity, values[..., 3:]], -1).round().astype(np.uint8)
    planes = [Image.fromarray(multiplied[..., channel]) for channel in range(4)]
    return np.stack([np.asarray(plane.resize((DRAWING, DRAWING), Image.Resampling.BOX)) for plane in planes])
