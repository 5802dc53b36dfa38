"""Training examples by their number in the run: an image or its latents, a caption, a placement."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from accel.errors import UserError

from ..sources.item import BrokenItem, ImageSource, Item
from . import rng
from .buckets import Buckets
from .crop import Frame, Placement, pixels, place, time_ids
from .draws import Ahead
from .order import Order, order_of

if TYPE_CHECKING:
    from .cache import Cache

FIRST = 100  # rows after which it is clear whether most of the data is broken


class Examples(Dataset):
    """Example i of a run, the same one in every process and at every access.

    A row that is broken is replaced by the next one that is not, for that example only; all others stay where they
    are. `broken` names what was passed over.

    Args:
        source: the images; None when `cache` holds all that is needed of them.
        seed: of the run.
        resolution: side of the square in pixels, a multiple of what the VAE shrinks by.
        center_crop: cut the middle out, else any part.
        random_flip: mirror every other image.
        caption_dropout: share of examples whose caption becomes "", which is what guidance needs to be taught.
        size_conditioning: add `time_ids`, for SDXL.
        cache: latents and text embeddings on disk, instead of pixels.
        order: which row an example shows; None for all rows, in a shuffle of every epoch.
        buckets: the frame of every row; None for squares.
        on_broken: called once for every broken row, in the process that trains: (name, reason).

    Attributes:
        broken: name to reason, of all broken rows met so far.

    Raises:
        UserError: when the options are out of range, or are not those of the cache.
    """

    def __init__(
        self,
        source: ImageSource | None,
        *,
        seed: int,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = True,
        caption_dropout: float = 0.0,
        size_conditioning: bool = False,
        cache: Cache | None = None,
        order: Order | None = None,
        buckets: Buckets | None = None,
        on_broken: Callable[[str, str], None] | None = None,
    ):
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"caption dropout {caption_dropout} is not a share", "give 0 to 1; 0.1 is usual")
        if resolution < 1:
            raise UserError(f"a resolution of {resolution} pixels is not possible", "512 for SD1.x, 1024 for SDXL")
        if source is None and cache is None:
            raise ValueError("neither a source nor a cache")
        self.source, self.cache = source, cache
        self.seed, self.resolution = seed, resolution
        self.center_crop, self.random_flip = center_crop, random_flip
        self.caption_dropout, self.size_conditioning = caption_dropout, size_conditioning
        self.on_broken = on_broken
        self.broken: dict[str, str] = {}
        self._count = len(cache if cache is not None else source)
        if not self._count:
            raise UserError("there are no training images", "give a folder, shards or a dataset that has some")
        self.order = order or order_of([self._count], seed)
        self.buckets = buckets
        self._known: dict[int, BrokenItem] = {}
        self._tried: set[int] = set()
        if cache is not None:
            cache.require(
                resolution=resolution, center_crop=center_crop, random_flip=random_flip, seed=seed, buckets=buckets
            )

    def __len__(self) -> int:
        """Rows that are shown, that is examples per epoch. Indices go on after it."""
        return self.order.count

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"on_broken": None}  # worker processes report through the examples they send

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Example `index` of the run.

        Keys: `index`; `name`; `caption`; `replaced`, the broken rows passed over (a list of dicts with row, name and
        reason); `pixels` float32 [3, R, R] in -1..1, or as its bucket says, or from a cache `latent_mean` and
        `latent_std` float32 [4, r, r], `context` float32 [77, D] and for SDXL `pooled` float32 [P]; with size
        conditioning `time_ids` float32 [6].

        Raises:
            UserError: when all rows are broken, or most of the first hundred.
        """
        rows, place, epoch = self.order(index)
        replaced: list[dict[str, Any]] = []
        for candidate in map(int, itertools.chain(rows[place:], rows[:place])):
            try:
                example = self._example(index, candidate, epoch)
                break
            except BrokenItem as broken:
                replaced.append({"row": candidate, "name": broken.name, "reason": broken.reason})
        else:
            self._give_up(f"all {len(rows)}")
        if get_worker_info() is None:
            self.note(replaced)
        return example | {"replaced": replaced}

    def note(self, replaced: Sequence[dict[str, Any]]) -> None:
        """Remember and report broken rows, each one once."""
        for entry in replaced:
            if entry["name"] not in self.broken:
                self.broken[entry["name"]] = entry["reason"]
                if self.on_broken:
                    self.on_broken(entry["name"], entry["reason"])

    def _example(self, index: int, row: int, epoch: int) -> dict[str, Any]:
        if row in self._known:
            raise self._known[row]
        try:
            read = self._decoded if self.cache is None else self._cached
            example = read(index, row, epoch)
        except BrokenItem as broken:
            self._known[row] = broken
            self._watch(row)
            raise
        self._watch(row)
        return {"index": index} | example

    def _watch(self, row: int) -> None:
        """Stop early when most rows are broken: then it is the data set or its options, not a few images."""
        if len(self._tried) >= FIRST:
            return
        self._tried.add(row)
        if len(self._known) > FIRST // 2:
            self._give_up(f"{len(self._known)} of the first {len(self._tried)}")

    def _give_up(self, how_many: str) -> None:
        first = next(iter(self._known.values()))
        raise UserError(
            f"{how_many} training images cannot be used; {first.name}: {first.reason}",
            "check the data, its columns (--image-column, --caption-column), and that all of it is mounted",
        )

    def _decoded(self, index: int, row: int, epoch: int) -> dict[str, Any]:
        item = self.source[row]
        frame = frame_of(item, row, self.buckets, self.resolution)
        placement = placement_of(
            item,
            row,
            epoch,
            self._count,
            seed=self.seed,
            frame=frame,
            center_crop=self.center_crop,
            random_flip=self.random_flip,
        )
        caption = item.captions[self._caption(index, len(item.captions))] if self._keeps_caption(index) else ""
        example = {"name": item.name, "caption": caption, "pixels": pixels(item.image, placement, frame)}
        if self.size_conditioning:
            ids = time_ids(placement, item.image.size, frame)
            example["time_ids"] = torch.tensor(ids, dtype=torch.float32)
        return example

    def _cached(self, index: int, row: int, epoch: int) -> dict[str, Any]:
        name, captions = self.cache.row(row)
        chosen = captions[self._caption(index, len(captions))] if self._keeps_caption(index) else 0
        latents = self.cache.latents(row, epoch % self.cache.variants)
        if not self.size_conditioning:
            latents.pop("time_ids", None)
        return {"name": name, "caption": self.cache.caption(chosen)} | latents | self.cache.prompt(chosen)

    def _caption(self, index: int, count: int) -> int:
        return int(rng.generator(self.seed, index, "caption").integers(count))

    def _keeps_caption(self, index: int) -> bool:
        return rng.generator(self.seed, index, "dropout").random() >= self.caption_dropout


