"""Prompts without images, one on each line of a text file: what a method learns from that draws its own images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accel.errors import UserError
from accel.files import read_bytes

from .item import BrokenItem, Item, clean_captions

_LARGEST = 1 << 30  # bytes
TEACHER = "teacher:"  # before such a file: the images that a teacher draws of its prompts


@dataclass(frozen=True)
class PromptSource:
    """Prompts by row number, an `ImageSource` that has no images."""

    name: str
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> Item:
        raise BrokenItem(f"{self.name} line {row + 1}", "a prompt has no image")

    def captions(self, row: int) -> tuple[str, ...]:
        return (self.texts[row],)

    def size(self, row: int) -> tuple[int, int]:
        raise BrokenItem(f"{self.name} line {row + 1}", "a prompt has no image")

    def value(self, row: int, column: str) -> Any:
        return None

    @cached_property
    def identity(self) -> str:
        """sha256 over all prompts in their order."""
        return hashlib.sha256(repr(self.texts).encode()).hexdigest()


def open_prompts(path: Path) -> PromptSource:
    """The lines of a text file that are not empty, white space made single.

    Raises:
        UserError: when it cannot be read, is not UTF-8, or has no line.
    """
    try:
        lines = read_bytes(path, "the prompts", _LARGEST).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8", "save it as UTF-8, one prompt on each line") from None
    texts = tuple(clean_captions(line, path.name)[0] for line in lines if line.strip())
    if not texts:
        raise UserError(f"{path} has no prompt", "write one on each line")
    return PromptSource(path.name, texts)


def has_images(spec: str) -> bool:
    """Whether what `--data` names has images: a .txt file has prompts alone, unless a teacher draws them."""
    return spec.startswith(TEACHER) or not spec.endswith(".txt")
