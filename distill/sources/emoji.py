"""Emoji: the images and captions of the small colour model.

A row is a glyph on a plain background, a little moved, scaled and, where it means the same, sometimes turned round; the
background is said in the caption unless it is white. Rows are drawn when they are asked for, from a table that a fixed
seed makes. Every eighth pair of a glyph and a background is held out of training, to see whether a model composes.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from accel.errors import UserError

from .emoji_glyphs import Glyph, drawings, find_font, glyphs
from .item import Item

SIZE = 64
BACKGROUNDS = MappingProxyType(
    {
        "white": (255, 255, 255),
        "black": (0, 0, 0),
        "grey": (128, 128, 128),
        "red": (229, 57, 53),
        "orange": (251, 140, 0),
        "yellow": (253, 216, 53),
        "green": (67, 160, 71),
        "blue": (30, 136, 229),
        "purple": (142, 36, 170),
        "pink": (244, 143, 177),
    }
)
COLOURS = tuple(BACKGROUNDS)
# Rows for each unit of weight. "judge" has pairs that are held out of training as well, "held-out" no other colours.
PARTS = MappingProxyType({"train": 12, "judge": 12, "held-out": 2, "prompts": 1})
PROMPTS = 500
HELD_OUT_ONE_IN = 8
MIRRORED = 0.25  # share of the rows of a glyph that means the same turned round
SCALES, SHIFT = (0.80, 0.96), 0.025  # of the image's side

PLAIN_TEMPLATES = ("{a}", "{name}", "{a} emoji", "a picture of {a}", "{a} on a white background")
COLOUR_TEMPLATES = (
    "{a} on {a_colour} background",
    "{name} on {colour}",
    "{a} emoji on {a_colour} background",
    "a picture of {a} on {colour}",
    "{a}, {colour} background",
)


def with_article(name: str) -> str:
    """`name` as it stands in a sentence."""
    subject = re.split(r" (?:with|in|on|of|and|without|showing)\b|,", name)[0]
    if name.startswith("flag of"):
        return f"the {name}"
    if subject.endswith("s") and not subject.endswith(("ss", "us")):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def captions(glyph: Glyph, colour: str) -> tuple[str, ...]:
    """Every caption of a glyph on a background: all templates with its first name, two with each other name."""
    templates = PLAIN_TEMPLATES if colour == "white" else COLOUR_TEMPLATES
    used = [(name, template) for i, name in enumerate(glyph.names) for template in templates[: 2 if i else None]]
    return tuple(
        template.format(a=with_article(name), name=name, a_colour=with_article(colour), colour=colour)
        for name, template in used
    )


def words(found: Iterable[Glyph]) -> list[str]:
    """Every word of every caption, cut as CLIP's tokenizer cuts, names as often as they are used."""
    texts = [caption for glyph in found for colour in ("white", "red") for caption in captions(glyph, colour)]
    texts += [colour for colour in COLOURS for _ in range(len(texts) // 20)]
    return [word for text in texts for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text)]


def is_held_out(glyph: Glyph, colour: str) -> bool:
    """Whether training never sees this glyph on this background."""
    return colour != "white" and zlib.crc32(f"{glyph.text} {colour}".encode()) % HELD_OUT_ONE_IN == 0


# --------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Rows:
    """What is drawn in each row: all tensors [n].

    Attributes:
        glyph: its number.
        colour: number of the background, in `COLOURS`.
        scale: side of the drawing, in sides of the image.
        right, down: shift, in sides of the image.
        mirrored: turned round.
    """

    glyph: torch.Tensor
    colour: torch.Tensor
    scale: torch.Tensor
    right: torch.Tensor
    down: torch.Tensor
    mirrored: torch.Tensor

    def __len__(self) -> int:
        return len(self.glyph)

    def take(self, rows: torch.Tensor) -> Rows:
        return Rows(**{name: value[rows] for name, value in vars(self).items()})


def table(found: tuple[Glyph, ...], part: str) -> Rows:
    """The rows of "train", "judge" (the same, of other random numbers and with every pair) or "held-out".

    "prompts" are the rows that a model is asked for: one glyph of each of at most 500 families, a quarter of them on
    backgrounds that they never had in training.
    """
    if part not in PARTS:
        raise UserError(f"emoji has no part {part!r}", f"one of {', '.join(PARTS)}")
    random = np.random.default_rng(zlib.crc32(part.encode()))
    pairs = _prompt_pairs(found, random) if part == "prompts" else _pairs(found, part, random)
    glyph, colour = (torch.tensor(column, dtype=torch.long) for column in zip(*pairs, strict=True))
    count = len(pairs)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.from_numpy(random.uniform(low, high, count)).float()

    may = torch.tensor([found[row].mirrors for row in glyph.tolist()])
    right, down, scale = uniform(-SHIFT, SHIFT), uniform(-SHIFT, SHIFT), uniform(*SCALES)
    return Rows(glyph, colour, scale, right, down, may & (uniform(0, 1) < MIRRORED))


def _allowed(glyph: Glyph, part: str) -> list[int]:
    """Numbers of the backgrounds other than white."""
    wanted = {"train": (False,), "held-out": (True,)}.get(part, (False, True))
    return [n for n, colour in enumerate(COLOURS) if n and is_held_out(glyph, colour) in wanted] or [0]


def _pairs(found: tuple[Glyph, ...], part: str, random: np.random.Generator) -> list[tuple[int, int]]:
    """Half of a glyph's rows on white, the others on the backgrounds in turn."""
    pairs = []
    for number, glyph in enumerate(found):
        count = max(1, round(PARTS[part] * glyph.weight))
        others = random.permutation(_allowed(glyph, part))
        pairs += [(number, int(others[i // 2 % len(others)]) if i % 2 else 0) for i in range(count)]
    return pairs


def _prompt_pairs(found: tuple[Glyph, ...], random: np.random.Generator) -> list[tuple[int, int]]:
    families: dict[str, list[int]] = {}
    for number, glyph in enumerate(found):
        families.setdefault(glyph.family, []).append(number)
    names = sorted(families)
    weights = np.array([max(found[number].weight for number in families[name]) for name in names])
    chosen = random.choice(len(names), min(PROMPTS, len(names)), replace=False, p=weights / weights.sum())
    pairs = []
    for index, family in enumerate(chosen):
        number = int(random.choice(families[names[family]]))
        # White, a background it had, white, one that it never had.
        kind = (None, "train", None, "held-out")[index % 4]
        pairs.append((number, 0 if kind is None else int(random.choice(_allowed(found[number], kind)))))
    return pairs


# ------------------------------------------------------------------------------------------------------------- images


def composed(drawn: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Images [n, 3, 64, 64] in -1..1 of rows, from all `drawings`; drawn at twice the size and averaged."""
    count = len(rows)
    zero = torch.zeros(count)
    across = torch.where(rows.mirrored, -1.0, 1.0) / rows.scale
    matrix = [across, zero, -2 * rows.right * across, zero, 1 / rows.scale, -2 * rows.down / rows.scale]
    grid = F.affine_grid(torch.stack(matrix, 1).view(count, 2, 3), [count, 4, 2 * SIZE, 2 * SIZE], align_corners=False)
    layers = drawn[rows.glyph].float() / 255
    layers = F.avg_pool2d(F.grid_sample(layers, grid, align_corners=False), 2)
    palette = torch.tensor(list(BACKGROUNDS.values())).float() / 255
    background = palette[rows.colour].view(count, 3, 1, 1)
    return (layers[:, :3] + (1 - layers[:, 3:]) * background).clamp(0, 1) * 2 - 1


@cache
def _stock(font: Path) -> tuple[tuple[Glyph, ...], torch.Tensor]:
    found = glyphs(font)
    return found, drawings(font, found)


@dataclass(frozen=True, eq=False)
class EmojiSource:
    """Rows of a part as training images with captions.

    Attributes:
        glyphs: all of them.
        drawn: uint8 [glyphs, 4, 128, 128], premultiplied.
        rows: what is drawn in each row.
    """

    glyphs: tuple[Glyph, ...]
    drawn: torch.Tensor
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Item:
        pixels = ((self.images(torch.tensor([row]))[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        return Item(Image.fromarray(pixels), self.captions(row), f"emoji {row}, {self.captions(row)[0]}")

    def captions(self, row: int) -> tuple[str, ...]:
        return captions(self.glyphs[int(self.rows.glyph[row])], COLOURS[int(self.rows.colour[row])])

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, 64, 64] in -1..1 of rows [n]."""
        return composed(self.drawn, self.rows.take(rows))

    @cached_property
    def identity(self) -> str:
        """sha256 over drawings, rows and captions."""
        digest = hashlib.sha256(self.drawn.numpy().tobytes())
        for value in vars(self.rows).values():
            digest.update(value.numpy().tobytes())
        digest.update(repr([self.captions(row) for row in range(len(self))]).encode())
        return digest.hexdigest()


def dataset(part: str = "train", font: str | Path | None = None) -> EmojiSource:
    """The images of a part: "train", "judge", "held-out" or "prompts"."""
    found, drawn = _stock(find_font(font))
    return EmojiSource(found, drawn, table(found, part))
