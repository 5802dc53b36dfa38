"""What a run trains on: the data sets that it names, without the images that its filters leave out, and their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accel.errors import UserError
from accel.progress import progress

from ..settings import Recipe
from ..sources.item import BrokenItem, ImageSource
from ..sources.mixture import Joined, Subset, parts_of
from ..sources.open_data import open_data
from ..sources.prompts import TEACHER, has_images
from .buckets import Buckets, assign
from .order import Order, order_of
from .survey import Survey, survey


@dataclass(frozen=True)
class Selection:
    """The images of a run.

    Attributes:
        source: all of them, those held out too.
        order: which of them an example shows.
        buckets: the frame of each; None for squares.
        unreadable: (name, reason) of the images that have no bucket because their size could not be read.
    """

    source: ImageSource
    order: Order
    buckets: Buckets | None = None
    unreadable: tuple[tuple[str, str], ...] = ()


def check(recipe: Recipe) -> None:
    """Refuse data that the method cannot learn from, before anything is read.

    Raises:
        UserError: naming the option.
    """
    specs = [spec for spec, _ in parts_of(recipe.data)]
    filtered = [name for name in ("score_column", "min_size", "buckets", "validation") if getattr(recipe, name)]
    if recipe.min_score and not recipe.score_column:
        raise UserError("--min-score without a column", "--score-column aesthetic, or however the column is called")
    if recipe.validation and not recipe.validates:
        raise UserError(
            f"{recipe.method} has no loss that says on held-out images how good the result is", "--validation 0"
        )
    if recipe.buckets and recipe.one_size:
        raise UserError(f"the images of {recipe.method} have one size, that of its samples", "--no-buckets")
    if recipe.own_batches and (filtered or len(specs) > 1):
        what = f"--{filtered[0].replace('_', '-')}" if filtered else "several data sets"
        raise UserError(f"{recipe.method} takes the images of one data set as they are, without {what}", "leave it out")
    drawn = [spec for spec in specs if spec.startswith(TEACHER)]
    if drawn and recipe.own_batches:
        raise UserError(f"{recipe.method} does not learn from images that a teacher draws ahead", "--data FOLDER")
    if (recipe.data_model or recipe.data_images) and not drawn:
        option = "--data-model" if recipe.data_model else "--data-images"
        raise UserError(f"{option} is for images that a teacher draws", f"--data {TEACHER}prompts.txt, or leave it out")
    prompts = [spec for spec in specs if not has_images(spec)]
    if prompts and recipe.needs_images:
        fix = f"--data {TEACHER}{prompts[0]}: the teacher draws them"
        if hasattr(recipe, "adversarial_weight"):
            fix += "; or no GAN and no noised images: --adversarial-weight 0 --backward-simulation"
        raise UserError(f"{prompts[0]} has prompts and no images, which {recipe.method} learns from", fix)
    if prompts and (filtered or len(specs) > 1):
        what = f"--{filtered[0].replace('_', '-')} says nothing about them" if filtered else "they cannot be mixed"
        raise UserError(f"{prompts[0]} has prompts alone: {what}", f"--data {prompts[0]}")


def select(recipe: Recipe, classes: bool, run: Path, accelerator: Any, say: Callable[[str], None]) -> Selection:
    """Open the data of a recipe. All processes of a run call it.

    Args:
        classes: captions are numbers of classes.
        run: where the sizes and scores of images are kept.

    Raises:
        UserError: when there is no such data, or nothing of it is left.
    """
    sources, shares, sizes = [], [], []
    wants_sizes = bool(recipe.min_size or recipe.buckets)
    for spec, share in parts_of(recipe.data):
        source = open_data(
            spec,
            image_column=recipe.image_column or None,
            caption_column=recipe.caption_column or None,
            split=recipe.split,
            classes=classes,
        )
        if wants_sizes or recipe.score_column:
            with progress("sizes and scores", keep=True, shown=accelerator.is_main_process) as report:
                found = survey(
                    source,
                    run / "survey",
                    sizes=wants_sizes,
                    column=recipe.score_column,
                    rank=accelerator.process_index,
                    world=accelerator.num_processes,
                    progress=lambda fraction: report("", fraction),  # noqa: B023
                )
            rows = kept_rows(found, recipe, spec, say)
            source = source if len(rows) == len(source) else Subset(source, rows)
            sizes.append(found.sizes[rows])
        sources.append(source)
        shares.append(share)
    joined = sources[0] if len(sources) == 1 else Joined(sources)
    buckets, unreadable = None, []
    if recipe.buckets:
        buckets = assign(np.concatenate(sizes), recipe.resolution, recipe.bucket_step, recipe.bucket_least)
        for row in np.flatnonzero(buckets.of_row < 0):
            try:
                joined.size(int(row))
            except BrokenItem as broken:
                unreadable.append((broken.name, broken.reason))
        counts = ", ".join(f"{width} x {height}: {count:,}" for (width, height), count in buckets.counts().items())
        say(f"buckets, width x height: images: {counts}")
    order = order_of(
        [len(source) for source in sources],
        recipe.seed,
        shares=shares,
        buckets=buckets,
        group=recipe.batch * recipe.accumulation * accelerator.num_processes,
        held_out=recipe.validation,
    )
    return Selection(joined, order, buckets, tuple(unreadable))


def kept_rows(found: Survey, recipe: Recipe, spec: str, say: Callable[[str], None]) -> np.ndarray:
    """The rows of a data set that its filters leave, int64.

    An image whose size cannot be read stays: it is named as broken when its turn comes.

    Raises:
        UserError: when none is left, or no image has the column.
    """
    count = len(found.score)
    unscored, low, small = (np.zeros(count, bool) for _ in range(3))
    if recipe.score_column:
        unscored = np.isnan(found.score)
        low = found.score < recipe.min_score
        if unscored.all():
            raise UserError(
                f"no image of {spec} has a number in the column {recipe.score_column!r}",
                "--score-column with one of its columns: of metadata.jsonl, of the .json of shards, or of the data set",
            )
    if recipe.min_size:
        small = found.sizes.min(1) < recipe.min_size
    kept = np.flatnonzero(~(unscored | low | small))
    said = [
        f"{int(rows.sum()):,} {what}"
        for rows, what in (
            (low, f"have a {recipe.score_column} below {recipe.min_score:g}"),
            (unscored, f"have no number in {recipe.score_column}"),
            (small & ~low & ~unscored, f"are smaller than {recipe.min_size} px"),
        )
        if rows.any()
    ]
    if said:
        say(f"{spec}: {len(kept):,} of {count:,} images are left; {', '.join(said)}")
    if not kept.size:
        raise UserError(f"no image of {spec} is left: {', '.join(said)}", "a smaller --min-score or --min-size")
    return kept
