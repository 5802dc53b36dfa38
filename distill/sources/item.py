"""Training images with captions by row number, and the reasons why a row cannot be used."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps

from accel.errors import UserError
from accel.files import read_bytes
from accel.images import FORMATS, PIXELS

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LARGEST = 1 << 28  # bytes of an image
_CAPTION_WORDS = ("caption", "text", "prompt", "sentence")


@dataclass(frozen=True)
class Item:
    """An image to learn from.

    Attributes:
        image: RGB, upright.
        captions: one or more texts that describe it; training draws one.
        name: what to call it in a message.
    """

    image: Image.Image
    captions: tuple[str, ...]
    name: str


class BrokenItem(Exception):
    """A row that cannot be used, and why. Training passes it over and says so."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it can be pickled
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class ImageSource(Protocol):
    """Images with captions by row number; the same row is the same image in every process and run.

    `source[row]` and `source.captions(row)` raise BrokenItem for a row that cannot be used. `captions` does not decode
    the image, and neither does `size`. `identity` is a sha256 over names, sizes in bytes and captions, not over pixels:
    an image that is edited and keeps its size to the byte goes unnoticed.
    """

    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Item: ...

    def captions(self, row: int) -> tuple[str, ...]: ...

    def size(self, row: int) -> tuple[int, int]:
        """(width, height) of the upright image."""

    def value(self, row: int, column: str) -> Any:
        """What else the data set says about an image, such as its aesthetic score; None where it says nothing."""


@dataclass(frozen=True, eq=False, repr=False)
class Lines:
    """JSON lines in one block of bytes: millions of rows that forked processes share and do not copy.

    Attributes:
        data: the text, UTF-8.
        spans: int64 [n, 3], first byte, end and line number (from 1) of every line that is not empty.
    """

    data: bytes
    spans: np.ndarray

    @staticmethod
    def parse(data: bytes) -> Lines:
        ends = np.append(np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")), len(data))
        starts = np.append(0, ends[:-1] + 1)
        numbers = np.arange(1, len(ends) + 1)
        # A line of "\r" alone is an empty line of a file from Windows.
        full = [end - start > 1 or data[start:end].strip() != b"" for start, end in zip(starts, ends, strict=True)]
        return Lines(data, np.stack([starts, ends, numbers], 1)[np.asarray(full, bool)])

    @staticmethod
    def dump(values: Iterable[Any]) -> Lines:
        return Lines.parse(b"\n".join(json.dumps(value).encode() for value in values))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, row: int) -> Any:
        """The value of a line; UnicodeDecodeError or another ValueError where it is not UTF-8 or not JSON."""
        start, end, _ = self.spans[row]
        return json.loads(self.data[start:end].decode())


def upright_rgb(file: bytes | Path, name: str) -> Image.Image:
    """Decode an image, turn it as its EXIF tag says, and make it RGB.

    Transparent parts become white. 16-bit grey is divided by 257, so that white stays white.

    Raises:
        BrokenItem: when it is not an image, is truncated, or has no defined way to 8-bit RGB.
    """
    try:
        if not isinstance(file, bytes):
            file = read_bytes(file, "the image", _LARGEST)
    except UserError as error:
        raise BrokenItem(name, error.message if file.exists() else "No such file or directory") from None
    if not file:
        raise BrokenItem(name, "the file is empty")
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            image.load()
            return _rgb(_upright(image))
    except Image.UnidentifiedImageError:
        raise BrokenItem(name, "not an image, or a format that Pillow cannot read") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise BrokenItem(name, f"cannot be decoded: {error or type(error).__name__}") from None


def upright_size(file: bytes | Path, name: str) -> tuple[int, int]:
    """(width, height) that `upright_rgb` would return, from the header alone; `file` may be the beginning of one.

    Raises:
        BrokenItem: when the header cannot be read.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            width, height = image.size
            with contextlib.suppress(Exception):  # as `_upright`
                if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # turned by a quarter
                    return height, width
            return width, height
    except FileNotFoundError:
        raise BrokenItem(name, "No such file or directory") from None
    except Exception as error:
        raise BrokenItem(name, f"its size cannot be read: {error or type(error).__name__}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF is a note beside the image; a damaged one says nothing about its orientation
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"the range of its values (Pillow mode {image.mode}) is not known")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode.upper() in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def clean_captions(value: Any, name: str) -> tuple[str, ...]:
    """A caption or a list of them, white space made single; empty ones of a list are left out.

    A whole number is the number of a class, and its caption is that number.

    Raises:
        BrokenItem: when none is left, or one is not text that UTF-8 can hold.
    """
    if value is None:
        raise BrokenItem(name, "it has no caption")
    if isinstance(value, int) and not isinstance(value, bool):
        return (str(value),)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(text, str) for text in values):
        raise BrokenItem(name, f"its caption is not text: {value!r:.60}")
    texts = tuple(text for text in (" ".join(text.split()) for text in values) if text)
    if not texts:
        raise BrokenItem(name, "its caption is empty")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise BrokenItem(name, "its caption is not UTF-8") from None
    return texts


def is_text(value: Any) -> bool:
    """Whether a value of a row is a caption or a list of them."""
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], str))


def caption_of_bytes(data: bytes, name: str) -> tuple[str, ...]:
    """The caption in a text file: all of it is one caption."""
    try:
        return clean_captions(data.decode("utf-8-sig"), name)
    except UnicodeDecodeError:
        raise BrokenItem(name, "its caption is not UTF-8") from None


def caption_column(asked: str | None, columns: Collection[str], text: Collection[str], where: str) -> str:
    """The column that holds the captions: the one asked for, else the only one that is called like captions.

    Args:
        columns: all columns there are.
        text: those of them that hold text.

    Raises:
        UserError: when there is no such column, or the guess would be one.
    """
    if asked is not None:
        return named_column(asked, columns, "--caption-column", where)
    found = [name for name in text if any(word in name.lower() for word in _CAPTION_WORDS)]
    if len(found) == 1:
        return found[0]
    what = f"several may hold the captions: {', '.join(found)}" if found else "none is called like a caption"
    listed = ", ".join(columns)
    example = next(iter(found or text), "NAME")
    raise UserError(
        f"{where} has the columns {listed or '(none)'}; {what}",
        f"name the one: --caption-column {example}, or caption_column={example!r} in Python",
    )


def named_column(asked: str, columns: Collection[str], flag: str, where: str) -> str:
    if asked not in columns:
        raise UserError(
            f"{where} has no column {asked!r}; it has {', '.join(columns) or '(none)'}", f"{flag} with one of these"
        )
    return asked


def size_of(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1