def frame_of(item: Item, row: int, buckets: Buckets | None, resolution: int) -> Frame:
    """The frame that a row is cut for.

    Raises:
        BrokenItem: when the row has no bucket.
    """
    if buckets is None:
        return resolution
    if buckets.of_row[row] < 0:
        raise BrokenItem(item.name, "its size could not be read when the buckets were made")
    return buckets.shape(row)


def placement_of(
    item: Item, row: int, epoch: int, count: int, *, seed: int, frame: Frame, center_crop: bool, random_flip: bool
) -> Placement:
    """The placement of a row in an epoch.

    Drawn by row and epoch and not by example, so that a cache, which knows no examples, draws the same ones.

    Raises:
        BrokenItem: when the image is too narrow.
    """
    # A crop in the middle draws once and then takes turns, see `place`.
    numbers = rng.generator(seed, (0 if center_crop else epoch) * count + row, "placement")
    options = dict(center_crop=center_crop, random_flip=random_flip, epoch=epoch)
    try:
        return place(item.image.size, frame, rng=numbers, **options)
    except ValueError as error:
        raise BrokenItem(item.name, str(error)) from None


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Examples to a batch: tensors are stacked, everything else is listed, `replaced` is one list."""
    batch: dict[str, Any] = {}
    for key, first in examples[0].items():
        values = [example[key] for example in examples]
        batch[key] = torch.stack(values) if isinstance(first, torch.Tensor) else values
    return batch | {"replaced": [entry for example in examples for entry in example["replaced"]]}


def loader(
    examples: Examples,
    *,
    step: int = 0,
    batch: int,
    accumulation: int = 1,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    ahead: Ahead | None = None,
) -> Iterator[dict[str, Any]]:
    """Endless micro-batches of one process, from any step on, without reading what lies before it.

    Broken rows that worker processes met are noted in `examples`. Closing the iterator ends the workers.

    Args:
        step: optimizer step to start with; each has `accumulation` micro-batches.
        batch: examples in a micro-batch.
        rank: this process among `world`.
        workers: processes that prepare batches ahead; 0 prepares them here.
        pin_memory: put batches into page-locked memory, for a GPU.
        ahead: random tensors that come with each example.

    Raises:
        UserError: as `Examples` does, also when a worker met the problem.
    """
    micro_batches = (
        list(rng.micro_batch(at, micro, batch=batch, accumulation=accumulation, rank=rank, world=world))
        for at in itertools.count(step)
        for micro in range(accumulation)
    )
    # A generator of its own: DataLoader would draw its workers' seed from the global one, which training may use.
    batches = iter(
        DataLoader(
            _Fetched(examples, ahead, batch * accumulation * world),
            batch_sampler=micro_batches,
            num_workers=workers,
            collate_fn=_collated,
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),
            pin_memory=pin_memory,
        )
    )
    try:
        for made in batches:
            if isinstance(made, tuple):
                raise UserError(*made)
            examples.note(made["replaced"])
            yield made
    finally:
        if workers:
            batches._shutdown_workers()


class _Fetched(Dataset):
    """Examples with their draws; a UserError arrives as data: DataLoader would send it as a traceback in a message."""

    def __init__(self, examples: Examples, ahead: Ahead | None, a_step: int):
        self.examples, self.ahead, self.a_step = examples, ahead, a_step

    def __getitem__(self, index: int) -> dict[str, Any] | tuple[str, str]:
        try:
            example = self.examples[index]
        except UserError as error:
            return error.message, error.fix
        return example | (self.ahead.of(example, index // self.a_step) if self.ahead else {})


def _collated(made: Sequence[Any]) -> Any:
    return next((entry for entry in made if isinstance(entry, tuple)), None) or collate(made)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C goes to the whole process group; the training process ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
