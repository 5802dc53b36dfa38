"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378); by low-rank updates, LCM-LoRA (arXiv 2311.05556)

A student f learns to say the end of its teacher's trajectory from anywhere on it: at x_t what it says one solver step
further down, at x_s, where that is held fixed.

    L = d(f(x_t, t), f(x_s, s)),    f(x, t) = c_skip(t) x + c_out(t) x_0(x, t),    c_skip(0) = 1, c_out(0) = 0

x_s is a step of DDIM with guidance from x_t, a noised image, over `skip` timesteps (k in the paper). The target is of
the student's own weights, as with LCM-LoRA, not of an average. The guidance becomes part of the student, and its scale
is no input of the UNet: any program runs the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from accel.dtypes import FLOATS, torch_dtype
from accel.errors import UserError

from ..data import rng
from ..data.draws import Draw, take
from ..data.encoders import Encoders, sent
from ..diffusion.denoising import NOISE, POSTERIOR, clean
from ..diffusion.losses import per_row
from ..diffusion.process import Diffusion
from ..settings import LCMRecipe
from ..training.method import OptimizerPhase, Terms, TrainedNetwork
from . import shared_lora
from .guidance import guided
from .text_to_image import TextToImage

ORIGINAL_STEPS = 50  # the grid of which LCMScheduler takes every n-th timestep, and no LoRA file can say another one
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
_LORA_RATE, _FULL_RATE = 1e-4, 1e-6


def completed(recipe: LCMRecipe, encoders: Encoders) -> LCMRecipe:
    """The recipe with the learning rate filled in, which depends on the rank."""
    rate = recipe.learning_rate or (_LORA_RATE if recipe.rank else _FULL_RATE)
    return dataclasses.replace(recipe, learning_rate=rate)


class LCM:
    """The method: one UNet learns, or a LoRA of it; the teacher is frozen, and shares the LoRA's UNet.

    Args:
        recipe: its settings.
        encoders: the frozen half of the student's pipeline.
    """

    def __init__(self, recipe: LCMRecipe, encoders: Encoders):
        self.recipe, self.encoders = recipe, encoders
        self.family = TextToImage(recipe, encoders)
        self.process = self.family.process
        check(recipe, self.family)
        self.student, base = shared_lora.student(recipe, self.family)
        self.teacher = shared_lora.teacher(self.family, base)
        self.networks = {"unet": TrainedNetwork(self.student, self.student, shardable=base is None)}
        self.timestep = Draw("timestep", low=1, high=self.process.levels)
        self.phases = (OptimizerPhase("unet", ("unet",), draws=(POSTERIOR, NOISE, self.timestep)),)
        self.dtype = torch.float32

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        chosen = self.recipe.teacher_dtype
        theirs = dtype if chosen == "auto" else torch_dtype(chosen, ("auto", *FLOATS), "teacher dtype")
        self.device, self.dtype = device, dtype
        shared_lora.place(self.teacher, device, theirs)
        shared_lora.place(self.student, device, dtype)
        self.family.ready()

    def loss(self, phase: OptimizerPhase, batch: Mapping[str, Any], step: int) -> tuple[torch.Tensor, Terms]:
        recipe, index, conditions = self.recipe, batch["index"], self.family.conditions(batch)
        x0 = clean(batch, recipe.seed)
        eps, t = (take(batch, recipe.seed, draw) for draw in (NOISE, self.timestep))
        s = (t - recipe.skip).clamp(min=0)
        high = max(recipe.guidance, recipe.guidance_high)
        scale = sent(rng.uniform(recipe.seed, index, "scale", recipe.guidance, high), x0.device)
        with torch.no_grad():
            x_t = self.process.add_noise(x0, eps, t)
            _, said = guided(self.family, self.teacher, x_t, t, conditions, per_row(scale, x_t.double()))
            x_s = ddim(self.process, said, x_t, t, s)
            wanted = self.consistent(x_s, s, conditions)
        distance = F.mse_loss if recipe.loss == "l2" else lambda x, y: huber(x, y, recipe.huber)
        error = distance(self.consistent(x_t, t, conditions), wanted)
        return error, {"consistency": error}

    def consistent(self, x: torch.Tensor, t: torch.Tensor, conditions: Any) -> torch.Tensor:
        """f(x, t), float32 [b, c, h, w]."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            said = self.family.call(self.networks["unet"].module, x, t, conditions)
        c_skip, c_out = (per_row(c, x.double()) for c in boundary(t))
        return (c_skip * x + c_out * self.process.x0(said, x, t)).float()

    @property
    def scheduler(self) -> dict[str, Any]:
        """Fields of LCMScheduler, whatever the model's own says: one by DMD2 has others."""
        return {"original_inference_steps": ORIGINAL_STEPS, "timestep_scaling": TIMESTEP_SCALING}

    def samples(self) -> Any:
        return self.family.draw(self.student, dict(num_inference_steps=self.recipe.few_steps), **self.scheduler)

    def save(self, folder: Path) -> None:
        sampler = {"name": "lcm", "steps": self.recipe.few_steps, "guidance": 0.0} | self.scheduler
        self.family.write(folder, self.student, sampler)


def boundary(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c_skip and c_out, float64 [b] (arXiv 2303.01469, appendix C)."""
    scaled = t.double() * TIMESTEP_SCALING
    return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / (scaled**2 + SIGMA_DATA**2).sqrt()


def ddim(process: Diffusion, said: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """x_s: a step of DDIM (arXiv 2010.02502, equation 12, eta = 0) from t down to s, in the dtype of x_t."""
    x0 = process.x0(said, x_t, t)
    a, a_next = (per_row(process.alpha_bar(level), x0) for level in (t, s))
    eps = (x_t.double() - a.sqrt() * x0) / (1 - a).sqrt()
    return (a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps).to(x_t.dtype)


def huber(x: torch.Tensor, wanted: torch.Tensor, c: float) -> torch.Tensor:
    """Mean of sqrt(d^2 + c^2) - c over all elements: quadratic below c, linear above."""
    return ((x - wanted).square() + c**2).sqrt().sub(c).mean()


def check(recipe: LCMRecipe, family: TextToImage) -> None:
    """Refuse what cannot be trained, or could not be sampled.

    Raises:
        UserError: naming the field.
    """
    levels = family.process.levels
    for name, value, most in (("skip", recipe.skip, levels - 1), ("few_steps", recipe.few_steps, ORIGINAL_STEPS)):
        if not 1 <= value <= most:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"invalid {name}: {value} (expected an integer >= 1 and <= {most})", f"leave out {flag} for the default"
            )
    if recipe.rank and family.teacher is family.encoders.source and recipe.teacher_dtype != "auto":
        raise UserError("the teacher shares its weights with the student", "leave out --teacher-dtype")
    if recipe.guidance_high and recipe.guidance_high < recipe.guidance:
        raise UserError(
            f"guidance is drawn from {recipe.guidance:g} to {recipe.guidance_high:g}, which is lower",
            "--guidance 6 --guidance-high 16",
        )
    for source in (family.encoders.source, family.teacher):
        if source.config("unet").get("time_cond_proj_dim") is not None:
            raise UserError(
                f"the UNet of {source.name} takes the guidance scale as an input (time_cond_proj_dim); here the scale "
                "becomes part of the student, as with LCM-LoRA",
                "give the model that it was distilled from",
            )
