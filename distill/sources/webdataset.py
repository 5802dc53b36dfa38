"""Webdataset shards: images and captions in .tar files, read in any order.

A sample is the files of one name up to the first dot, as in `000123.jpg`, `000123.txt`, `000123.json`. Every shard is
read through once for the places of its files; these are kept in the user's cache. After that any row is two reads, so
training starts at any step at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

from accel.errors import Notice, UserError
from accel.files import cache_dir, digest_of, parse_json, read_bytes, write_json

from .item import (
    IMAGE_SUFFIXES,
    BrokenItem,
    Item,
    Lines,
    caption_column,
    caption_of_bytes,
    clean_captions,
    is_text,
    upright_rgb,
    upright_size,
)

_VERSION = 1
_SMALL = 1 << 20  # bytes; larger files are not captions
_LARGEST = 1 << 28  # bytes; no image or caption is larger
_HEADER = 1 << 16  # bytes of an image that are read for its size
_PEEK = 50  # samples read to learn the columns of their json files
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class TarSource:
    """Samples of shards.

    Attributes:
        shards: the files, in order.
        rows: {"shard": number, "key": name of the sample, "files": {suffix: [first byte, bytes]}} of every sample.
        digests: of each shard's captions and other small files.
        image: suffix of the image; "" takes the only image of a sample.
        caption: suffix of the text file, or `json`.
        json_key: of the caption in the json file, "" for a text file.
    """

    shards: tuple[Path, ...]
    rows: Lines
    digests: tuple[str, ...]
    image: str
    caption: str
    json_key: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Item:
        entry = self.rows[row]
        name = self._name(entry)
        captions = self._captions(entry, name)
        return Item(upright_rgb(self._read(entry, self._image(entry, name), name), name), captions, name)

    def size(self, row: int) -> tuple[int, int]:
        entry = self.rows[row]
        name = self._name(entry)
        suffix = self._image(entry, name)
        try:
            return upright_size(self._read(entry, suffix, name, first=_HEADER), name)
        except BrokenItem:  # a header may be longer
            return upright_size(self._read(entry, suffix, name), name)

    def value(self, row: int, column: str) -> Any:
        entry = self.rows[row]
        name = self._name(entry)
        return _table(self._read(entry, "json", name), name).get(column) if "json" in entry["files"] else None

    def captions(self, row: int) -> tuple[str, ...]:
        entry = self.rows[row]
        return self._captions(entry, self._name(entry))

    @cached_property
    def identity(self) -> str:
        """sha256 over the names and sizes of all files in the shards, and the content of the captions."""
        digest = hashlib.sha256(f"tar:{self.image}:{self.caption}:{self.json_key}\n".encode())
        digest.update("\n".join(self.digests).encode())
        digest.update(self.rows.data)
        return digest.hexdigest()

    def _name(self, entry: dict[str, Any]) -> str:
        return f"{self.shards[entry['shard']].name}/{entry['key']}"

    def _image(self, entry: dict[str, Any], name: str) -> str:
        """The suffix of a sample's image."""
        images = [self.image] if self.image else [suffix for suffix in entry["files"] if _is_image(suffix)]
        if len(images) > 1:
            raise BrokenItem(name, f"it has several images ({', '.join(images)}); name one: --image-column")
        if not images:
            raise BrokenItem(name, f"it has no image; it has {', '.join(entry['files'])}")
        return images[0]

    def _captions(self, entry: dict[str, Any], name: str) -> tuple[str, ...]:
        data = self._read(entry, self.caption, name)
        if not self.json_key:
            return caption_of_bytes(data, name)
        return clean_captions(_table(data, name).get(self.json_key), name)

    def _read(self, entry: dict[str, Any], suffix: str, name: str, first: int = _LARGEST) -> bytes:
        place = entry["files"].get(suffix)
        if place is None:
            raise BrokenItem(name, f"it has no .{suffix}; it has {', '.join(entry['files'])}")
        if place[1] < 0:
            raise BrokenItem(name, f"its shard has several .{suffix} of that name")
        if place[1] > _LARGEST:
            raise BrokenItem(name, f"its .{suffix} has {place[1]:,} bytes")
        try:
            return _slice(self.shards[entry["shard"]], place[0], min(place[1], first))
        except (OSError, EOFError) as error:
            raise BrokenItem(name, f"its .{suffix} cannot be read: {error}") from None


