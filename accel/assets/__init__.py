"""The small real model that ships with the package, by name."""

from __future__ import annotations

import re
from pathlib import Path

DIGITS = Path(__file__).parent / "digits"
# What the digits models were trained to draw; anything else becomes a blob.
DIGITS_PROMPTS = ("a handwritten seven", "a handwritten three", "a handwritten zero", "a handwritten five")
_WORDS = "zero one two three four five six seven eight nine".split()


def knows_only_digits(name: str) -> bool:
    """Whether the model of this name, as a manifest has it, is one of those that ship."""
    return name == "digits" or name.startswith("digits/")


def names_a_digit(prompt: str) -> bool:
    """Whether a prompt asks for a digit, in words or as a figure."""
    return any(word in prompt.lower() for word in [*_WORDS, *"0123456789"])


def resolve(model: str | Path) -> Path | str:
    """The folder of a shipped pipeline (`digits` is its teacher, `digits/NAME` a student); anything else as it is.

    A folder of that name in the current directory wins, so nothing of the user's is ever hidden.
    """
    text = str(model)
    if Path(text).exists() or not (text == "digits" or text.startswith("digits/")):
        return model
    return DIGITS / (text.removeprefix("digits").strip("/") or "teacher")


def is_hub_id(model: str | Path) -> bool:
    """Whether a model is named as on the Hugging Face hub, `org/name`, and no file or folder here has that name."""
    text = str(model)
    return (
        text.count("/") == 1
        and re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None
        and text[0] not in ".-"
        and (not Path(resolve(text)).exists() and not text.startswith("digits/"))
    )
