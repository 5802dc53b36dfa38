"""Knowledge distillation of a pruned UNet, and plain fine-tuning, which is the same without a teacher.

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

from accel.dtypes import torch_dtype
from accel.errors import UserError
from accel.sampling.noise_schedule import NoiseSchedule

from ..data.encoders import Encoders
from ..diffusion import inpainting, losses
from ..diffusion.denoising import added_conditions, noised, task_terms
from ..settings import Distillation, Finetune
from ..training import samples
from ..training.attention import set_attention
from ..training.method import Network, Terms, Turn
from ..training.pipelines import assemble, save_pipeline
from . import students
from .features import Tapped, pairs


class Denoising:
    """A UNet learns to denoise, with or without a teacher beside it.

    Args:
        recipe: its settings.
        encoders: the frozen half of the pipeline; its UNet is the teacher, or what is tuned.
    """

    def __init__(self, recipe: Distillation | Finetune, encoders: Encoders):
        self.recipe, self.encoders = recipe, encoders
        inpainting.check(recipe, encoders)
        self.schedule = NoiseSchedule.from_config(encoders.source.config("scheduler"))
        self.weights = {"task": 1.0, "prior": getattr(recipe, "prior_weight", 0.0)}
        self.teacher = None
        unet = encoders.source.load("unet")
        taps: list[tuple[str, str]] = []
        if isinstance(recipe, Distillation):
            kind = recipe.student
            student = students.make_student(unet, kind, layers=recipe.layers, init=recipe.init, seed=recipe.seed)
            self.weights = {
                "task": recipe.task_weight,
                "output": recipe.output_weight,
                "feature": recipe.feature_weight,
            }
            if not any(self.weights.values()):
                raise UserError("all loss weights are 0", "give --task-weight, --output-weight or --feature-weight")
            taps = pairs(recipe.features, kind, student) if recipe.feature_weight else []
            if recipe.output_weight or recipe.feature_weight:
                self.teacher = Tapped(unet.requires_grad_(False).eval(), [theirs for theirs, _ in taps])
            unet = student
        self.unet = unet.requires_grad_(True).train()
        module = Tapped(self.unet, [ours for _, ours in taps])
        self.networks = {"unet": Network(module, self.unet)}
        self.text = text_networks(encoders) if getattr(recipe, "text_encoder", False) else {}
        self.networks |= self.text
        self.turns = (Turn("unet", tuple(self.networks)),)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.teacher is not None:
            chosen = getattr(self.recipe, "teacher_dtype", "auto")
            dtype = dtype if chosen == "auto" else torch_dtype(chosen)
            self.teacher.to(device, dtype)
            exact = dtype == torch.float32 and self.recipe.attention == "flash-attn"  # which has no float32
            attention = "sdpa" if exact else self.recipe.attention
            set_attention(self.teacher.unet, attention, device=device, half=dtype != torch.float32)
            if self.recipe.compile:
                self.teacher.compile()

    def loss(self, turn: Turn, batch: Mapping[str, Any], step: int) -> tuple[torch.Tensor, Terms]:
        if self.text:
            models = [network.module for network in self.text.values()]
            batch = {**batch, **self.encoders.conditions(batch["caption"], models)}
        made, added = noised(batch, self.recipe, self.schedule), added_conditions(batch)
        x_t = made.x_t
        if self.encoders.inpaints:
            x_t = torch.cat([x_t, inpainting.hidden(batch, self.recipe.seed, self.encoders)], 1)
        out, features = self.networks["unet"].module(x_t, made.t, batch["context"], added)
        terms = task_terms(out, made, batch)
        if self.teacher is not None:
            wanted, wanted_features = self._teach(x_t, made.t, batch["context"], added)
            terms["output"] = losses.output_loss(out, wanted)
            if features:
                terms["feature"] = losses.feature_loss(features, wanted_features)
        return sum(self.weights[name] * term for name, term in terms.items()), terms

    @torch.no_grad()
    def _teach(self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor, added: dict | None):
        dtype = next(self.teacher.parameters()).dtype
        # SDXL's sizes stay in float32, as the student gets them: bfloat16 tells 1020 from 1024 pixels, and not finer.
        return self.teacher(x_t.to(dtype), t, context.to(dtype), added)

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


def text_networks(encoders: Encoders) -> dict[str, Network]:
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
        made[name] = Network(model, model)
    return made


def unused_text_modules(encoders: Encoders, name: str, model: nn.Module) -> list[nn.Module]:
    """What lies behind the last hidden state that is read: SDXL takes its first encoder's last but one."""
    if not encoders.sdxl or name != "text_encoder":
        return []
    inner = getattr(model, "text_model", model)
    return [inner.encoder.layers[-1], inner.final_layer_norm]
