"""A training run from a recipe to a folder: data, cache, method, loop, result."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from accel._version import __version__
from accel.errors import UserError
from accel.files import exclusive, new_folder, refuse_existing
from accel.int8 import trained_scales
from accel.models.source import Source, open_source
from accel.progress import progress

from . import settings
from .data.encoders import Encoders
from .data.examples import Examples, loader
from .edm.source import ClassEncoders, is_edm, open_edm
from .few_step import regression
from .few_step.dmd2 import DMD2 as DistributionMatching
from .methods import dreambooth, qat
from .methods.kd import Denoising
from .methods.lora import LowRank
from .methods.tiny_vae import TinyVaeMethod
from .settings import DMD2, Distillation, DreamBooth, Finetune, Lora, Recipe, Regression, TinyVae
from .sources.open_data import open_data
from .training import checkpoints
from .training.attention import check_attention
from .training.loop import Outcome, accelerator_for, compute_dtype, train
from .training.method import Method

METHODS: dict[type[Recipe], Any] = {
    Distillation: Denoising,
    Finetune: Denoising,
    Lora: LowRank,
    DreamBooth: dreambooth.method,
    DMD2: DistributionMatching,
    Regression: regression.Regression,
    TinyVae: TinyVaeMethod,
}

SHOWN = 5  # broken images that are named on the screen


def execute(recipe: Recipe, out: Path, run: Path | None = None, *, overwrite: bool = False) -> Outcome:
    """Train as the recipe says; started again after an interruption, go on where it was.

    Args:
        recipe: the settings; `model` and `data` must be given.
        out: the result, a diffusers pipeline (or a LoRA); written only when the last step is done.
        run: checkpoints, logs and samples; `<out>-run` by default.
        overwrite: replace `out`.

    Returns:
        How it ended; `stopped` is true when a signal ended it early.

    Raises:
        UserError: for settings that cannot be honoured, data that cannot be read, a loss that is not finite.
    """
    run = run or out.with_name(f"{out.name}-run")
    for name in ("model", "data"):
        if not getattr(recipe, name):
            raise UserError(f"no --{name} given", f"--{name} FOLDER" + (" (a diffusers pipeline)" * (name == "model")))
    settings.check(recipe)
    check_places(out, run, overwrite)
    accelerator = accelerator_for(recipe, run)
    check_attention(recipe.attention, device=accelerator.device, half=recipe.mixed_precision != "no")
    # Two runs in one folder would write into each other's checkpoints.
    with exclusive(run.absolute()) if accelerator.is_main_process else contextlib.nullcontext():
        return _execute(recipe, out, run, accelerator, overwrite)


def _execute(recipe: Recipe, out: Path, run: Path, accelerator: Any, overwrite: bool) -> Outcome:
    console = Console(stderr=True)

    def say(text: str) -> None:
        if accelerator.is_main_process:
            console.print(text, soft_wrap=True, markup=False)

    encoders = encoders_of(recipe, device=accelerator.device, dtype=compute_dtype(recipe))
    source = encoders.source
    check_resolution(recipe, encoders)
    if isinstance(recipe, DreamBooth):
        recipe = dreambooth.settled(recipe, encoders)
    # Before the data, whose cache may take hours: what the method refuses is known at once.
    method: Method = METHODS[type(recipe)](recipe, encoders)
    qat.attach(method, recipe)
    if isinstance(recipe, DreamBooth):
        batches = dreambooth.batches_of(recipe, encoders, run, accelerator, say, stream_of)
    else:
        batches = batches_of(recipe, encoders, run, accelerator, say)
    qat.calibrate(method, recipe, accelerator.device, say)
    outcome = train(method, recipe, encoders, batches, run, accelerator=accelerator, console=console)
    if outcome.stopped:
        say(f"stopped after step {outcome.steps} of {recipe.steps}; the same command goes on from there")
        return outcome
    sharded = {
        name: checkpoints.tensors_of(network.model)
        for name, network in method.networks.items()
        if checkpoints.is_sharded(network.model)
    }
    if accelerator.is_main_process:
        if sharded:  # what saves a network wants it whole: a second one, on the CPU
            method = METHODS[type(recipe)](recipe, encoders_of(recipe))
            qat.attach(method, recipe)
        for name, tensors in sharded.items():
            method.networks[name].model.load_state_dict(tensors, strict=False)
        trained = qat.detach(method, recipe)
        with new_folder(out, overwrite=overwrite) as folder:
            method.save(folder)
            if trained:
                trained_scales.write(folder, trained)
            record = training_record(recipe, source, outcome, accelerator)
            (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        say(f"{out} is ready; checkpoints, losses and samples are in {run}")
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        accelerator.end_training()
    return outcome


def encoders_of(recipe: Recipe, **options: Any) -> Encoders | ClassEncoders:
    """What turns images and captions into what the recipe's model learns from, by the family of the model.

    Raises:
        UserError: for a model that this method does not train.
    """
    if not is_edm(recipe.model):
        return Encoders(open_source(recipe.model), **options)
    if not isinstance(recipe, DMD2):
        raise UserError(f"{recipe.model} is an EDM model, which is trained by DMD2 alone", "accel distill dmd2")
    return ClassEncoders(open_edm(recipe.model), **options)


def check_places(out: Path, run: Path, overwrite: bool) -> None:
    """Refuse at the start what would fail after days: a result or a run folder that cannot be written.

    Raises:
        UserError: naming the folder.
    """
    refuse_existing(out, overwrite)
    ours, theirs = Path(os.path.abspath(out)), Path(os.path.abspath(run))
    if ours == theirs or ours in theirs.parents:
        raise UserError(
            f"the run folder {run} lies in the result {out}, which is written as a whole at the end",
            f"--run {out}-run, or any other folder",
        )
    for flag, path in (("--out", ours.parent), ("--run", theirs)):
        place = next(folder for folder in (path, *path.parents) if folder.exists())
        if not place.is_dir():
            raise UserError(f"{path} cannot be a folder: {place} is a file", f"choose another {flag}")
        if not os.access(place, os.W_OK):
            raise UserError(f"no permission to write {place}", f"choose another {flag}")


def check_resolution(recipe: Recipe, encoders: Encoders) -> None:
    """The UNet halves its input once per stage; what does not divide would come back one cell too small."""
    stages = len(encoders.source.config("unet")["block_out_channels"])
    multiple = encoders.factor * 2 ** (stages - 1)
    if recipe.resolution < multiple or recipe.resolution % multiple:
        near = max(multiple, round(recipe.resolution / multiple) * multiple)
        raise UserError(f"resolution {recipe.resolution} is not a multiple of {multiple}", f"--resolution {near}")


def batches_of(recipe: Recipe, encoders: Encoders, run: Path, accelerator: Any, say: Any) -> Any:
    """(first step) -> micro-batches of this process, from the cache or encoded as they come."""
    source = data_of(recipe, encoders)
    if isinstance(recipe, Regression):
        return regression.batches_of(recipe, source, encoders, run, accelerator, say)
    return stream_of(source, recipe, encoders, run, accelerator, say)


def data_of(recipe: Recipe, encoders: Encoders | ClassEncoders) -> Any:
    return open_data(
        recipe.data,
        image_column=recipe.image_column or None,
        caption_column=recipe.caption_column or None,
        split=recipe.split,
        classes=isinstance(encoders, ClassEncoders),
    )


def stream_of(
    source: Any, recipe: Recipe, encoders: Encoders, run: Path, accelerator: Any, say: Any, suffix: str = ""
) -> Any:
    """(first step) -> micro-batches of a data source; `suffix` sets its cache apart from that of another source."""
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

    def batches(step: int) -> Iterator[dict[str, Any]]:
        return loader(
            examples,
            step=step,
            batch=recipe.batch,
            accumulation=recipe.accumulation,
            workers=recipe.workers,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
        )

    return batches


def build_cache(
    recipe: Recipe, source: Any, encoders: Encoders, folder: Path, placement: dict[str, Any], accelerator: Any
) -> Any:
    from .data.make_cache import build

    with progress(keep=True, shown=accelerator.is_main_process) as report:
        return build(
            source,
            encoders,
            folder,
            **placement,
            variants=recipe.cache_variants,
            dtype=recipe.cache_dtype,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            progress=report,
        )


def training_record(recipe: Recipe, source: Source, outcome: Outcome, accelerator: Any) -> dict[str, Any]:
    """How the result was made, to be kept beside it."""
    device = accelerator.device
    return {
        "method": type(recipe).__name__,
        "recipe": dataclasses.asdict(recipe),
        "steps": outcome.steps,
        "seconds_per_step": round(outcome.seconds_per_step, 4),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "source_digest": source.digest([name for name in ("unet",) if source.has(name)]),
        "versions": {"accel": __version__, "torch": torch.__version__},
    }
