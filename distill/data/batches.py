"""Micro-batches of a run: from its data source, through the latent and text cache or encoded as they come."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel.progress import progress

from ..settings import Recipe
from ..sources.item import ImageSource
from ..sources.open_data import open_data
from ..sources.prompts import PromptSource
from . import rng
from .draws import Ahead, Turn
from .examples import Examples, collate, loader
from .order import order_of
from .selection import Selection, select

SHOWN = 5  # broken images that are named on the screen

Batches = Callable[[int], Iterator[dict[str, Any]]]  # (first step) -> micro-batches of this process


@dataclass(frozen=True)
class Stream:
    """The micro-batches of a run, called as `Batches`.

    Attributes:
        start: (first step) -> micro-batches of this process.
        images: that training shows, in one epoch; of prompts alone, their number.
        held_out: () -> (batch, images in it) of the validation loss. Every process gets as many; 0 images stand for a
            batch that another process counts. None without one.
    """

    start: Batches
    images: int
    held_out: Callable[[], Iterator[tuple[dict[str, Any], int]]] | None = None

    def __call__(self, step: int) -> Iterator[dict[str, Any]]:
        return self.start(step)


def batches_of(
    recipe: Recipe, encoders: Any, run: Path, accelerator: Any, say: Callable[[str], None], turns: Sequence[Turn] = ()
) -> Batches:
    """The micro-batches of the recipe's data, with the draws of the `turns` of training."""
    selection = select(recipe, encoders.by_class, run, accelerator, say)
    if isinstance(selection.source, PromptSource):
        say(f"data: {len(selection.source)} prompts, without images")
        return prompts_of(selection.source, recipe, encoders, accelerator)
    return stream_of(selection.source, recipe, encoders, run, accelerator, say, turns, selection=selection)


def data_of(recipe: Recipe, encoders: Any) -> ImageSource:
    """The one data set of a method that takes it as it is."""
    return open_data(
        recipe.data,
        image_column=recipe.image_column or None,
        caption_column=recipe.caption_column or None,
        split=recipe.split,
        classes=encoders.by_class,
    )


def prompts_of(source: PromptSource, recipe: Recipe, encoders: Any, accelerator: Any) -> Stream:
    """Micro-batches of prompts alone, for a method that draws its own images. They are encoded as they come.

    `latent_mean` holds nothing: it has the shape of the images' noise, [b, c, h, w]. SDXL's `time_ids` are those of
    whole images of the recipe's resolution.
    """
    cells = recipe.resolution // encoders.factor
    empty = torch.zeros(1).expand(recipe.batch, encoders.latent_channels, cells, cells)
    side, order = recipe.resolution, order_of([len(source)], recipe.seed)
    sizes = {"time_ids": torch.tensor([[side, side, 0, 0, side, side]] * recipe.batch, dtype=torch.float32)}
    rank, world = accelerator.process_index, accelerator.num_processes

    def caption(index: int, row: int) -> str:
        dropped = rng.generator(recipe.seed, index, "dropout").random() < recipe.caption_dropout
        return "" if dropped else source.texts[row]

    def batches(step: int) -> Iterator[dict[str, Any]]:
        for at in itertools.count(step):
            for micro in range(recipe.accumulation):
                indices = rng.micro_batch(
                    at, micro, batch=recipe.batch, accumulation=recipe.accumulation, rank=rank, world=world
                )
                rows = [order(index)[1] for index in indices]
                yield {
                    "index": list(indices),
                    "name": [f"{source.name} line {row + 1}" for row in rows],
                    "caption": [caption(index, row) for index, row in zip(indices, rows, strict=True)],
                    "latent_mean": empty,
                } | (sizes if encoders.sdxl else {})

    return Stream(batches, len(source))


def stream_of(
    source: ImageSource,
    recipe: Recipe,
    encoders: Any,
    run: Path,
    accelerator: Any,
    say: Callable[[str], None],
    turns: Sequence[Turn] = (),
    suffix: str = "",
    selection: Selection | None = None,
) -> Stream:
    """The micro-batches of one data source; `suffix` sets its cache apart from that of another source of the run."""
    placement = dict(
        seed=recipe.seed,
        resolution=recipe.resolution,
        center_crop=recipe.center_crop,
        random_flip=recipe.random_flip,
        buckets=selection and selection.buckets,
    )
    cache = None
    if encoders.uncached and recipe.cache == "auto":
        say(f"no cache: {encoders.uncached}")
    elif recipe.cache != "none":
        folder = run / f"cache{suffix}" if recipe.cache == "auto" else Path(f"{recipe.cache}{suffix}")
        cache = build_cache(recipe, source, encoders, folder, placement, accelerator)
    skipped = run / "skipped.jsonl"
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        skipped.unlink(missing_ok=True)

    def on_broken(name: str, reason: str) -> None:
        if len(examples.broken) <= SHOWN:
            say(f"skipped {name}: {reason}" + f"; more are in {skipped}" * (len(examples.broken) == SHOWN))
        if accelerator.is_main_process:
            with skipped.open("a") as file:
                file.write(json.dumps({"name": name, "reason": reason}) + "\n")

    examples = Examples(
        source,
        **placement,
        caption_dropout=recipe.caption_dropout,
        size_conditioning=encoders.sdxl,
        cache=cache,
        order=selection and selection.order,
        on_broken=on_broken,
    )
    held_out = f", {recipe.validation} more held out" if recipe.validation else ""
    say(f"data{suffix}: {len(examples)} images" + (", cached" if cache else "") + held_out)
    if cache and cache.broken:
        say(f"{len(cache.broken)} images cannot be used and are left out")
        examples.note([{"name": name, "reason": reason} for name, reason in cache.broken.items()])
    for name, reason in selection.unreadable if selection else ():
        examples.note([{"name": name, "reason": reason}])

    ahead = Ahead(tuple(turns), recipe.seed, encoders.latent_channels, encoders.factor)

    def batches(step: int) -> Iterator[dict[str, Any]]:
        return loader(
            examples,
            step=step,
            batch=recipe.batch,
            accumulation=recipe.accumulation,
            workers=max(0, recipe.workers),  # where nobody has decided: none
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
            ahead=ahead,
        )

    return Stream(batches, len(examples), held_out_of(examples, recipe, accelerator) if recipe.validation else None)


def held_out_of(
    examples: Examples, recipe: Recipe, accelerator: Any
) -> Callable[[], Iterator[tuple[dict[str, Any], int]]]:
    """The batches of the validation loss of this process; the same ones, with the same noise, at every call."""
    every = examples.order.held_out_batches(recipe.batch)
    rank, world = accelerator.process_index, accelerator.num_processes

    def batches() -> Iterator[tuple[dict[str, Any], int]]:
        for number in range(rank, -(-len(every) // world) * world, world):
            indices = every[number % len(every)]
            batch = collate([examples[index] for index in indices])
            yield batch, len(indices) if number < len(every) else 0

    return batches


def build_cache(
    recipe: Recipe, source: ImageSource, encoders: Any, folder: Path, placement: dict[str, Any], accelerator: Any
) -> Any:
    from .make_cache import build

    with progress(keep=True, shown=accelerator.is_main_process) as report:
        return build(
            source,
            encoders,
            folder,
            **placement,
            variants=recipe.cache_variants,
            dtype=recipe.cache_dtype,
            batch=recipe.vae_batch,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            progress=report,
        )
