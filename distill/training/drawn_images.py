"""Images that a model draws of prompts before training: DreamBooth's class images, and `--data teacher:FILE`.

Image i depends on the seed and i alone, so an interrupted run goes on where it was; the processes share the work.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from accel.errors import UserError
from accel.files import read_json, write_bytes, write_json
from accel.models.source import Source, open_source
from accel.sampling.noise import normal

from ..data.encoders import Encoders
from ..settings import Recipe
from ..sources.mixture import parts_of
from ..sources.prompts import TEACHER, open_prompts
from . import pipelines

R = TypeVar("R", bound=Recipe)


def with_drawn_images(recipe: R, encoders: Encoders, run: Path, accelerator: Any, say: Callable[[str], None]) -> R:
    """The recipe with folders of images in the place of each `teacher:FILE`; the images that are missing are drawn.

    Args:
        run: the folders lie in it, as `teacher-images`.

    Raises:
        UserError: for prompts that cannot be read, a model that draws no prompts, or a folder of other images.
    """
    parts = parts_of(recipe.data)
    if not any(spec.startswith(TEACHER) for spec, _ in parts):
        return recipe
    name = recipe.data_model or getattr(recipe, "teacher", "") or recipe.model
    if encoders.by_class:
        raise UserError(f"{recipe.model} draws classes and no prompts", "--data FOLDER, with a folder for each class")
    teacher = encoders if name == recipe.model else Encoders(open_source(name), encoders.device, encoders.dtype)
    specs = []
    for number, (spec, share) in enumerate(parts):
        if spec.startswith(TEACHER):
            folder = run / f"teacher-images{f'-{number + 1}' if number else ''}"
            source = open_prompts(Path(spec.removeprefix(TEACHER)).expanduser())
            prompts = source.texts
            count = recipe.data_images or len(prompts)
            captions = [prompts[at % len(prompts)] for at in range(count)]
            how = dict(steps=recipe.data_steps, guidance=recipe.data_guidance, batch=recipe.batch)
            said = {"prompts": source.identity}
            draw_missing(
                folder, captions, teacher, recipe, accelerator, say, title="teacher's images", said=said, **how
            )
            if accelerator.is_main_process:
                rows = ({"file_name": f"{at:06d}.png", "text": text} for at, text in enumerate(captions))
                write_bytes(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
            accelerator.wait_for_everyone()
            spec = str(folder)
        specs.append(spec if len(parts) == 1 else f"{spec}={share}")
    return dataclasses.replace(recipe, data=" | ".join(specs))


def draw_missing(
    folder: Path,
    prompts: Sequence[str],
    encoders: Encoders,
    recipe: Recipe,
    accelerator: Any,
    say: Callable[[str], None],
    *,
    title: str,
    said: dict[str, str],
    steps: int,
    guidance: float,
    batch: int,
    record: str = "drawn.json",
    keep: str = "",
) -> None:
    """Draw image i of `prompts[i]` as `folder/00000i.png`, where it is missing.

    Args:
        encoders: of the pipeline that draws.
        recipe: its seed, its resolution.
        title: what the images are called.
        said: what tells these prompts from others.
        batch: images drawn at once.
        record: file that says what the images were drawn with.
        keep: what to type to keep images of other settings.

    Raises:
        UserError: when the folder holds images that were drawn with other settings.
    """
    settings = {
        **said,
        "resolution": recipe.resolution,
        "steps": steps,
        "guidance": guidance,
        "seed": recipe.seed,
        "model": digest_of_all(encoders.source),
    }
    path = folder / record
    if path.is_file() and (kept := read_json(path, record)) != settings:
        other = ", ".join(name for name in {**settings, **kept} if kept.get(name) != settings.get(name))
        raise UserError(
            f"the images in {folder} were generated with another {other}",
            f"delete {folder}, choose another --run{keep}",
        )
    paths = [folder / f"{number:06d}.png" for number in range(len(prompts))]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    # Later numbers may lie there from a run that wanted more; they are of the same kind, and stay.
    if missing:
        say(f"{title}: {len(paths) - len(missing)} of {len(paths)} exist, generating the others in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            write_json(path, settings)
        own = {number: paths[number] for number in missing[accelerator.process_index :: accelerator.num_processes]}
        sampling = dict(num_inference_steps=steps, guidance_scale=guidance)
        _draw(own, prompts, encoders, recipe, accelerator, title, batch, sampling)
    accelerator.wait_for_everyone()


def digest_of_all(source: Source) -> str:
    """sha256 over the weights that decide what a pipeline draws."""
    return source.digest([name for name in ("unet", "text_encoder", "text_encoder_2", "vae") if source.has(name)])


@torch.no_grad()
def _draw(
    paths: Mapping[int, Path],
    prompts: Sequence[str],
    encoders: Encoders,
    recipe: Recipe,
    accelerator: Any,
    title: str,
    batch: int,
    sampling: dict[str, Any],
) -> None:
    """Draw images by number. An image gets its name when it is complete."""
    from PIL import Image
    from rich.console import Console
    from rich.progress import track

    pipeline = pipelines.assemble(encoders, encoders.source.load("unet").to(encoders.device))
    cells = recipe.resolution // pipeline.vae_scale_factor
    shape = (encoders.latent_channels, cells, cells)
    numbers = list(paths)
    chunks = [numbers[start : start + batch] for start in range(0, len(numbers), batch)]
    quiet = not accelerator.is_main_process
    for chunk in track(chunks, title, console=Console(stderr=True), disable=quiet):
        latents = torch.from_numpy(normal([recipe.seed + number for number in chunk], 0, shape))
        with accelerator.autocast():
            images = pipelines.draw(pipeline, [prompts[number] for number in chunk], latents, **sampling)
        for number, image in zip(chunk, images, strict=True):
            partial = paths[number].with_name(f".{paths[number].name}")
            Image.fromarray(image).save(partial, format="PNG")
            os.replace(partial, paths[number])
