"""Digits: the images and the prompts of the model that ships with the package.

The images are scikit-learn's `load_digits`, 1,797 grey 8x8 images (the test part of the UCI set "Optical Recognition of
Handwritten Digits", Alpaydin and Kaynak 1998, doi 10.24432/C50P49, CC BY 4.0). Every image becomes a smooth white
digit on black of 64x64 RGB pixels. 500 images, 50 of each digit, are held out of all training.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from accel.errors import MissingPackage

SIZE = 64
HELD_OUT_PER_DIGIT = 50
SPLIT_SEED = 0

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{word}",
    "{numeral}",
    "the digit {word}",
    "the digit {numeral}",
    "the number {word}",
    "a handwritten {word}",
    "a handwritten {numeral}",
    "a photo of the digit {numeral}",
    "a photo of a handwritten {word}",
    "a drawing of the number {numeral}",
    "a white {word} on black",
    "{word} written by hand",
)

# -------------------------------------------------------------------------------------------------------------- data


def raw() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 digits as scikit-learn ships them: images [1797, 8, 8] in 0..1, labels [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackage("scikit-learn", "the digits data", extra="train") from error
    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32) / 16, torch.tensor(bunch.target, dtype=torch.long)


def render(grey: torch.Tensor) -> torch.Tensor:
    """8x8 ink counts [n, 8, 8] in 0..1 to images [n, 3, 64, 64] in -1..1: a smooth white digit on black.

    A frame of one empty cell goes around every digit, since many touch the border. Bicubic enlargement alone is a
    blur; a smooth step on the brightness makes a pen stroke of it without making edges hard.
    """
    framed = F.pad(grey[:, None], (1, 1, 1, 1))
    large = F.interpolate(framed, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    ink = ((large - 0.15) / 0.7).clamp(0, 1)
    return (ink * ink * (3 - 2 * ink) * 2 - 1).expand(-1, 3, -1, -1).contiguous()


def pixels(images: torch.Tensor) -> np.ndarray:
    """Images [n, 3, h, w] in -1..1 as uint8 [n, h, w, 3]."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def split(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training images [1297] and of the held-out ones [500]: 50 of each digit, by a fixed seed."""
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    by_digit = [shuffled[labels.numpy()[shuffled] == digit] for digit in range(10)]
    held_out = np.sort(np.concatenate([rows[:HELD_OUT_PER_DIGIT] for rows in by_digit]))
    train = np.sort(np.concatenate([rows[HELD_OUT_PER_DIGIT:] for rows in by_digit]))
    return torch.from_numpy(train), torch.from_numpy(held_out)


def dataset(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 3, 64, 64] in -1..1 and digits [n] of `part`: "train" or "held-out"."""
    grey, labels = raw()
    rows = dict(zip(("train", "held-out"), split(labels), strict=True))[part]
    return render(grey[rows]), labels[rows]


# ------------------------------------------------------------------------------------------------------------- words


def prompts(digit: int) -> tuple[str, ...]:
    """Every prompt of the training set for one digit."""
    return tuple(template.format(word=WORDS[digit], numeral=digit) for template in TEMPLATES)


def prompt_set(per_digit: int) -> list[tuple[str, int]]:
    """`10 * per_digit` pairs (prompt, digit) to evaluate a model with, digits in turn, templates evenly used."""
    return [(prompts(digit)[index % len(TEMPLATES)], digit) for index in range(per_digit) for digit in range(10)]


def words() -> list[str]:
    """Every word of every prompt, with repetitions."""
    return [word for digit in range(10) for prompt in prompts(digit) for word in prompt.split()]
