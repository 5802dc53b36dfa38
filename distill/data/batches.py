"""Micro-batches of a run: from its data source, through the latent and text cache or encoded as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accel.progress import progress

from ..settings import Recipe
from ..sources.item import ImageSource
from ..sources.open_data import open_data
from .draws import Ahead, Turn
from .examples import Examples, loader

SHOWN = 5  # broken images that are named on the screen

Batches = Callable[[int], Iterator[dict[str, Any]]]  # (first step) -> micro-batches of this process


def batches_of(
    recipe: Recipe, encoders: Any, run: Path, accelerator: Any, say: Callable[[str], None], turns: Sequence[Turn] = ()
) -> Batches:
    """The micro-batches of the recipe's data, with the draws of the `turns` of training."""
    return stream_of(data_of(recipe, encoders), recipe, encoders, run, accelerator, say, turns)


def data_of(recipe: Recipe, encoders: Any) -> ImageSource:
    return open_data(
        recipe.data,
        image_column=recipe.image_column or None,
        caption_column=recipe.caption_column or None,
        split=recipe.split,
        classes=encoders.by_class,
    )


def stream_of(
    source: ImageSource,
    recipe: Recipe,
    encoders: Any,
    run: Path,
    accelerator: Any,
    say: Callable[[str], None],
    turns: Sequence[Turn] = (),
    suffix: str = "",
) -> Batches:
    """The micro-batches of one data source; `suffix` sets its cache apart from that of another source of the run."""
    placement = dict(
        seed=recipe.seed, resolution=recipe.resolution, center_crop=recipe.center_crop, random_flip=recipe.random_flip
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
        on_broken=on_broken,
    )
    say(f"data{suffix}: {len(examples)} images" + (", cached" if cache else ""))
    if cache and cache.broken:
        say(f"{len(cache.broken)} images cannot be used and are left out")
        examples.note([{"name": name, "reason": reason} for name, reason in cache.broken.items()])

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
