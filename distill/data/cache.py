"""Latents and text embeddings on disk, so that the VAE and the text encoders run once and not in every step.

```
key.json                      what the cache was made of and with; another one is not mixed in
captions.jsonl                every distinct caption once; the first is ""
latents-00000.safetensors     `latent_mean`, `latent_std`, `time_ids` of 256 rows, every variant of a row in turn;
                              with buckets `768x1344/latent_mean` and so on, of the rows of each
text-00000.safetensors        `context`, and `pooled` for SDXL, of 256 captions
*.json                        beside each of these, its sha256: the file is whole only where this is there and agrees
rows.jsonl, index.json        the rows with their names and captions; written last, when everything is there
```

`make_cache` writes it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from accel import records
from accel.errors import UserError
from accel.files import inside, read_json, sha256

from ..sources.item import BrokenItem, Lines
from .buckets import Buckets

FORMAT = 1
EARLIER = {"vae_dtype": "torch.float32"}  # what the keys of earlier versions do not say
_INDEX = {
    "key": {"variants": int, "shard": int, "dtype": str},
    "files": Mapping[str, {"sha256": str, "bytes": int}],  # type: ignore[valid-type]
    "broken": Mapping[str, str],
}
_OPEN_FILES = 16


@dataclass
class Cache:
    """A finished cache. Tensors are read from disk one example at a time, as float32.

    Attributes:
        folder: where it is.
        index: index.json.
        rows: one table per row: name, and either its captions (by number), place and bucket, or why it is broken.
        texts: the distinct captions.
    """

    folder: Path
    index: dict[str, Any]
    rows: Lines
    texts: Lines

    def __post_init__(self) -> None:
        self._files: OrderedDict[str, Any] = OrderedDict()

    def __len__(self) -> int:
        """Rows of the data set, broken ones included, so that the order of training is the same without the cache."""
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    @property
    def key(self) -> dict[str, Any]:
        return self.index["key"]

    @property
    def variants(self) -> int:
        """Placements kept of each row; epoch e shows variant e modulo this."""
        return self.key["variants"]

    @cached_property
    def broken(self) -> dict[str, str]:
        """Name to reason, of every row that is not in the cache."""
        return self.index["broken"]

    def row(self, row: int) -> tuple[str, list[int]]:
        """(name, numbers of its captions).

        Raises:
            BrokenItem: when the row could not be used when the cache was made.
        """
        entry = self.rows[row]
        if "broken" in entry:
            raise BrokenItem(entry["name"], entry["broken"])
        return entry["name"], entry["captions"]

    def caption(self, number: int) -> str:
        return self.texts[number]

    def prompt(self, number: int) -> dict[str, torch.Tensor]:
        """`context` [77, D] and for SDXL `pooled` [P] of a caption, float32."""
        shard, place = divmod(number, self.key["shard"])
        return self._read(shard_name("text", shard), place, "context")

    def latents(self, row: int, variant: int = 0) -> dict[str, torch.Tensor]:
        """`latent_mean` and `latent_std` [4, h, w] and `time_ids` [6] of a placement of a row, float32."""
        self.row(row)
        entry = self.rows[row]
        place = entry["place"] * self.variants + variant
        name, frame = shard_name("latents", row // self.key["shard"]), entry.get("frame", "")
        return self._read(name, place, "latent_mean", "latent_std", "time_ids", prefix=frame and f"{frame}/")

    def require(
        self, *, resolution: int, center_crop: bool, random_flip: bool, seed: int, buckets: Buckets | None = None
    ) -> None:
        """Refuse options that the cache was not made with.

        Raises:
            UserError: which names them.
        """
        asked = placement_key(resolution, center_crop, random_flip, self.variants, seed, buckets)
        refuse_difference(self.folder, self.key, self.key | asked)

    def verify(self) -> list[str]:
        """Names of the files that are not as they were written. Reads everything."""
        return [name for name, entry in self.index["files"].items() if not intact(self.folder / name, entry)]

    def _read(self, name: str, place: int, *wanted: str, prefix: str = "") -> dict[str, torch.Tensor]:
        try:
            file = self._files.pop(name, None) or safe_open(self.folder / name, framework="pt")
            self._files[name] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            names = [key.removeprefix(prefix) for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            if missing := set(wanted) - set(names):
                raise IndexError(f"it has no {', '.join(sorted(missing))}")
            return {key: file.get_slice(prefix + key)[place : place + 1][0].float() for key in names}
        except (OSError, SafetensorError, IndexError, TypeError, RuntimeError) as error:
            raise UserError(f"{self.folder / name} is damaged ({error})", "start again: it is made anew") from None


def open_cache(folder: str | Path) -> Cache:
    """Open a finished cache. Sizes of all files are checked, digests of the two lists; `verify` checks the rest.

    Raises:
        UserError: when it is missing, unfinished, damaged, or of another version.
    """
    folder = Path(folder)
    fix = "make it again: start the training with the same options"
    index = read_json(folder / "index.json", "the cache's index.json")
    try:
        records.read({"key": {"format": Any}}, index, "index.json")
        if index["key"]["format"] != FORMAT:
            raise UserError(f"{folder} is a cache of another version of accel", "choose another folder")
        records.read(_INDEX, index, "index.json")
        if min(index["key"]["shard"], index["key"]["variants"]) < 1:
            raise ValueError("index.json: key: shard and variants are at least 1")
        for name, entry in index["files"].items():
            if inside(folder, name, "the file of a cache").stat().st_size != entry["bytes"]:
                raise UserError(f"{folder / name} is damaged: its size is not {entry['bytes']} bytes", fix)
        lists = {}
        for name in ("rows.jsonl", "captions.jsonl"):
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != index["files"][name]["sha256"]:
                raise UserError(f"{folder / name} is damaged", fix)
            lists[name] = Lines.parse(data)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}", fix) from None
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder / 'index.json'} is damaged ({error})", fix) from None
    return Cache(folder, index, lists["rows.jsonl"], lists["captions.jsonl"])


def placement_key(
    resolution: int, center_crop: bool, random_flip: bool, variants: int, seed: int, buckets: Buckets | None = None
) -> dict[str, Any]:
    drawn = random_flip or not center_crop
    return dict(
        buckets=None if buckets is None else [list(shape) for shape in buckets.shapes],
        resolution=resolution,
        center_crop=center_crop,
        random_flip=random_flip,
        variants=variants if drawn else 1,
        seed=seed if drawn else None,
    )


def shard_name(kind: str, number: int) -> str:
    return f"{kind}-{number:05}.safetensors"


_WORDS = dict(
    data="other images or captions", encoders="another VAE or text encoder", format="another version of accel"
)


def refuse_difference(folder: Path, had: Any, asked: dict[str, Any]) -> None:
    if not isinstance(had, dict):
        raise UserError(f"{folder / 'key.json'} is damaged", "choose another folder for the cache")
    had = EARLIER | had
    if not (other := [name for name in asked if had.get(name) != asked[name]]):
        return
    changes = [_WORDS.get(name) or f"{name} {had.get(name)}, where {asked[name]} is wanted" for name in other]
    raise UserError(
        f"the cache in {folder} was made with {'; '.join(changes)}",
        f"choose another folder for the cache, or remove this one: rm -r {folder}",
    )


def intact(path: Path, entry: dict[str, Any]) -> bool:
    try:
        return path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]
    except OSError:
        return False
