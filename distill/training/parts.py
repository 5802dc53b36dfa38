"""What the loop makes of a recipe: a network ready to learn, an optimizer, a learning rate schedule."""

from __future__ import annotations

from typing import Any

import torch

from accel.errors import UserError

from ..settings import Recipe
from . import speed
from .attention import set_attention
from .method import OptimizerPhase, TrainedNetwork


def configure(network: TrainedNetwork, recipe: Recipe, device: torch.device, *, half: bool) -> None:
    core = network.core
    if hasattr(core, "set_attn_processor"):
        set_attention(core, recipe.attention, device=device, half=half)
    if recipe.gradient_checkpointing:
        enable = getattr(core, "enable_gradient_checkpointing", None) or getattr(
            core, "gradient_checkpointing_enable", None
        )
        if enable is None:
            raise UserError(f"{type(network.model).__name__} has no gradient checkpointing", "leave the option out")
        enable()
    speed.lay_out(network.model, recipe)
    if recipe.half_norms:
        speed.norms_in_half(core)
    if recipe.compile:
        network.module.compile()


def optimizer(
    recipe: Recipe, parameters: list[torch.nn.Parameter], learning_rate: float | None
) -> torch.optim.Optimizer:
    options = dict(
        lr=learning_rate or recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
        eps=recipe.epsilon,
    )
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=recipe.fused == "on" or None, **options)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **options)


def schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, phase: OptimizerPhase) -> Any:
    """Learning rate over optimizer steps. It counts a run's steps, not those of all processes together."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if recipe.lr_schedule == "constant" else recipe.lr_schedule
    return get_scheduler(
        name, optimizer, num_warmup_steps=recipe.warmup // phase.every, num_training_steps=phase.count(recipe.steps)
    )
