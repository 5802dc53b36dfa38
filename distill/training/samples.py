"""Sample grids: images of the same prompts from the same noise at every interval, by the pipeline in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from accel.bench.contact_sheet import contact_sheet
from accel.sampling.noise import normal

from ..settings import Recipe
from .pipelines import draw

DEFAULT_PROMPTS = ("a photo of a red fox in the snow", "a bowl of fruit on a wooden table, oil painting")


@torch.no_grad()
def grid(pipeline: Any, recipe: Recipe, sampling: dict[str, Any]) -> Any:
    """One image per prompt in a row, as a PIL image; `sampling` is how the pipeline is called."""
    prompts = [text.strip() for text in recipe.sample_prompts.split("|") if text.strip()] or list(DEFAULT_PROMPTS)
    cells = recipe.resolution // pipeline.vae_scale_factor
    channels = pipeline.vae.config.latent_channels
    unet = pipeline.unet
    training = unet.training
    unet.eval()
    try:
        made = []
        for start in range(0, len(prompts), recipe.batch):
            part = prompts[start : start + recipe.batch]
            seeds = range(recipe.seed + start, recipe.seed + start + len(part))
            latents = torch.from_numpy(normal(seeds, 0, (channels, cells, cells)))
            made.append(draw(pipeline, part, latents, **sampling))
    finally:
        unet.train(training)
    cell = max(96, recipe.resolution)
    # About eight pixels a letter: longer labels would run into each other.
    labels = prompts if max(map(len, prompts)) * 8 <= cell else ()
    return contact_sheet({"": np.concatenate(made)}, labels, cell=cell)
