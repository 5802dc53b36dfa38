"""Run a training from a recipe to a folder: data, cache, method, loop, result."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from accel._version import __version__
from accel.attention import check as check_attention
from accel.errors import Notice, UserError
from accel.files import exclusive, new_folder, refuse_existing
from accel.int8 import trained_scales
from accel.models.source import Source
from accel.trt.tf32 import float32_in_tf32

from . import settings
from .data import selection
from .data.encoders import Encoders
from .methods import qat
from .registry import entry_of, load
from .settings import Recipe
from .training import checkpoints, sharding, speed
from .training.attention import check_networks
from .training.drawn_images import with_drawn_images
from .training.loop import Outcome, accelerator_for, compute_dtype, train
from .training.method import Method
from .watching import card


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
    selection.check(recipe)
    check_places(out, run, overwrite)
    recipe = speed.settled(recipe, speed.device_of_process(), sharded=sharding.asked_for())
    accelerator = accelerator_for(recipe, run)
    check_attention(recipe.attention, device=accelerator.device, half=recipe.mixed_precision != "no")
    # Two runs in one folder would write into each other's checkpoints, and of one result the last would win.
    with contextlib.ExitStack() as held:
        for folder in (out, run) if accelerator.is_main_process else ():
            held.enter_context(exclusive(folder))
        if accelerator.device.type == "cuda":
            held.enter_context(float32_in_tf32(recipe.tf32 == "on"))
        return _execute(recipe, out, run, accelerator, overwrite)


def _execute(recipe: Recipe, out: Path, run: Path, accelerator: Any, overwrite: bool) -> Outcome:
    console = Console(stderr=True)

    def say(text: str) -> None:
        if accelerator.is_main_process:
            console.print(text, soft_wrap=True, markup=False)

    say(speed.described(recipe, accelerator.device))
    encoders = encoders_of(recipe, device=accelerator.device, dtype=compute_dtype(recipe))
    encoders.encode_in(recipe.vae_dtype)
    source = encoders.source
    recipe = with_resolution(recipe, encoders)
    check_resolution(recipe, encoders)
    if accelerator.is_main_process:
        note_size(recipe, encoders)
    entry = entry_of(recipe)
    if entry.complete:
        recipe = load(entry.complete)(recipe, encoders)
    # Before the data, whose cache may take hours: what the method refuses is known at once.
    method: Method = load(entry.factory)(recipe, encoders)
    check_networks(recipe.attention, method.networks.values())
    sharding.check(method, accelerator)
    qat.attach(method, recipe)
    drawn = with_drawn_images(recipe, encoders, run, accelerator, say)
    batches = load(entry.batches)(drawn, encoders, run, accelerator, say, method.phases)
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
            method = load(entry.factory)(recipe, encoders_of(recipe))
            qat.attach(method, recipe)
        for name, tensors in sharded.items():
            method.networks[name].model.load_state_dict(tensors, strict=False)
        trained = qat.detach(method, recipe)
        with new_folder(out, overwrite=overwrite) as folder:
            method.save(folder)
            if trained:
                trained_scales.write(folder, trained)
            record = training_record(recipe, source, outcome, accelerator, getattr(batches, "images", None))
            (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
            card.write(folder, record, recipe, run, sdxl=encoders.sdxl)
        say(f"{out} is ready; checkpoints, losses and samples are in {run}")
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        accelerator.end_training()
    return outcome


def encoders_of(recipe: Recipe, **options: Any) -> Any:
    """What turns images and captions into the inputs of the recipe's model: `Encoders`, or EDM's `ClassEncoders`.

    Raises:
        UserError: for a model that this method does not train.
    """
    return load(entry_of(recipe).encoders)(recipe.model, **options)


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


def own_sizes(encoders: Encoders) -> set[int]:
    """The width and the height, in pixels, that the model was made for, as its UNet's config says; none if not."""
    cells = encoders.source.config("unet").get("sample_size")
    return {side * encoders.factor for side in (cells if isinstance(cells, (list, tuple)) else [cells or 0])} - {0}


R = TypeVar("R", bound=Recipe)


def with_resolution(recipe: R, encoders: Encoders) -> R:
    """The recipe with the model's own resolution, where it names none: 512 px where the model does not say."""
    return recipe if recipe.resolution else dataclasses.replace(recipe, resolution=max(own_sizes(encoders) or {512}))


def check_resolution(recipe: Recipe, encoders: Encoders) -> None:
    """The UNet halves its input once per stage; what does not divide would come back one cell too small."""
    stages = len(encoders.source.config("unet")["block_out_channels"])
    multiple = encoders.factor * 2 ** (stages - 1)
    if recipe.resolution < multiple or recipe.resolution % multiple:
        near = max(multiple, round(recipe.resolution / multiple) * multiple)
        raise UserError(f"resolution {recipe.resolution} is not a multiple of {multiple}", f"--resolution {near}")
    if recipe.buckets and recipe.bucket_step % multiple:
        raise UserError(
            f"buckets of steps of {recipe.bucket_step} px: not a multiple of {multiple}", "--bucket-step 64"
        )


def note_size(recipe: Recipe, encoders: Encoders) -> None:
    """Say that images of another size than the model's own are made, before hours are spent on them."""
    own = own_sizes(encoders)
    if own and recipe.resolution not in own:
        warnings.warn(
            f"resolution {recipe.resolution} is not the model's own, {max(own)} px: --resolution {max(own)}",
            Notice,
            stacklevel=3,
        )


def training_record(
    recipe: Recipe, source: Source, outcome: Outcome, accelerator: Any, images: int | None = None
) -> dict[str, Any]:
    """How the result was made, to be kept beside it. images: of the data set, without those held out."""
    device = accelerator.device
    return {
        "method": recipe.method,
        "recipe": dataclasses.asdict(recipe),
        "steps": outcome.steps,
        "images": outcome.steps * recipe.batch * recipe.accumulation * accelerator.num_processes,
        "training_images": images,
        "seconds_per_step": round(outcome.seconds_per_step, 4),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "source_digest": source.digest([name for name in ("unet",) if source.has(name)]),
        "versions": {"accel": __version__, "torch": torch.__version__},
    }
