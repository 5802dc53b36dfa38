"""The discriminator of DMD2: a head on the bottleneck of the fake score network (arXiv 2405.14867, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from accel.errors import UserError

from ..training import sharding


def head(channels: int, size: int) -> nn.Sequential:
    """Bottleneck [b, channels, size, size] to one logit [b, 1, 1, 1].

    4x4 convolutions of stride 2 until 4x4 cells are left, then one over all of them, each with group norm and SiLU, and
    a 1x1 convolution. Bottlenecks of less than 4x4 cells, of small images, begin with the convolution over all.

    Raises:
        UserError: for a size that does not halve down to 4 or below.
    """
    layers: list[nn.Module] = []
    # At one cell a group of two channels is normalised to their order alone, which has no slope: narrow networks need
    # fewer groups than the published 32 of 24 and 40 channels.
    groups = max(count for count in (1, 2, 4, 8, 16, 32) if channels % count == 0 and count * 16 <= max(channels, 16))

    def stage(kernel: int, stride: int, padding: int) -> None:
        layers.extend(
            (nn.Conv2d(channels, channels, kernel, stride, padding), nn.GroupNorm(groups, channels), nn.SiLU())
        )

    cells = size
    while size > 4:
        if size % 2:
            raise UserError(
                f"a bottleneck of {cells} x {cells} cells does not halve down to 4",
                "choose a resolution whose bottleneck is 4, 8, 16, 32 or 64 cells wide",
            )
        stage(4, 2, 1)
        size //= 2
    stage(size, size, 0)
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


def bottleneck(
    unet: nn.Module, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor, added: Mapping | None = None
) -> torch.Tensor:
    """The features of a `UNet2DConditionModel` at its bottleneck, [b, C, h, w]; the decoder does not run."""
    embedding = unet.time_embedding(unet.get_time_embed(sample=x_t, timestep=t))
    extra = unet.get_aug_embed(emb=embedding, encoder_hidden_states=context, added_cond_kwargs=added)
    embedding = embedding if extra is None else embedding + extra
    state = unet.conv_in(x_t)
    for block in unet.down_blocks:
        attends = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        state, _ = block(hidden_states=state, temb=embedding, **attends)
    if unet.mid_block is None:
        return state
    attends = {"encoder_hidden_states": context} if getattr(unet.mid_block, "has_cross_attention", False) else {}
    return unet.mid_block(state, embedding, **attends)


def bottleneck_shape(config: Mapping, cells: int) -> tuple[int, int]:
    """(channels, cells of a side) of a UNet's bottleneck for latents of `cells` x `cells`."""
    return config["block_out_channels"][-1], cells // 2 ** (len(config["block_out_channels"]) - 1)


class Critic(nn.Module):
    """The fake score mu_fake and, on its bottleneck, the discriminator D; one network, so that they train together.

    Args:
        network: a copy of the teacher.
        family: how it is called and where its bottleneck is (`text_to_image.TextToImage` and others).
        seed: of the head's weights.
        steps: number of the student's steps, if the critic is conditioned on the step that made an image, by an
            embedding that is added to the conditions (zero at first); 1 for no conditioning. Without it the scores are
            those of the mixture of all steps, which can be right while none of them is, and only the last step's
            images are used.
        adversarial: whether the discriminator learns.

    Every use is a call of the module itself: FSDP2 gathers the weights around it and nowhere else.
    """

    def __init__(self, network: nn.Module, family: Any, seed: int = 0, steps: int = 1, adversarial: bool = True):
        super().__init__()
        self.network = network
        self._family = family
        self.step_embedding = nn.Parameter(torch.zeros(steps, family.width)) if steps > 1 else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = head(*family.bottleneck_shape()).requires_grad_(adversarial)
        self._adversarial = adversarial

    @property
    def core(self) -> nn.Module:
        return self.network

    def learn(self, wanted: bool) -> None:
        """Whether a backward pass reaches the critic's weights. They are listed anew, FSDP2 has replaced them."""
        sharding.reshard(self)
        idle = set() if self._adversarial else set(self.head.parameters())
        for parameter in self.parameters():
            parameter.requires_grad_(wanted and parameter not in idle)

    def condition_on_step(self, conditions: Any, steps: torch.Tensor | None) -> Any:
        return (
            conditions
            if self.step_embedding is None
            else self._family.condition_on_step(conditions, self.step_embedding[steps])
        )

    def score(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Any, steps: torch.Tensor | None = None):
        """mu_fake's prediction, in the units of the teacher's, for images of the student's `steps` [b]."""
        return self._family.call(self.network, x_t, t, self.condition_on_step(conditions, steps))

    def logits(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Any, steps: torch.Tensor | None = None):
        """D(x_t) [b]: positive for real, negative for images of those `steps` of the student."""
        conditions = self.condition_on_step(conditions, steps)
        return self.head(self._family.bottleneck(self.network, x_t, t, conditions)).flatten(1).mean(1)

    def forward(self, score: tuple | None = None, fake: tuple | None = None, real: tuple | None = None):
        """Whatever is asked for in one call: all of a critic phase, or a part of it for the generator's.

        Args:
            score: arguments of `score`, or None.
            fake, real: arguments of `logits`, or None.

        Returns:
            prediction, logits of the fake ones, logits of the real ones; None for what was not asked for.
        """
        said = None if score is None else self.score(*score)
        return said, *(None if given is None else self.logits(*given) for given in (fake, real))


def generator_loss(logits: torch.Tensor) -> torch.Tensor:
    """softplus(-D(fake)): the non-saturating loss (Goodfellow et al. 2014, arXiv 1406.2661)."""
    return F.softplus(-logits.float()).mean()


def discriminator_loss(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """softplus(D(fake)) + softplus(-D(real))."""
    return F.softplus(fake.float()).mean() + F.softplus(-real.float()).mean()
