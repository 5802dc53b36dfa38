"""Hugging Face `datasets` as training images: saved folders, parquet files, hub ids."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accel.errors import MissingPackage, UserError

from .item import BrokenItem, Item, caption_column, clean_captions, named_column, size_of, upright_rgb, upright_size


@dataclass(frozen=True, eq=False)
class DatasetSource:
    """Rows of a dataset.

    Attributes:
        rows: a `datasets.Dataset` whose images come as they are stored, not decoded.
        image: column of the image.
        caption: column of the caption or captions.
        more: the same rows with all their columns.
    """

    rows: Any
    image: str
    caption: str
    more: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Item:
        entry = _entry(self.rows, row)
        name, data = self._file(row, entry[self.image])
        captions = clean_captions(entry[self.caption], name)
        if data is None:
            raise BrokenItem(name, f"it has no image in {self.image}")
        return Item(upright_rgb(data, name), captions, name)

    def size(self, row: int) -> tuple[int, int]:
        name, data = self._file(row, _entry(self._images, row)[self.image])
        if data is None:
            raise BrokenItem(name, f"it has no image in {self.image}")
        return upright_size(data, name)

    def value(self, row: int, column: str) -> Any:
        if column not in self.more.column_names:
            return None
        if column not in self._views:
            self._views[column] = self.more.select_columns([column])
        return _entry(self._views[column], row)[column]

    @cached_property
    def _views(self) -> dict[str, Any]:
        return {}

    def _file(self, row: int, value: Any) -> tuple[str, bytes | Path | None]:
        """(name, image as it is stored) of a row."""
        path = value.get("path") if isinstance(value, dict) else None
        name = f"row {row} ({os.path.basename(path)})" if path else f"row {row}"
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None and path:
            data = Path(path)
        return name, data if isinstance(data, bytes | Path) else None

    def captions(self, row: int) -> tuple[str, ...]:
        return clean_captions(_entry(self._captions, row)[self.caption], f"row {row}")

    @cached_property
    def identity(self) -> str:
        """sha256 over all captions and the name and size in bytes of every image, in the order of the rows."""
        digest = hashlib.sha256(f"dataset:{self.image}:{self.caption}\n".encode())
        for row in range(len(self)):
            try:
                digest.update(repr(_entry(self._captions, row)[self.caption]).encode(errors="surrogatepass"))
            except BrokenItem as broken:
                digest.update(f"\0{broken}".encode())
        for sizes in self._sizes():
            digest.update(repr(sizes).encode(errors="surrogatepass"))
        return digest.hexdigest()

    @cached_property
    def _captions(self) -> Any:
        return self.rows.select_columns([self.caption])

    @cached_property
    def _images(self) -> Any:
        return self.rows.select_columns([self.image])

    def _sizes(self) -> Any:
        """(bytes, name) of images, a thousand rows at a time; Arrow knows how long a value is without reading it."""
        import pyarrow
        import pyarrow.compute as compute

        rows = self.rows.select_columns([self.image]).with_format("arrow")
        for start in range(0, len(self), 1000):
            column = rows[start : start + 1000].column(self.image)
            if not pyarrow.types.is_struct(column.type):
                yield compute.binary_length(column).to_pylist()
                continue
            lengths = compute.binary_length(compute.struct_field(column, "bytes")).to_pylist()
            paths = compute.struct_field(column, "path").to_pylist()
            yield [
                (size_of(Path(path)) if length is None and path else length, os.path.basename(path or ""))
                for length, path in zip(lengths, paths, strict=True)
            ]


def _entry(rows: Any, row: int) -> dict[str, Any]:
    try:
        return rows[row]
    except UnicodeDecodeError:
        raise BrokenItem(f"row {row}", "its text is not UTF-8") from None
    except Exception as error:  # whatever Arrow makes of a damaged file
        raise BrokenItem(f"row {row}", f"cannot be read: {error or type(error).__name__}") from None


def open_saved(folder: Path, image: str | None, caption: str | None, split: str) -> DatasetSource:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    library = _library()
    made = _tried(lambda: library.load_from_disk(str(folder)), str(folder))
    if isinstance(made, library.DatasetDict):
        if split not in made:
            raise UserError(
                f"{folder} has no split {split!r}; it has {', '.join(made)}", f"give one: {folder / next(iter(made))}"
            )
        made = made[split]
    return _source(made, image, caption, str(folder))


def open_parquet(path: Path, image: str | None, caption: str | None) -> DatasetSource:
    """One parquet file."""
    library = _library()
    made = _tried(lambda: library.load_dataset("parquet", data_files=str(path), split="train"), str(path))
    return _source(made, image, caption, str(path))


def open_hub(name: str, image: str | None, caption: str | None, split: str) -> DatasetSource:
    """A dataset of the hub, or a local folder in the form of one."""
    made = _tried(lambda: _library().load_dataset(name, split=split), name)
    return _source(made, image, caption, name)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage("datasets", "a Hugging Face dataset", extra="train") from error
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # before version 4 it asked on the terminal
    return datasets


def _tried(load: Callable[[], Any], name: str) -> Any:
    """Run a loader of the library and put its errors, which are of any type, into one sentence."""
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        what = "cannot be read as a dataset" if Path(name).exists() else "is neither here nor to be had from the hub"
        raise UserError(
            f"{name} {what} ({type(error).__name__}: {text:.300})",
            "check the spelling, that it has this split, and the network; or give a folder of images",
        ) from None


def _source(rows: Any, image: str | None, caption: str | None, where: str) -> DatasetSource:
    library = _library()
    features = rows.features
    images = [name for name, feature in features.items() if isinstance(feature, library.Image)]
    if image is not None:
        named_column(image, features, "--image-column", where)
        if image not in images and getattr(features[image], "dtype", "") not in ("binary", "large_binary"):
            raise UserError(
                f"{where}: the column {image} holds {features[image]}, not images",
                f"--image-column {next(iter(images), 'NAME')}",
            )
    elif len(images) == 1:
        image = images[0]
    else:
        which = f"several hold images: {', '.join(images)}" if images else "none is of the type Image"
        raise UserError(f"{where} has the columns {', '.join(features)}; {which}", "name the one: --image-column NAME")
    text = [name for name, feature in features.items() if name != image and _is_text(feature)]
    others = [name for name in features if name != image]
    caption = caption_column(caption, others, text, where)
    if image in images:
        rows = rows.cast_column(image, library.Image(decode=False))
    rows = rows.with_format(None)
    return DatasetSource(rows.select_columns([image, caption]), image, caption, rows)


def _is_text(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)  # of a list
    if isinstance(inner, list) and len(inner) == 1:
        inner = inner[0]
    return getattr(inner, "dtype", "") in ("string", "large_string")
