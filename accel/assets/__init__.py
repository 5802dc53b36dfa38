"""The small real models that ship with the package, by name."""

from __future__ import annotations

import re
from pathlib import Path

DIGITS = Path(__file__).parent / "digits"
EMOJI = Path(__file__).parent / "emoji"  # the judge of `accel evaluate --protocol emoji`, where it ships
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


def hub_id(model: str | Path) -> tuple[str, str | None] | None:
    """The repository and revision that a model is named by as on the Hugging Face hub: `org/name`, `org/name@v1.0`.

    Returns:
        None where a file or folder here has that name, or it is no such name; None for a revision that is not named.
    """
    text = str(model)
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@(\w[\w./-]*))?", text)
    if found is None or text.startswith("digits/") or Path(text).exists():
        return None
    return found[1], found[2]


def is_hub_id(model: str | Path) -> bool:
    """Whether a model is named as on the Hugging Face hub, and no file or folder here has that name."""
    return hub_id(model) is not None


def public_name(name: str) -> str:
    """The name of a model or of data as others may read it: of a path, its last part."""
    if hub_id(name) is not None or knows_only_digits(name):
        return name
    return Path(name).name
