"""A folder of images: with metadata.jsonl or metadata.csv, or with a text file beside every image.

The first is Hugging Face's `imagefolder` layout: one row per image, its file by name in the column `file_name`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from accel.errors import UserError
from accel.files import read_bytes

from .item import (
    IMAGE_SUFFIXES,
    BrokenItem,
    Item,
    Lines,
    caption_column,
    caption_of_bytes,
    clean_captions,
    is_text,
    named_column,
    size_of,
    upright_rgb,
    upright_size,
)

METADATA = ("metadata.jsonl", "metadata.csv")
_PEEK = 200  # rows read to learn the columns
_TOO_MANY = "\0values without a column"


@dataclass(frozen=True)
class FolderSource:
    """Images of a folder.

    Attributes:
        root: file names are relative to it.
        rows: one table per image, as the metadata file has it.
        metadata: name of the metadata file, "" where captions lie beside the images.
        file_column: column of the file name.
        text_column: column of the caption or captions, "" where they lie beside the images.
    """

    root: Path
    rows: Lines
    metadata: str
    file_column: str
    text_column: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Item:
        name, entry = self._entry(row)
        captions = self._captions(name, entry)
        return Item(upright_rgb(self._path(name), name), captions, name)

    def captions(self, row: int) -> tuple[str, ...]:
        return self._captions(*self._entry(row))

    def size(self, row: int) -> tuple[int, int]:
        name, _ = self._entry(row)
        return upright_size(self._path(name), name)

    def value(self, row: int, column: str) -> Any:
        return self._entry(row)[1].get(column)

    @cached_property
    def identity(self) -> str:
        """sha256 over the metadata or caption files and every image's name and size in bytes."""
        digest = hashlib.sha256(f"folder:{self.file_column}:{self.text_column}\n".encode())
        digest.update(self.rows.data)
        for row in range(len(self)):
            try:
                path = self._path(self._entry(row)[0])
            except BrokenItem:
                continue  # its line is in the digest
            digest.update(f"\n{size_of(path)}".encode())
            if not self.metadata:
                text = path.with_suffix(".txt")
                digest.update(text.read_bytes() if text.is_file() else b"\0")
        return digest.hexdigest()

    def _entry(self, row: int) -> tuple[str, dict[str, Any]]:
        """(file name, columns) of a row."""
        line = f"{self.metadata} line {self.rows.spans[row][2]}"
        try:
            entry = self.rows[row]
        except UnicodeDecodeError:
            raise BrokenItem(line, "it is not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise BrokenItem(line, f"it is not JSON: {error}") from None
        name = entry.get(self.file_column) if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise BrokenItem(line, f"it has no {self.file_column}")
        if _TOO_MANY in entry:
            raise BrokenItem(name, "its line has more values than columns; quote a caption that has commas")
        return name, entry

    def _path(self, name: str) -> Path:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\0" in name:
            raise BrokenItem(name, "it points outside the folder")
        return self.root / pure

    def _captions(self, name: str, entry: dict[str, Any]) -> tuple[str, ...]:
        if self.metadata:
            return clean_captions(entry.get(self.text_column), name)
        beside = self._path(name).with_suffix(".txt")
        try:
            return caption_of_bytes(read_bytes(beside, "its caption", 1 << 20), name)
        except UserError as error:
            why = error.message if beside.exists() else "No such file or directory"
            raise BrokenItem(name, f"its caption {beside.name} cannot be read: {why}") from None


def metadata_file(folder: Path) -> Path | None:
    """The folder's metadata file, if it has one.

    Raises:
        UserError: when it has both.
    """
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has {' and '.join(METADATA)}", "keep the one that is right, and move the other away")
    return found[0] if found else None


def open_metadata(path: Path, image_column: str | None, text_column: str | None) -> FolderSource:
    """A folder with a metadata file.

    Raises:
        UserError: when the file cannot be read, is empty, or its columns are not clear.
    """
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "check its permissions") from None
    rows = Lines.parse(data) if path.suffix == ".jsonl" else Lines.dump(_csv_rows(data, path))
    columns: dict[str, bool] = {}
    for row in range(min(len(rows), _PEEK)):
        try:
            entry = rows[row]
        except (ValueError, RecursionError):
            continue  # a broken line is a broken row, found again when it is read
        if isinstance(entry, dict):
            for name, value in entry.items():
                columns[name] = columns.get(name, False) or is_text(value)
    columns.pop(_TOO_MANY, None)
    if not columns:
        example = '{"file_name": "0001.jpg", "text": "a red fox"}'
        raise UserError(f"{path} has no row that can be read", f"write one line per image, as in {example}")
    file_column = named_column(image_column or "file_name", columns, "--image-column", str(path))
    text = [name for name, is_text in columns.items() if is_text and name != file_column]
    others = [name for name in columns if name != file_column]
    return FolderSource(path.parent, rows, path.name, file_column, caption_column(text_column, others, text, str(path)))


def _csv_rows(data: bytes, path: Path) -> Iterator[dict[str, Any]]:
    # Bytes that are not UTF-8 become lone surrogates, which `clean_captions` finds: one bad row is not a bad file.
    reader = csv.DictReader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline=""), restkey=_TOO_MANY)
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV: {error}", "repair that line") from None


def open_beside(folder: Path) -> FolderSource | None:
    """A folder, with its subfolders, whose images have captions beside them; None when it has no images.

    Raises:
        UserError: when no image has one.
    """
    files = sorted(_files(folder))
    images = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        return None
    texts = {name for name in files if name.endswith(".txt")}
    if not any(str(PurePosixPath(name).with_suffix(".txt")) in texts for name in images):
        raise UserError(
            f"{folder} has {len(images)} images and no captions: no metadata.jsonl, no metadata.csv, "
            f"no {PurePosixPath(images[0]).with_suffix('.txt')} beside {images[0]}",
            'write metadata.jsonl, one line per image: {"file_name": "0001.jpg", "text": "a red fox"}',
        )
    return FolderSource(folder, Lines.dump({"file_name": name} for name in images), "", "file_name", "")


def open_classes(folder: Path) -> FolderSource | None:
    """Images in one folder per class, as ImageNet's; None when there are none.

    The caption is the number of the class: the place of its folder among all, in the order of their names.
    """
    images = [name for name in sorted(_files(folder)) if name.lower().endswith(IMAGE_SUFFIXES) and "/" in name]
    classes = {name: number for number, name in enumerate(sorted({name.split("/")[0] for name in images}))}
    rows = ({"file_name": name, "class": classes[name.split("/")[0]]} for name in images)
    return FolderSource(folder, Lines.dump(rows), "the folders", "file_name", "class") if images else None


def _files(folder: Path) -> Iterator[str]:
    """Names of all files, relative to the folder, linked folders included once."""
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(where).relative_to(folder)
        for name in names:
            try:
                name.encode()
            except UnicodeEncodeError:
                continue  # a name that no metadata file could hold either
            if not name.startswith("."):
                yield (base / name).as_posix()
