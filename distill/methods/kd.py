"""Knowledge distillation of a pruned UNet (kd), and fine-tuning, which is the same without a teacher.

    L = w_task |eps - S(x_t)|^2 + w_output |T(x_t) - S(x_t)|^2 + w_feature sum_l |T_l(x_t) - S_l(x_t)|^2

(BK-SDM, arXiv 2305.15798, section 3.2.) The teacher is frozen, belongs to no optimizer and to no checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accel.attention import KERNELS
from accel.dtypes import torch_dtype
from accel.errors import UserError
from accel.sampling.noise_schedule import NoiseSchedule

from ..data.encoders import Encoders
from ..diffusion import inpainting, losses
from ..diffusion.denoising import added_conditions, draws, noised, task_terms
from ..settings import DistillationRecipe, FinetuneRecipe
from ..training import samples, speed
from ..training.attention import set_attention
from ..training.method import OptimizerPhase, Terms, TrainedNetwork
from ..training.pipelines import assemble, save_pipeline
from . import students
from .features import Tapped, pairs


class Denoising:
    """Fine-tuning: a UNet learns to denoise, and the text encoders with it where the recipe says so.

    Args:
        recipe: its settings.
        encoders: the frozen half of the pipeline whose UNet learns.
    """

    def __init__(self, recipe: FinetuneRecipe | DistillationRecipe, encoders: Encoders):
        self.recipe, self.encoders = recipe, encoders
        inpainting.check(recipe, encoders)
        self.schedule = NoiseSchedule.of_training(encoders.source.config("scheduler"))
        unet, tapped = self.trained_unet(encoders.source.load("unet"))
        self.unet = unet.requires_grad_(True).train()
        self.networks = {"unet": TrainedNetwork(Tapped(self.unet, tapped), self.unet)}
        self.text = text_networks(encoders) if getattr(recipe, "text_encoder", False) else {}
        self.networks |= self.text
        drawn = draws(recipe, self.schedule) + ((inpainting.MASKED,) if encoders.inpaints else ())
        self.phases = (OptimizerPhase("unet", tuple(self.networks), draws=drawn),)

    def trained_unet(self, unet: nn.Module) -> tuple[nn.Module, list[str]]:
        """The UNet that learns, made of the pipeline's own, and the modules whose activations the loss reads."""
        return unet, []

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        pass

    def loss(self, phase: OptimizerPhase, batch: Mapping[str, Any], step: int) -> tuple[torch.Tensor, Terms]:
        if self.text:
            models = [network.module for network in self.text.values()]
            batch = {**batch, **self.encoders.conditions(batch["caption"], models)}
        made, added = noised(batch, self.recipe, self.schedule), added_conditions(batch)
        x_t = made.x_t
        if self.encoders.inpaints:
            x_t = torch.cat([x_t, inpainting.hidden(batch, self.recipe.seed, self.encoders)], 1)
        out, features = self.networks["unet"].module(x_t, made.t, batch["context"], added)
        terms = task_terms(out, made, batch) | self.teacher_terms(out, features, x_t, made.t, batch["context"], added)
        weights = self.recipe.loss_weights
        return sum(weights[name] * term for name, term in terms.items()), terms

    def teacher_terms(self, out: torch.Tensor, features: list[torch.Tensor], *inputs: Any) -> Terms:
        """Loss terms against a teacher that gets the same inputs; none here."""
        return {}

    @cached_property
    def _pipeline(self) -> Any:
        return assemble(self.encoders, self.unet)

    def pipeline(self) -> Any:
        return self._pipeline

    def samples(self) -> Any:
        how = dict(num_inference_steps=self.recipe.sample_steps, guidance_scale=self.recipe.sample_guidance)
        return samples.grid(self.pipeline(), self.recipe, how)

    def save(self, folder: Path) -> None:
        networks = {name: network.model for name, network in self.networks.items()}
        save_pipeline(self.encoders.source, folder, networks, dtype=self.recipe.save_dtype)


class Distillation(Denoising):
    """Knowledge distillation: the UNet is a pruned student, and the pipeline's own UNet its frozen teacher."""

    teacher: Tapped | None = None

    def trained_unet(self, unet: nn.Module) -> tuple[nn.Module, list[str]]:
        recipe, kind = self.recipe, self.recipe.student
        student = students.make_student(unet, kind, layers=recipe.layers, init=recipe.init, seed=recipe.seed)
        if not any(recipe.loss_weights.values()):
            raise UserError("all loss weights are 0", "give --task-weight, --output-weight or --feature-weight")
        taps = pairs(recipe.features, kind, student) if recipe.feature_weight else []
        if recipe.output_weight or recipe.feature_weight:
            self.teacher = Tapped(unet.requires_grad_(False).eval(), [theirs for theirs, _ in taps])
        return student, [ours for _, ours in taps]

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.teacher is None:
            return
        chosen = self.recipe.teacher_dtype
        dtype = dtype if chosen == "auto" else torch_dtype(chosen)
        self.teacher.to(device, dtype)
        speed.lay_out(self.teacher, self.recipe)
        row = KERNELS.get(self.recipe.attention)
        exact = dtype == torch.float32 and row is not None and row.half  # which has no float32
        attention = "sdpa" if exact else self.recipe.attention
        set_attention(self.teacher.unet, attention, device=device, half=dtype != torch.float32)
        if self.recipe.compile:
            self.teacher.compile()

    def teacher_terms(self, out: torch.Tensor, features: list[torch.Tensor], *inputs: Any) -> Terms:
        if self.teacher is None:
            return {}
        wanted, wanted_features = self._teach(*inputs)
        terms = {"output": losses.output_loss(out, wanted)}
        return terms | ({"feature": losses.feature_loss(features, wanted_features)} if features else {})

    @torch.no_grad()
    def _teach(self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor, added: dict | None):
        dtype = next(self.teacher.parameters()).dtype
        # SDXL's sizes stay in float32, as the student gets them: bfloat16 tells 1020 from 1024 pixels, and not finer.
        return self.teacher(x_t.to(dtype), t, context.to(dtype), added)


def text_networks(encoders: Encoders) -> dict[str, TrainedNetwork]:
    """The text encoders by component name, made to learn: in float32, and frozen where no gradient can reach."""
    encoders.text_learns = True
    made = {}
    for index, (tokenizer, _) in enumerate(encoders.text):
        name = "text_encoder" if index == 0 else f"text_encoder_{index + 1}"
        # From the file again: the frozen one may have been rounded to half precision.
        model = encoders.source.load(name).to(encoders.device).requires_grad_(True).train()
        for part in unused_text_modules(encoders, name, model):
            part.requires_grad_(False)
        encoders.text[index] = (tokenizer, model)
        made[name] = TrainedNetwork(model, model)
    return made


def unused_text_modules(encoders: Encoders, name: str, model: nn.Module) -> list[nn.Module]:
    """What lies behind the last hidden state that is read: SDXL takes its first encoder's last but one."""
    if not encoders.sdxl or name != "text_encoder":
        return []
    inner = getattr(model, "text_model", model)
    return [inner.encoder.layers[-1], inner.final_layer_norm]
