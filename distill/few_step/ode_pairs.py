"""Noise and the image that a teacher's ODE makes of it: what one-step students are warmed up with.

DMD (arXiv 2311.18828, section 3.3) and DMD2's one-step SDXL (arXiv 2405.14867, section 4.5) start from a student that
was regressed on such pairs. Pair i depends on the seed and i alone, so making them goes on where it was interrupted.

    <folder>/pairs.json                what all of them were made with
    <folder>/000000.safetensors        `x0` [64, 4, h, w], their captions in the metadata; written whole or not at all
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from accel.errors import UserError
from accel.files import parse_json, read_json, write_bytes, write_json

from ..data import rng
from ..data.encoders import Encoders
from ..settings import RegressionRecipe
from ..sources.item import ImageSource
from ..training import pipelines

SHARD = 64


@dataclass(frozen=True)
class Pairs:
    """Pairs of a folder, by number."""

    folder: Path
    count: int
    seed: int

    def rows(self, numbers: list[int]) -> dict[str, Any]:
        """`latent_mean` (the teacher's x_0) and `z` (its noise) float32 [n, 4, h, w], and captions."""
        images, captions = [], []
        for number in numbers:
            path = shard_file(self.folder, number // SHARD)
            try:
                with safe_open(path, "pt") as file:
                    images.append(file.get_slice("x0")[number % SHARD].float())
                    captions.append(parse_json(file.metadata()["captions"])[number % SHARD])
            except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
                raise UserError(f"{path} is damaged ({error})", f"delete {path}: it is made again") from None
        x0 = torch.stack(images)
        return {"latent_mean": x0, "z": noise(self.seed, numbers, tuple(x0.shape[1:])), "caption": captions}


def noise(seed: int, numbers: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    """z of pairs, float32 [n, *shape]."""
    return rng.normal(seed, numbers, "noise", shape)


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def make(
    recipe: RegressionRecipe,
    source: ImageSource,
    encoders: Encoders,
    folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Pairs:
    """Make the pairs that are missing: `recipe.pair_count` of them, on captions of the data.

    Args:
        recipe: the teacher's steps and guidance, the number of pairs.
        source: where the captions come from; its images are not read.
        encoders: of the pipeline that learns; the teacher's UNet is of `recipe.teacher`, or its own.
        rank, world: this process makes every `world`-th file.

    Raises:
        UserError: when the folder holds pairs of other settings.
    """
    from accel.models.source import open_source

    teacher = open_source(recipe.teacher) if recipe.teacher else encoders.source
    settings = {
        "seed": recipe.seed,
        "resolution": recipe.resolution,
        "steps": recipe.pair_steps,
        "guidance": recipe.pair_guidance,
        "data": source.identity,
        "model": teacher.digest([name for name in ("unet", "text_encoder", "text_encoder_2") if teacher.has(name)]),
    }
    if recipe.mixed_precision != "no":
        settings["mixed_precision"] = recipe.mixed_precision
    record = folder / "pairs.json"
    if record.is_file() and (kept := read_json(record, "pairs.json")) != settings:
        other = ", ".join(name for name in sorted({*settings, *kept}) if kept.get(name) != settings.get(name))
        raise UserError(f"the pairs in {folder} were made with another {other}", "another --pairs folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_json(record, settings)
    shards = range(-(-recipe.pair_count // SHARD))
    missing = [number for number in shards[rank::world] if not shard_file(folder, number).is_file()]
    if missing:
        unet = teacher.load("unet").to(encoders.device).requires_grad_(False)
        pipeline = pipelines.assemble(encoders, unet)
        for done, number in enumerate(missing):
            progress(done / len(missing))
            numbers = list(range(number * SHARD, (number + 1) * SHARD))
            captions = [caption_of(source, recipe.seed, pair) for pair in numbers]
            x0 = solve(pipeline, recipe, encoders, numbers, captions)
            kept = save({"x0": x0.half()}, metadata={"captions": json.dumps(captions)})
            write_bytes(shard_file(folder, number), kept)
    progress(1.0)
    return Pairs(folder, recipe.pair_count, recipe.seed)


def caption_of(source: ImageSource, seed: int, number: int) -> str:
    from ..sources.item import BrokenItem

    row, _ = rng.row(number, len(source), seed)
    for candidate in (*range(row, len(source)), *range(row)):
        try:
            captions = source.captions(candidate)
        except BrokenItem:
            continue
        return captions[int(rng.generator(seed, number, "caption").integers(len(captions)))]
    raise UserError("no caption of the data can be read", "check the data and --caption-column")


@torch.no_grad()
def solve(
    pipeline: Any, recipe: RegressionRecipe, encoders: Encoders, numbers: list[int], captions: list[str]
) -> torch.Tensor:
    """x_0 of the teacher's ODE, [n, 4, h, w] on the CPU, by DPM-Solver++(2M)."""
    cells = recipe.resolution // encoders.factor
    shape = (encoders.latent_channels, cells, cells)
    made = []
    for start in range(0, len(numbers), recipe.batch):
        part = slice(start, start + recipe.batch)
        z = noise(recipe.seed, numbers[part], shape).to(encoders.device)
        with encoders.autocast():
            x0 = pipeline(
                captions[part],
                latents=z,
                height=recipe.resolution,
                width=recipe.resolution,
                output_type="latent",
                num_inference_steps=recipe.pair_steps,
                guidance_scale=recipe.pair_guidance,
            ).images
        made.append(x0.float().cpu())
    return torch.cat(made)


def batches(
    pairs: Pairs, recipe: RegressionRecipe, step: int, *, size_conditioning: bool = False, rank: int = 0, world: int = 1
) -> Iterator[Mapping[str, Any]]:
    """Endless micro-batches of one process, from any step on, shuffled anew in every epoch.

    Args:
        size_conditioning: add `time_ids` float32 [b, 6], for SDXL: whole images of the recipe's resolution, which is
            what the teacher was told when it made the pairs.
    """
    side = recipe.resolution
    sizes = {"time_ids": torch.tensor([[side, side, 0, 0, side, side]] * recipe.batch, dtype=torch.float32)}
    while True:
        for micro in range(recipe.accumulation):
            indices = rng.micro_batch(
                step, micro, batch=recipe.batch, accumulation=recipe.accumulation, rank=rank, world=world
            )
            rows = [rng.row(index, pairs.count, recipe.seed)[0] for index in indices]
            yield (
                {"index": list(indices), "name": [f"pair {row}" for row in rows]}
                | pairs.rows(rows)
                | (sizes if size_conditioning else {})
            )
        step += 1
