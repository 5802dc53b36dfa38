"""Open training images: folders, webdataset shards, Hugging Face datasets, digits, or emoji."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from accel.errors import UserError

from . import digits
from .item import BrokenItem, ImageSource, Item

__all__ = ["BrokenItem", "Item", "ImageSource", "open_data"]

_KINDS = "a folder of images with metadata.jsonl, webdataset .tar files, a Hugging Face dataset, digits, or emoji"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_data(
    spec: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    classes: bool = False,
) -> ImageSource:
    """Open training images.

    Args:
        spec: a folder with images and `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder layout), or with
            `name.txt` beside `name.jpg`; webdataset shards: a .tar file, a folder of them, or a pattern such as
            `data/{00000..00099}.tar` or `data/*.tar`; a dataset written by `save_to_disk`, a parquet file or folder, or
            a hub id; `digits`, the 1,297 training images of the shipped model; `emoji`, 25,000 drawings by the system's
            Noto Color Emoji; a .txt file of prompts, which has no images.
        image_column: column of the image or its file name; for shards, the file suffix, as in `jpg`.
        caption_column: column of the caption or of a list of captions; for shards, a file suffix (`txt`), else a key of
            the json file. Both are found where only one column fits.
        split: part of a dataset that has several.
        classes: captions are numbers of classes; a folder without metadata is one of ImageNet's kind, with a folder per
            class.

    Raises:
        UserError: when nothing is there, or what is there cannot be used, or it is not clear which column is meant.
    """
    columns = (image_column or None, caption_column or None)
    if str(spec) == "digits":
        return _open_digits(split, classes)
    if str(spec) == "emoji":
        return _open_emoji(split, classes)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _open_folder(path, columns, split, classes)
    if path.is_file():
        return _open_file(path, columns, split)
    if "://" in str(spec) or str(spec).startswith("pipe:"):
        raise UserError(f"{spec} is not on this machine", "download it first, and give the folder")
    if any(char in str(spec) for char in "{*?["):
        from .webdataset import expand, open_tars

        return open_tars(expand(str(path)), *columns)
    if _HUB_ID.fullmatch(str(spec)):
        from .hf_datasets import open_hub

        return open_hub(str(spec), *columns, split)
    raise UserError(f"no training images at {spec}: there is no such file or folder", f"give {_KINDS}")


def _open_folder(path: Path, columns: tuple[str | None, str | None], split: str, classes: bool) -> ImageSource:
    from .folder import metadata_file, open_beside, open_classes, open_metadata

    for folder in (path, path / split):
        if metadata := metadata_file(folder):
            return open_metadata(metadata, *columns)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        from .hf_datasets import open_saved

        return open_saved(path, *columns, split)
    if tars := sorted(path.glob("*.tar")):
        from .webdataset import open_tars

        return open_tars(tars, *columns)
    if next(path.rglob("*.parquet"), None):
        from .hf_datasets import open_hub

        return open_hub(str(path), *columns, split)
    if classes and (source := open_classes(path / split if (path / split).is_dir() else path)):
        return source
    if source := open_beside(path):
        return source
    found = sorted({p.suffix or p.name for p in path.iterdir()})
    raise UserError(f"{path} holds no training images; it holds {', '.join(found) or 'nothing'}", f"give {_KINDS}")


def _open_file(path: Path, columns: tuple[str | None, str | None], split: str) -> ImageSource:
    if path.suffix == ".tar":
        from .webdataset import open_tars

        return open_tars([path], *columns)
    if path.suffix == ".parquet":
        from .hf_datasets import open_parquet

        return open_parquet(path, *columns)
    if path.suffix == ".txt":
        from .prompts import open_prompts

        return open_prompts(path)
    if path.name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise UserError(
            f"{path} is compressed, so its images cannot be read in any order",
            "uncompress it to a .tar (gunzip, zstd -d); images are compressed already",
        )
    fix = f"give the folder: {path.parent}" if path.name.startswith("metadata.") else f"give {_KINDS}"
    raise UserError(f"{path} is a file that holds no training images", fix)


# ------------------------------------------------------------------------------------------------------------ digits


@dataclass(frozen=True)
class DigitsSource:
    """Scikit-learn's digits as images of 64 x 64, with twelve captions each, or their class as the only one.

    Attributes:
        images: uint8 [n, 64, 64, 3].
        labels: int64 [n].
        classes: the caption is the digit itself.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Item:
        return Item(Image.fromarray(self.images[row]), self.captions(row), f"digit {row}, a {self.labels[row]}")

    def captions(self, row: int) -> tuple[str, ...]:
        digit = int(self.labels[row])
        return (str(digit),) if self.classes else digits.prompts(digit)

    def size(self, row: int) -> tuple[int, int]:
        return digits.SIZE, digits.SIZE

    def value(self, row: int, column: str) -> Any:
        return int(self.labels[row]) if column == "digit" else None

    @cached_property
    def identity(self) -> str:
        """sha256 over pixels and captions."""
        digest = hashlib.sha256(self.images.tobytes())
        digest.update(repr([self.captions(row) for row in range(len(self))]).encode())
        return digest.hexdigest()


def _open_digits(split: str, classes: bool) -> DigitsSource:
    if split not in ("train", "held-out"):
        raise UserError(f"digits has no split {split!r}", "train or held-out")
    images, labels = digits.dataset(split)
    return DigitsSource(digits.pixels(images), labels.numpy(), classes)


# ------------------------------------------------------------------------------------------------------------- emoji


def _open_emoji(split: str, classes: bool) -> ImageSource:
    if classes:
        raise UserError("emoji has captions, and no classes", "use digits, or a folder of ImageNet's kind")
    if split not in ("train", "held-out"):
        raise UserError(f"emoji has no split {split!r}", "train or held-out")
    from . import emoji

    return emoji.dataset(split)
