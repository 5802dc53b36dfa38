"""Make a cache (see `cache`): latents of every image and embeddings of every caption, by all processes of a run.

A process that is killed leaves files with their digests, which the next one keeps, and one that has none or a part
of it, which is made again. Files are divided over the processes by their number, so processes never write the same one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized

from accel import interrupt
from accel.dtypes import check_dtype, torch_dtype
from accel.errors import UserError
from accel.files import cache_dir, digest_of, disk_error, read_json, require_space, sweep, write_bytes, write_json

from ..sources.item import BrokenItem, ImageSource, Lines
from . import distributed
from .buckets import Buckets
from .cache import EARLIER, FORMAT, Cache, intact, open_cache, placement_key, refuse_difference, shard_name
from .crop import pixels, time_ids
from .encoders import Encoders
from .examples import FIRST, frame_of, placement_of
from .noted_files import entry_of, is_kept, note_of, put, read_note

DTYPES = ("float16", "float32")
PATIENCE = 3600.0  # seconds without a new file from the other processes

Progress = Callable[[str, float], None]


def build(
    source: ImageSource,
    encoders: Encoders,
    folder: str | Path | None = None,
    *,
    resolution: int,
    center_crop: bool,
    random_flip: bool,
    seed: int,
    buckets: Buckets | None = None,
    variants: int = 1,
    dtype: str = "float16",
    batch: int = 8,
    shard: int = 256,
    rank: int = 0,
    world: int = 1,
    progress: Progress = lambda stage, fraction: None,
) -> Cache:
    """Make the cache of a data set, or finish or repair one, and open it. All processes of a run call it.

    Args:
        source: the images.
        encoders: what makes latents and text embeddings of them.
        folder: where; None for one in this user's cache, named after all that decides the content.
        resolution: side of the square in pixels.
        center_crop: cut out the middle, else any part.
        random_flip: mirror every other image.
        seed: of the placements, the run's own.
        buckets: the frame of every row; None for squares.
        variants: placements kept of each image. Without random crops and flips there is one.
        dtype: of the tensors on disk, float16 or float32.
        batch: images or captions encoded at once.
        shard: rows or captions in one file.
        rank: this process among `world`. Every process makes its share and waits for the others.
        progress: called after every batch with a stage ("texts", "latents") and the share of it that is done.

    Raises:
        UserError: when the folder holds something else or a cache made otherwise, most images are broken, space is
            short, or the other processes have stopped.
    """
    check_dtype(dtype, DTYPES, "cache dtype")
    for name, value in dict(variants=variants, batch=batch, shard=shard).items():
        if value < 1:
            raise UserError(f"{name} is {value}", "give 1 or more")
    if resolution < encoders.factor or resolution % encoders.factor:
        raise UserError(
            f"{resolution} pixels are not a multiple of {encoders.factor}, by which the VAE shrinks an image",
            f"try {max(1, round(resolution / encoders.factor)) * encoders.factor}",
        )
    placement = placement_key(resolution, center_crop, random_flip, variants, seed, buckets)
    key = dict(
        format=FORMAT,
        data=source.identity,
        encoders=encoders.digest,
        text_dtype=str(encoders.dtype),
        vae_dtype=str(encoders.vae_dtype),
        dtype=dtype,
        shard=shard,
        **placement,
    )
    folder = Path(folder) if folder is not None else cache_dir() / "latents" / digest_of(key)[:20]
    key = _as_finished(folder, key)
    _claim(folder, key)
    maker = _Maker(source, encoders, folder, key, batch, rank, world, progress, buckets)
    with _disk(folder):
        maker.run()
        files = [note_of(folder, name) for name in maker.names()]
        if missing := distributed.wait_for_files(files, PATIENCE):
            raise UserError(
                f"{len(missing)} files are missing in {folder}, the first one {missing[0].stem}; "
                f"nothing new has come for {PATIENCE:g} seconds",
                "a process of this run has stopped; start again: what is finished is kept",
            )
        distributed.barrier()  # a file of an earlier run may just be found damaged by another process
        # All write the same bytes, so without a process group it does not matter who is last.
        if rank == 0 or not distributed.grouped():
            maker.finish()
        distributed.barrier()
    return open_cache(folder)


def _as_finished(folder: Path, key: dict[str, Any]) -> dict[str, Any]:
    """The key, in float32 where the folder holds a cache that is finished and in float32: it serves every precision."""
    if not ((folder / "index.json").is_file() and (folder / "key.json").is_file()):
        return key
    had = read_json(folder / "key.json", "the cache's key.json")
    exact = {"dtype": "float32", "text_dtype": "torch.float32", "vae_dtype": "torch.float32"}
    if not isinstance(had, dict):
        return key
    return key | {name: value for name, value in exact.items() if (EARLIER | had).get(name) == value}


def _claim(folder: Path, key: dict[str, Any]) -> None:
    """Take an empty folder, or go on with one of the same key."""
    path = folder / "key.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "give a folder for the cache")
    if path.is_file():
        return refuse_difference(folder, read_json(path, "the cache's key.json"), key)
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        if not path.is_file():  # another process may have claimed it in this moment
            raise UserError(f"{folder} is not empty and not a cache", "choose another folder for the cache")
        return refuse_difference(folder, read_json(path, "the cache's key.json"), key)
    with _disk(folder):
        write_json(path, key)


class _Maker:
    """One process's share of the work."""

    def __init__(
        self,
        source: ImageSource,
        encoders: Encoders,
        folder: Path,
        key: dict[str, Any],
        batch: int,
        rank: int,
        world: int,
        progress: Progress,
        buckets: Buckets | None = None,
    ):
        self.source, self.encoders, self.folder, self.key, self.batch = source, encoders, folder, key, batch
        self.rank, self.world, self.progress, self.buckets = rank, world, progress, buckets
        self.shard, self.dtype = key["shard"], torch_dtype(key["dtype"])
        self.tried, self.failed = 0, 0
        self.texts: dict[str, int] = {}

    def names(self) -> list[str]:
        """All files that come before the index."""
        return ["captions.jsonl", *self._shards("text", len(self.texts)), *self._shards("latents", len(self.source))]

    def _shards(self, kind: str, count: int) -> list[str]:
        return [shard_name(kind, number) for number in range(-(-count // self.shard))]

    def run(self) -> None:
        sweep(self.folder)
        self._list_texts()
        for stage, kind, count, make in (
            ("texts", "text", len(self.texts), self._text_shard),
            ("latents", "latents", len(self.source), self._latent_shard),
        ):
            own = list(enumerate(self._shards(kind, count)))[self.rank :: self.world]
            missing = []
            for number, name in own:
                interrupt.check()
                if not is_kept(self.folder, name):
                    missing.append(number)
            if missing:
                self._require_space(kind, sum(min(self.shard, count - n * self.shard) for n in missing))
            total = sum(min(self.shard, count - number * self.shard) for number, _ in own)
            done = total - sum(min(self.shard, count - number * self.shard) for number in missing)
            self.progress(stage, done / total if total else 1.0)
            for number in missing:
                rows = range(number * self.shard, min(count, (number + 1) * self.shard))
                make(shard_name(kind, number), rows, lambda more: self.progress(stage, (done + more) / total))  # noqa: B023
                done += len(rows)

    def finish(self) -> None:
        """The list of rows, and the index, from what lies beside the shards."""
        files, rows, broken = {}, [], {}
        for name in self.names():
            note = read_json(note_of(self.folder, name), "a part of the cache")
            files[name] = {"sha256": note["sha256"], "bytes": note["bytes"]}
            rows += note.get("rows", [])
        for row in rows:
            if "broken" in row:
                broken[row["name"]] = row["broken"]
        if broken and all("broken" in row for row in rows):
            self._give_up(f"all {len(rows)}", *next(iter(broken.items())))
        data = _lines(rows)
        files["rows.jsonl"] = entry_of(data)
        write_bytes(self.folder / "rows.jsonl", data)
        write_json(self.folder / "index.json", {"key": self.key, "files": files, "broken": broken})

    # texts

    def _list_texts(self) -> None:
        """Number the distinct captions, in the order of the rows."""
        name = "captions.jsonl"
        entry = read_note(self.folder, name)
        # Only the first process repairs the list; the others may find it missing and then work it out themselves.
        if is_kept(self.folder, name) if self.rank == 0 else entry and intact(self.folder / name, entry):
            lines = Lines.parse((self.folder / name).read_bytes())
            self.texts = {lines[row]: row for row in range(len(lines))}
            return
        self.texts = {"": 0}
        for row in range(len(self.source)):
            if row % 1000 == 0:
                interrupt.check()
            try:
                for caption in self.source.captions(row):
                    self.texts.setdefault(caption, len(self.texts))
            except BrokenItem:
                continue  # reported when its image is encoded
        if self.rank == 0:
            put(self.folder, name, _lines(self.texts))

    def _text_shard(self, name: str, rows: range, progress: Callable[[int], None]) -> None:
        self._require_same(name, "text_dtype", self.encoders.dtype, "--mixed-precision no")
        texts = list(self.texts)[rows.start : rows.stop]
        made = []
        for start in range(0, len(texts), self.batch):
            interrupt.check()
            part = texts[start : start + self.batch]
            made.append({key: self._cast(value, part) for key, value in self.encoders.prompts(part).items()})
            progress(start + len(part))
        put(self.folder, name, serialized({key: torch.cat([part[key] for part in made]) for key in made[0]}))

    def _cast(self, value: torch.Tensor, texts: list[str]) -> torch.Tensor:
        cast = value.to("cpu", self.dtype)
        if not cast.isfinite().all():
            at = next(row for row in range(len(texts)) if not cast[row].isfinite().all())
            fix = "keep the cache in float32 (--cache-dtype float32)" if value.isfinite().all() else "check the model"
            raise UserError(f"the text embedding of {texts[at]!r:.80} does not fit {self.key['dtype']}", fix)
        return cast

    def _require_same(self, name: str, field: str, dtype: torch.dtype, option: str) -> None:
        """A part of a finished cache that was lost is made again as the others were, or not at all."""
        if (made_in := self.key.get(field, str(dtype))) != str(dtype):
            raise UserError(
                f"{self.folder / name} is missing or damaged, and was made in {made_in}",
                f"{option} makes it again, or choose another folder for the cache",
            )

    # latents

    def _latent_shard(self, name: str, rows: range, progress: Callable[[int], None]) -> None:
        self._require_same(name, "vae_dtype", self.encoders.vae_dtype, "--vae-dtype float32")
        listed: list[dict[str, Any]] = []
        waiting: dict[str, list[dict[str, Any]]] = {}  # by bucket: read and placed, not encoded yet
        made: dict[str, list[torch.Tensor]] = {}
        kept: Counter[str] = Counter()
        if self.buckets is None:  # a file of broken rows alone has its tensors too
            size = self.key["resolution"] // self.encoders.factor
            for key in ("latent_mean", "latent_std"):
                made[key] = [torch.zeros(0, self.encoders.latent_channels, size, size, dtype=self.dtype)]
            made["time_ids"] = [torch.zeros(0, 6)]

        def encode(frame: str, ready: list[dict[str, Any]]) -> None:
            interrupt.check()
            squares = torch.cat([row.pop("pixels") for row in ready])
            parts = [self.encoders.images(part) for part in squares.split(self.batch)]
            latents = {key: torch.cat([part[key] for part in parts]).to("cpu", self.dtype) for key in parts[0]}
            latents["time_ids"] = torch.cat([row.pop("time_ids") for row in ready])
            per_row = {key: value.unflatten(0, (len(ready), -1)) for key, value in latents.items()}
            for at, row in enumerate(ready):
                values = {key: value[at] for key, value in per_row.items()}
                if not all(value.isfinite().all() for value in values.values()):
                    row.pop("captions")
                    row["broken"] = f"its latents are not finite in {self.key['dtype']}"
                    continue
                row["place"] = kept[frame]
                kept[frame] += 1
                for key, value in values.items():
                    made.setdefault(f"{frame}/{key}" if frame else key, []).append(value)

        for row in self._ahead(rows):
            listed.append(row)
            if "broken" not in row:
                frame = row.get("frame", "")
                ready = waiting.setdefault(frame, [])
                ready.append(row)
                if len(ready) * self.key["variants"] >= self.batch:
                    encode(frame, waiting.pop(frame))
            self._watch(row)
            progress(len(listed))
        for frame, ready in waiting.items():
            encode(frame, ready)
        put(
            self.folder,
            name,
            serialized({key: torch.cat(parts).contiguous() for key, parts in made.items()}),
            rows=listed,
        )

    def _ahead(self, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Rows read and placed, in order, by a few threads that stay two batches ahead of the encoder."""
        threads = max(1, min(8, (os.cpu_count() or 1) // self.world))
        pool = ThreadPoolExecutor(threads)
        try:
            coming: deque[Any] = deque()
            for row in rows:
                coming.append(pool.submit(self._placed, row))
                if len(coming) > 2 * self.batch:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _placed(self, row: int) -> dict[str, Any]:
        key = self.key
        try:
            item = self.source[row]
            numbers = [self.texts[caption] for caption in item.captions]
            frame = frame_of(item, row, self.buckets, key["resolution"])
            placements = [
                placement_of(
                    item,
                    row,
                    variant,
                    len(self.source),
                    seed=key["seed"] or 0,
                    frame=frame,
                    center_crop=key["center_crop"],
                    random_flip=key["random_flip"],
                )
                for variant in range(key["variants"])
            ]
        except BrokenItem as broken:
            return {"name": broken.name, "broken": broken.reason}
        except KeyError:
            return {"name": item.name, "broken": "its caption changed while the cache was made"}
        ids = [time_ids(placement, item.image.size, frame) for placement in placements]
        bucket = {} if isinstance(frame, int) else {"frame": f"{frame[0]}x{frame[1]}"}
        return bucket | {
            "name": item.name,
            "captions": numbers,
            "pixels": torch.stack([pixels(item.image, placement, frame) for placement in placements]),
            "time_ids": torch.tensor(ids, dtype=torch.float32),
        }

    def _watch(self, row: dict[str, Any]) -> None:
        self.tried += 1
        self.failed += "broken" in row
        if self.tried <= FIRST and self.failed > FIRST // 2:
            self._give_up(f"{self.failed} of the first {self.tried}", row["name"], row["broken"])

    def _give_up(self, how_many: str, name: str, reason: str) -> None:
        raise UserError(
            f"{how_many} training images cannot be used; {name}: {reason}",
            "check the data, its columns (--image-column, --caption-column), and that all of it is mounted",
        )

    def _require_space(self, kind: str, count: int) -> None:
        if kind == "text":
            each = sum(value[0].numel() for value in self.encoders.prompts([""]).values())
        else:
            each = 8 * (self.key["resolution"] // self.encoders.factor) ** 2 * self.key["variants"]
        require_space(self.folder, count * self.world * each * self.dtype.itemsize)


# ------------------------------------------------------------------------------------------------------------- files


def _lines(values: Iterable[Any]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error, folder) from error