def _slice(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise EOFError("the shard ends before it does")
    return data


def _is_image(suffix: str) -> bool:
    return f".{suffix}" in IMAGE_SUFFIXES


def _table(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError as error:
        what = "UTF-8" if isinstance(error, UnicodeDecodeError) else f"JSON: {error}"
        raise BrokenItem(name, f"its .json is not {what}") from None
    if not isinstance(value, dict):
        raise BrokenItem(name, "its .json is not a JSON object")
    return value


def expand(pattern: str) -> list[Path]:
    """Paths of a pattern: `{000..099}` and `{a,b}` as in a shell, then `*`, `?` and `[...]`.

    Raises:
        UserError: when nothing matches, or a shard of a range is missing.
    """
    names = list(_braces(pattern))
    found: list[Path] = []
    for name in names:
        found += sorted(Path(match) for match in glob(name)) if any(char in name for char in "*?[") else [Path(name)]
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        what = (
            f"{len(missing)} of {len(found)} shards of {pattern} are missing, the first one is {missing[0]}"
            if missing
            else f"no file matches {pattern}"
        )
        raise UserError(what, "check the folder and the numbers, and put the pattern in quotes")
    return found


def _braces(pattern: str) -> Iterator[str]:
    if not (group := _BRACES.search(pattern)):
        yield pattern
        return
    if numbers := _RANGE.fullmatch(group[1]):
        first, last = numbers.groups()
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) and max(len(first), len(last)) > 1 else 0
        values: Iterable[str] = (f"{number:0{width}}" for number in range(int(first), int(last) + 1))
    else:
        values = group[1].split(",")
    for value in values:
        yield from _braces(pattern[: group.start()] + value + pattern[group.end() :])


def open_tars(paths: Sequence[Path], image: str | None, caption: str | None) -> TarSource:
    """Index shards, or take their index from the user's cache.

    Raises:
        UserError: when no shard has samples, or it is not clear what the captions are.
    """
    digests: list[str] = []
    suffixes: dict[str, None] = {}

    def rows() -> Iterator[dict[str, Any]]:
        for number, path in enumerate(paths):
            entry = _index(path)
            digests.append(entry["digest"])
            for key, files in entry["samples"]:
                suffixes.update(dict.fromkeys(files))
                yield {"shard": number, "key": key, "files": files}

    listed = Lines.dump(rows())
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    if not len(listed):
        raise UserError(f"{where}: no samples", "shards hold files such as 000123.jpg and 000123.txt")
    image = (image or "").lower().removeprefix(".")
    if image and image not in suffixes:
        raise UserError(f"{where}: no sample has a .{image}; there are {_listed(suffixes)}", "--image-column with one")
    if not image and not any(map(_is_image, suffixes)):
        raise UserError(f"{where}: no sample has an image; there are {_listed(suffixes)}", "name it: --image-column")
    source = TarSource(tuple(paths), listed, tuple(digests), image, "json", "")
    suffix, key = _caption_place(source, suffixes, caption, where)
    return TarSource(source.shards, source.rows, source.digests, image, suffix, key)


def _listed(suffixes: Iterable[str]) -> str:
    return ", ".join(f".{suffix}" for suffix in suffixes)


def _caption_place(source: TarSource, suffixes: dict[str, None], asked: str | None, where: str) -> tuple[str, str]:
    """(suffix, key in the json file) of the captions."""
    name = (asked or "").removeprefix(".")
    if name in suffixes and not _is_image(name) and name != "json":
        return name, ""
    if asked is None and "txt" in suffixes:
        return "txt", ""
    if "json" not in suffixes:
        looked = f"a .{name}" if asked else "captions: no .txt, no .json"
        raise UserError(f"{where}: no sample has {looked}; there are {_listed(suffixes)}", "--caption-column with one")
    columns: dict[str, bool] = {}
    for row in range(min(len(source), _PEEK)):
        entry = source.rows[row]
        with contextlib.suppress(BrokenItem):
            for key, value in _table(source._read(entry, "json", ""), "").items():
                columns[key] = columns.get(key, False) or is_text(value)
    text = [key for key, is_text in columns.items() if is_text]
    return "json", caption_column(asked, columns, text, f"the .json of {where}")


# ------------------------------------------------------------------------------------------------------------- index


def _index(path: Path) -> dict[str, Any]:
    """Samples and caption digest of one shard: {"samples": [[key, {suffix: [offset, bytes]}]], "digest": sha256}.

    A suffix that a sample has twice has -1 bytes.
    """
    try:
        state = path.stat()
        key = dict(version=_VERSION, path=os.path.abspath(path), bytes=state.st_size, changed=state.st_mtime_ns)
        kept = cache_dir() / "webdataset" / f"{digest_of(key)}.json"
        if (entry := _kept_index(kept)) is None:
            entry = _read_index(path)
            with contextlib.suppress(OSError, UserError):  # a cache that cannot be written costs time, nothing else
                write_json(kept, entry)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "check its permissions, or leave it out") from None
    if entry["problem"]:
        count = len(entry["samples"])
        warnings.warn(Notice(f"{path} {entry['problem']}; {count} samples were found in it"), stacklevel=4)
    return entry


def _kept_index(path: Path) -> dict[str, Any] | None:
    try:
        entry = parse_json(read_bytes(path, "the index of a shard", 1 << 30))
        sound = {"samples", "digest", "problem"} <= set(entry) and all(len(sample) == 2 for sample in entry["samples"])
        return entry if sound else None
    except (UserError, ValueError, TypeError):
        return None


def _read_index(path: Path) -> dict[str, Any]:
    samples: dict[str, dict[str, list[int]]] = {}
    digest, problem = hashlib.sha256(), ""
    try:
        with tarfile.open(path, "r:", errors="replace") as tar:
            for member in _members(tar):
                folder, slash, file = member.name.rpartition("/")
                stem, dot, suffix = file.partition(".")
                if not (member.isreg() and stem and dot) or member.issparse():
                    continue
                suffix = suffix.lower()
                files = samples.setdefault(folder + slash + stem, {})
                if not _is_image(suffix.rpartition(".")[2]):
                    digest.update(_at(path, member.offset_data, member.size) if member.size <= _SMALL else b"")
                files[suffix] = [member.offset_data, -1 if suffix in files else member.size]
            # tarfile takes a damaged header for the end; the real end is a block of zeros.
            if _at(path, tar.offset, 512) != bytes(512):
                problem = "ends without the mark of a tar file's end, so it may be damaged or cut short"
    except (tarfile.TarError, EOFError, ValueError) as error:
        problem = f"is damaged ({error})" if samples else f"is not a tar file ({error})"
    return {"samples": list(samples.items()), "digest": digest.hexdigest(), "problem": problem}


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members one by one; tarfile's own list of them would only grow."""
    for _ in itertools.count():
        if (member := tar.next()) is None:
            return
        tar.members = []
        yield member


def _at(path: Path, offset: int, size: int) -> bytes:
    with contextlib.suppress(EOFError):
        return _slice(path, offset, size)
    return b"\0cut short"
