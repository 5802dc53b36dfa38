"""What a training method provides to the loop: networks, optimizer phases, the loss, samples, and saving the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..data.draws import Draw

Terms = dict[str, torch.Tensor]


@dataclass
class TrainedNetwork:
    """A network that learns, and how the loop treats it.

    Attributes:
        module: what the loss calls; the loop replaces it by its prepared form (DDP, FSDP2, autocast).
        model: what is saved and averaged: `module` itself or the part of it that holds the weights.
        averaged: whether it has an average, where the recipe asks for averages.
        shardable: whether FSDP may shard it; it cannot shard a network that several optimizer steps share.
    """

    module: nn.Module
    model: nn.Module
    averaged: bool = True
    shardable: bool = True

    @property
    def core(self) -> nn.Module:
        """The model of diffusers or transformers inside, which knows attention and gradient checkpointing."""
        inner = self.model
        while hasattr(inner, "core"):
            inner = inner.core
        return inner


@dataclass(frozen=True)
class OptimizerPhase:
    """One kind of optimizer step: the networks it updates, at which training steps, and its own learning rate.

    It is due at step `start` and every `every` steps from there on; `learning_rate` None is the recipe's. `draws` are
    the random tensors that its loss reads, for the loader to draw ahead; one that is not listed is drawn in the loss.
    """

    name: str
    networks: tuple[str, ...]
    every: int = 1
    start: int = 0
    learning_rate: float | None = None
    draws: tuple[Draw, ...] = ()

    def due(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0

    def count(self, steps: int) -> int:
        """How often it is due within the first `steps` training steps."""
        return max(0, -(-(steps - self.start) // self.every))


class Method(Protocol):
    """Knowledge distillation, fine-tuning, LoRA, DMD2: all that differs between them.

    Attributes:
        networks: what learns, by name.
        phases: the optimizer steps of one training step, in order.

    It may have `monitors`, a sequence of `monitors.Monitor`: signs of a failing run in its figures.
    """

    networks: dict[str, TrainedNetwork]
    phases: Sequence[OptimizerPhase]

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move what is frozen to the device. dtype: what mixed precision computes in."""

    def loss(self, phase: OptimizerPhase, batch: Mapping[str, Any], step: int) -> tuple[torch.Tensor, Terms]:
        """Total loss and its terms, each a mean over the batch."""

    def samples(self) -> Any:
        """Images of the sample prompts by the networks as they are now, as a PIL image."""

    def save(self, folder: Path) -> None:
        """Write what a user loads: a pipeline folder or a LoRA. The networks hold the weights to be saved."""
