"""The small real model that ships with the package, by name."""

from __future__ import annotations

from pathlib import Path

DIGITS = Path(__file__).parent / "digits"


def resolve(model: str | Path) -> Path | str:
    """The folder of a shipped pipeline (`digits` is its teacher, `digits/NAME` a student); anything else as it is.

    A folder of that name in the current directory wins, so nothing of the user's is ever hidden.
    """
    text = str(model)
    if Path(text).exists() or not (text == "digits" or text.startswith("digits/")):
        return model
    return DIGITS / (text.removeprefix("digits").strip("/") or "teacher")
