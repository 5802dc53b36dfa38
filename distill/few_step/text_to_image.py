"""Few-step distillation of SD1.x, SD2.x and SDXL: a UNet between a VAE and text encoders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accel.errors import UserError
from accel.models.source import Source
from accel.sampling.noise_schedule import NoiseSchedule

from ..data.encoders import Encoders
from ..diffusion import inpainting
from ..diffusion.denoising import added_conditions
from ..diffusion.process import Constants, Diffusion
from ..methods.lora import save_lora
from ..settings import FewStepRecipe, RegressionRecipe
from ..training import samples
from ..training.pipelines import assemble, save_pipeline
from . import critic, shared_lora

Conditions = tuple[torch.Tensor, dict[str, torch.Tensor] | None]


class TextToImage:
    """Networks are `UNet2DConditionModel`s, conditions are (context [b, 77, D], SDXL's additions or None).

    Args:
        recipe: names the teacher.
        encoders: the frozen half of the generator's pipeline.

    Raises:
        UserError: for an inpainting pipeline, or a teacher with another noise schedule than the model.
    """

    guides = True  # a prompt can be left empty, so that guidance is possible

    def __init__(self, recipe: FewStepRecipe | RegressionRecipe, encoders: Encoders):
        inpainting.check(recipe, encoders)
        if encoders.inpaints:
            text = f"{encoders.source.name} is for inpainting, {recipe.method} is not"
            raise UserError(text, "give a text-to-image pipeline")
        self.recipe, self.encoders = recipe, encoders
        self.teacher = encoders.open(recipe.teacher) if recipe.teacher else encoders.source
        self.process = Diffusion(NoiseSchedule.of_training(encoders.source.config("scheduler")))
        check_teacher(encoders.source, self.teacher, self.process)
        self._constants = Constants()
        self._pipeline: Any = None

    def load(self, source: Source) -> nn.Module:
        return source.load("unet")

    def ready(self) -> None:
        """Called when the encoders are where they will run."""
        self.empty = self.encoders.prompts([""])

    def conditions(self, batch: Mapping[str, Any]) -> Conditions:
        """SDXL's sizes are those of inference, a whole image of the recipe's resolution, as DMD2 was published: the
        student makes no others, whatever the sizes and crops of the real images are."""
        added = added_conditions(batch)
        if added:
            side = self.recipe.resolution
            sizes = self._constants((side, side, 0, 0, side, side), batch["context"].device, torch.float32)
            added = added | {"time_ids": sizes.expand(len(batch["context"]), -1)}
        return batch["context"], added

    @property
    def width(self) -> int:
        """Size D of the vectors that `condition_on_step` adds to the conditions."""
        return self.teacher.config("unet")["cross_attention_dim"]

    def condition_on_step(self, conditions: Conditions, vectors: torch.Tensor) -> Conditions:
        """The conditions with an embedding of the student's step, [b, D], added to every token."""
        context, added = conditions
        return context + vectors.unsqueeze(1).to(context.dtype), added

    def rows(self, conditions: Conditions, rows: torch.Tensor) -> Conditions:
        """The conditions of some images."""
        context, added = conditions
        return context[rows], added and {name: value[rows] for name, value in added.items()}

    def unconditional(self, conditions: Conditions) -> Conditions:
        """The conditions of the empty prompt, for as many images."""
        context, added = conditions
        if added:
            added = added | {"text_embeds": self.empty["pooled"].expand_as(added["text_embeds"])}
        return self.empty["context"].expand_as(context), added

    def cast(self, x_t: torch.Tensor, conditions: Conditions, dtype: torch.dtype) -> tuple[torch.Tensor, Conditions]:
        """What a network of that dtype takes. SDXL's sizes stay in float32: bfloat16 rounds 1020 to 1024."""
        context, added = conditions
        return x_t.to(dtype), (context.to(dtype), added)

    def call(self, network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        context, added = conditions
        return network(x_t, t, context, added_cond_kwargs=added, return_dict=False)[0]

    def bottleneck(self, network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions):
        return shared_lora.within(network, lambda unet: critic.bottleneck(unet, x_t, t, *conditions))

    def bottleneck_shape(self) -> tuple[int, int]:
        cells = self.recipe.resolution // self.encoders.factor
        return critic.bottleneck_shape(self.teacher.config("unet"), cells)

    def samples(self, generator: nn.Module, timesteps: Sequence[int]) -> Any:
        """Images of the recipe's sample prompts in the student's steps, as a PIL image."""
        return self.draw(generator, dict(timesteps=list(timesteps)))

    def draw(self, generator: nn.Module, how: dict[str, Any], **fields: Any) -> Any:
        """As `samples`; how the pipeline is called, and fields of LCMScheduler that are not the model's own."""
        if self._pipeline is None:
            from diffusers import LCMScheduler

            self._pipeline = assemble(self.encoders, shared_lora.within(generator, lambda unet: unet))
            self._pipeline.scheduler = LCMScheduler.from_config(self.encoders.source.config("scheduler"), **fields)
        how = how | dict(guidance_scale=0.0)
        return shared_lora.within(generator, lambda _: samples.grid(self._pipeline, self.recipe, how))

    def save(self, folder: Path, generator: nn.Module, timesteps: Sequence[int]) -> None:
        """A pipeline, or a LoRA where the generator is one; either with its sampler's constants."""
        self.write(folder, generator, {"name": "dmd2", "timesteps": list(timesteps), "guidance": 0.0})

    def write(self, folder: Path, generator: nn.Module, sampler: Mapping[str, Any]) -> None:
        """As `save`, of a student that is sampled by these constants."""
        if isinstance(generator, shared_lora.Adapted):
            form = self.recipe.lora_format
            save_lora(folder, {"unet": generator.network}, self.encoders, adapter=shared_lora.GENERATOR, form=form)
            (folder / "sampler.json").write_text(json.dumps(sampler) + "\n")
            return
        save_pipeline(self.encoders.source, folder, {"unet": generator}, dtype=self.recipe.save_dtype, sampler=sampler)


def check_teacher(source: Source, teacher: Source, process: Diffusion) -> None:
    """Raises UserError where the networks have different noise schedules or prediction types."""
    ours, theirs = process.schedule, NoiseSchedule.of_training(teacher.config("scheduler"))
    if ours.prediction_type != theirs.prediction_type or (ours.alphas_cumprod != theirs.alphas_cumprod).any():
        raise UserError(
            f"{source.name} and the teacher have different noise schedules or prediction types "
            f"({ours.prediction_type}, {theirs.prediction_type})",
            "give the pipeline that the student was made of as --teacher",
        )
