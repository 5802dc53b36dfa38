"""Protocols that bring their own prompts and real images along: digits and emoji."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from accel.errors import UserError
from accel.files import sha256

from ..sources import digits
from . import digits as digits_quality
from . import emoji as emoji_quality
from . import metrics


@dataclass(frozen=True)
class OwnSet:
    """What a protocol brings along.

    Attributes:
        pairs: prompts, each with the number of what it asks for.
        figures: of image files and the numbers that they were asked for.
        real: what the figures compare with, as results keep it.
    """

    pairs: list[tuple[str, int]]
    figures: Callable[[Sequence[Path], Sequence[int]], list[dict[str, Any]]]
    real: dict[str, Any]


def digits_set(reference: str | Path | None) -> OwnSet:
    """500 digits.

    Raises:
        UserError: for real images, which it has itself.
        MissingPackage: without scikit-learn, whose digits they are.
    """
    if reference is not None:
        raise UserError("digits has real images of its own", "leave --reference out")
    digits.raw()  # now, and not after the images are made, if scikit-learn is missing
    real = {"kind": "held-out digits of scikit-learn", "images": 10 * digits.HELD_OUT_PER_DIGIT}
    return OwnSet(digits.prompt_set(digits.HELD_OUT_PER_DIGIT), digit_figures, real)


def emoji_set(reference: str | Path | None) -> OwnSet:
    """The prompts of a judge: the folder `reference`, or the judge that ships.

    Raises:
        UserError: where there is none.
    """
    folder = emoji_quality.judge_folder(reference)
    judge = emoji_quality.open_judge(folder)

    def figures(files: Sequence[Path], wanted: Sequence[int]) -> list[dict[str, Any]]:
        found = emoji_quality.evaluate(read_images(files), wanted, judge)
        return [
            {"name": name, "value": found[key], bound: judge.real[key]}
            for key, name, bound in _EMOJI_FIGURES
            if key in found and key in judge.real
        ]

    real = {"kind": "judge of emoji", "sha256": sha256(folder / emoji_quality.WEIGHTS)}
    return OwnSet([(text, number) for number, text in enumerate(judge.texts())], figures, real)


# "real" is what real drawings of the same prompts get, "floor" the distance that they have.
_EMOJI_FIGURES = (
    ("prompt_accuracy", "prompt accuracy", "real"),
    ("prompt_accuracy_held_out", "prompt accuracy, pairs not trained", "real"),
    ("background_accuracy", "background accuracy", "real"),
    ("frechet_distance", "Frechet distance", "floor"),
)
OWN_SETS: Mapping[str, Callable[[str | Path | None], OwnSet]] = MappingProxyType(
    {"digits": digits_set, "emoji": emoji_set}
)


def read_images(files: Sequence[Path]) -> torch.Tensor:
    """Image files of one size as [n, 3, h, w] in -1..1."""
    pixels = np.stack([np.asarray(metrics.read_image(path).convert("RGB")) for path in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def digit_figures(files: Sequence[Path], wanted: Sequence[int]) -> list[dict[str, Any]]:
    """Prompt accuracy, and the Frechet distance to the held-out real digits with its floor.

    The floor is what as many real training images of the same digits get.
    """
    classifier = digits_quality.load_classifier()
    labels = torch.tensor(wanted)
    quality = digits_quality.evaluate(read_images(files), labels, classifier)
    real, of = digits.dataset("train")
    per_digit = torch.bincount(labels, minlength=10).tolist()
    rows = torch.cat([torch.nonzero(of == digit)[:many, 0] for digit, many in enumerate(per_digit)])
    held_out = digits_quality.real_features(classifier, "held-out")
    floor = metrics.frechet_distance(digits_quality.features(classifier, real[rows]), held_out)
    return [
        {"name": "prompt accuracy", "value": quality["prompt_accuracy"]},
        {"name": "Frechet distance", "value": quality["frechet_distance"], "floor": floor},
    ]
