"""DMD2: improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

A generator G learns to generate in a few steps what its teacher generates in many. Per sample, at a random t,

    grad_x = (mu_fake(x_t) - mu_real(x_t)) / mean |x - mu_real(x_t)|,        x = G(z),    mu: predicted x_0

mu_real is the frozen teacher with guidance, which may be taken at another timestep than the rest (decoupled DMD, Liu et
al. 2025, arXiv 2511.22677); mu_fake follows G's own distribution: it learns to denoise G's images, in
several updates for each of G's (two time-scale update rule). A discriminator on mu_fake's bottleneck tells G's images
from real ones at every noise level. For several steps G learns on its own intermediate results (backward simulation).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from accel.dtypes import FLOATS, torch_dtype
from accel.engines.offloading.visiting import Visiting
from accel.errors import UserError
from accel.sampling.samplers import dmd2_timesteps
from accel.trt.cuda import Cuda

from ..data import rng
from ..data.draws import Draw, take
from ..data.encoders import Encoders, sent
from ..diffusion.denoising import NOISE, POSTERIOR, clean
from ..diffusion.losses import per_row
from ..diffusion.process import Constants
from ..edm.source import ClassEncoders
from ..settings import DMD2Recipe
from ..training import speed
from ..training.method import OptimizerPhase, Terms, TrainedNetwork
from ..watching.monitors import Monitor
from . import critic, shared_lora
from .class_to_image import ClassToImage
from .guidance import guided
from .text_to_image import TextToImage

MONITORS = (
    Monitor(
        "generator/lag",
        1.25,
        "the fake score does not keep up with the generator's images, and the matching gradient is noise",
        "a larger --ratio or --critic-learning-rate, or a smaller --learning-rate",
    ),
    Monitor(
        "critic/accuracy",
        0.95,
        "the discriminator recognises every generated image, and the generator has no gradient to follow",
        "a smaller --discriminator-weight or --critic-learning-rate",
    ),
)


class DMD2:
    """The method: generator and critic learn in phases; the teacher is frozen.

    Args:
        recipe: its settings.
        encoders: the frozen half of the generator's pipeline, which says what family it is of.
    """

    monitors = MONITORS

    def __init__(self, recipe: DMD2Recipe, encoders: Encoders | ClassEncoders):
        self.recipe, self.encoders = recipe, encoders
        self.family = family = (ClassToImage if encoders.by_class else TextToImage)(recipe, encoders)
        if recipe.real_guidance != 1 and not family.guides:
            raise UserError(f"{encoders.source.name} has no unconditional score to guide with", "--real-guidance 1")
        self.process = family.process
        self.timesteps = timesteps_of(recipe, self.process.levels)
        check_decoupled(recipe, self.timesteps, int(recipe.low * self.process.levels))
        self.generator, fake, self.teacher = shared_lora.networks(recipe, family)
        steps = len(self.timesteps) if recipe.step_aware and family.guides else 1
        self.critic = critic.Critic(fake, family, recipe.seed, steps, adversarial=bool(recipe.adversarial_weight))
        self.networks = {
            "generator": TrainedNetwork(
                self.generator, self.generator, shardable=not shared_lora.is_shared(self.generator)
            ),
            "critic": TrainedNetwork(
                self.critic, self.critic, averaged=False, shardable=not shared_lora.is_shared(self.critic)
            ),
        }
        rate = recipe.critic_learning_rate or recipe.learning_rate
        self.phases = (
            OptimizerPhase(
                "generator",
                ("generator",),
                every=recipe.ratio,
                start=recipe.critic_warmup,
                draws=self.draws_of_generator(),
            ),
            OptimizerPhase("critic", ("critic",), learning_rate=rate, draws=self.draws_of_critic()),
        )
        self._constants = Constants()
        self._drawn: dict[int, torch.Tensor] = {}
        self.dtype = torch.float32
        self._away: Visiting | None = None

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        chosen = self.recipe.teacher_dtype
        theirs = dtype if chosen == "auto" else torch_dtype(chosen, ("auto", *FLOATS), "teacher dtype")
        self.device, self.dtype = device, dtype
        shared_lora.place(self.teacher, "cpu" if self.recipe.offload_teacher else device, theirs)
        for network in (self.generator, self.critic.network):
            shared_lora.place(network, device, dtype)
        for network in (self.generator, self.critic.network, self.teacher):
            speed.lay_out(shared_lora.within(network, lambda unet: unet), self.recipe)
        if self.recipe.offload_teacher and device.type == "cuda":  # its weights are contiguous there
            self._away = Visiting(self.teacher, Cuda(device.index or 0), "model")
        if self.recipe.compile:
            self.teacher.compile()
        self.family.ready()

    # --------------------------------------------------------------------------------------------------- the two phases

    def loss(self, phase: OptimizerPhase, batch: Mapping[str, Any], step: int) -> tuple[torch.Tensor, Terms]:
        first = batch["index"][0]
        # Until the backward pass is done: it may compute parts of the critic anew.
        self.critic.learn(phase.name == "critic")
        last = self.last(batch, step)
        if phase.name == "generator":
            x = self.draw(batch, last)
            self._drawn[first] = x.detach()
            return self.generator_phase(x, batch, last)
        x = self._drawn.pop(first, None)
        if x is None:
            with torch.no_grad():
                x = self.draw(batch, last)
        return self.critic_phase(x, batch, last)

    def last(self, batch: Mapping[str, Any], step: int) -> list[int]:
        """At which of its steps G is trained, for each image of a batch: all of them in turn, or one that all share.

        Shared, it depends on the training step alone, so that all processes agree. A critic that meets one step a batch
        is fitted to the last one it met, and pushes the images of the other steps away from it.
        """
        count, rows = len(self.timesteps), len(batch["index"])
        if self.recipe.mixed_steps and rows >= count:
            return [index % count for index in batch["index"]]
        return [int(rng.generator(self.recipe.seed, step, "steps").integers(count))] * rows

    def generator_phase(self, x: torch.Tensor, batch: Mapping[str, Any], last: list[int]) -> tuple[torch.Tensor, Terms]:
        """Losses of x, the images of G's steps `last`."""
        gradient, diagnostics = self.matching_gradient(x.detach(), batch, last)
        terms = {"matching": matching_loss(x, gradient)}
        total = self.recipe.matching_weight * terms["matching"]
        if self.recipe.adversarial_weight:
            t, eps = self.noise_level(batch, "fake", draw=2)
            with self.autocast():
                x_t = self.process.add_noise(x, eps, t)
                # Not through DDP, which would wait for gradients of the critic's weights.
                logits = self.critic(fake=(x_t, t, self.family.conditions(batch), self.steps(last, x)))[1]
            terms["adversarial"] = critic.generator_loss(logits)
            total = total + self.recipe.adversarial_weight * terms["adversarial"]
        return total, terms | diagnostics

    def critic_phase(self, x: torch.Tensor, batch: Mapping[str, Any], last: list[int]) -> tuple[torch.Tensor, Terms]:
        t, eps = self.noise_level(batch, "critic")
        conditions, steps = self.family.conditions(batch), self.steps(last, x)
        score = (self.process.add_noise(x, eps, t), t, conditions, steps)
        fake = real = None
        if self.recipe.adversarial_weight:
            fake, real = (
                (self.process.add_noise(image, noise, level), level, conditions, steps)
                for image, (level, noise) in (
                    (x, self.noise_level(batch, "fake")),
                    (clean(batch, self.recipe.seed), self.noise_level(batch, "real")),
                )
            )
        with self.autocast():
            said, on_fake, on_real = self.networks["critic"].module(score, fake, real)
        terms = {"denoising": self.process.denoising_loss(said, x, eps, t)}
        total = terms["denoising"]
        if on_fake is not None:
            terms["discriminator"] = critic.discriminator_loss(on_fake, on_real)
            total = total + self.recipe.discriminator_weight * terms["discriminator"]
            right = torch.cat([on_fake < 0, on_real > 0]).float().mean()
            terms["accuracy"] = right  # of the discriminator: 0.5 is guessing, 1 leaves the generator without a slope
        return total, terms

    # ---------------------------------------------------------------------------------------------------- the generator

    def draw(self, batch: Mapping[str, Any], last: list[int]) -> torch.Tensor:
        """x = G(...) [b, c, h, w]: G's last call has a gradient where gradients are on, those before it never.

        Args:
            last: the step of each image's last call.
        """
        noise = self.normal(batch, "noise")
        if not self.recipe.backward_simulation:
            return self.draw_from_real(batch, last, noise)
        z, drawn = self.process.start(noise, self.at(0, noise)), {}
        for number in range(max(last) + 1):
            for row, x in self.generate(z, number, batch, [row for row, step in enumerate(last) if step == number]):
                drawn[row] = x
            later = [row for row, step in enumerate(last) if step > number]
            if later:
                with torch.no_grad():
                    made = dict(self.generate(z, number, batch, later))
                x = torch.stack([made.get(row, noise[row]) for row in range(len(z))])
                z = self.process.add_noise(x, self.normal(batch, "renoise", number), self.at(number + 1, x))
        return torch.stack([drawn[row] for row in range(len(z))])

    def draw_from_real(self, batch: Mapping[str, Any], last: list[int], noise: torch.Tensor) -> torch.Tensor:
        """As `draw`, but G's last call sees noised real images, which it never sees at inference."""
        real, drawn = clean(batch, self.recipe.seed), {}
        for number in sorted(set(last)):
            at = self.at(number, noise)
            z = self.process.add_noise(real, noise, at) if number else self.process.start(noise, at)
            drawn |= dict(self.generate(z, number, batch, [row for row, step in enumerate(last) if step == number]))
        return torch.stack([drawn[row] for row in range(len(noise))])

    def generate(self, z: torch.Tensor, number: int, batch: Mapping[str, Any], rows: list[int]) -> Any:
        """Step `number` for some images of the batch: (row, G's x_0 of it) of each."""
        if not rows:
            return ()
        chosen = self._constants(rows, z.device)
        x_t = z[chosen]
        t = self.at(number, x_t)
        conditions = self.family.rows(self.family.conditions(batch), chosen)
        with self.autocast():
            said = self.family.call(self.networks["generator"].module, x_t, t, conditions)
        return zip(rows, self.process.x0(said, x_t, t).float(), strict=True)

    # ----------------------------------------------------------------------------------------------------- the gradient

    @torch.no_grad()
    def matching_gradient(
        self, x: torch.Tensor, batch: Mapping[str, Any], last: list[int]
    ) -> tuple[torch.Tensor, Terms]:
        """The gradient of distribution matching by x [b, c, h, w], and diagnostics of the fake score."""
        t, eps = self.matching_noise(batch, "matching", last)
        x_t = self.process.add_noise(x, eps, t)
        with self.autocast():
            said, *_ = self.critic(score=(x_t, t, self.family.conditions(batch), self.steps(last, x)))
            fake = self.process.x0(said, x_t, t)
        real = self.real(x, x_t, t, batch, last)
        gradient = matching_gradient(x, real, fake)
        error = (x - fake).abs().mean() / (x - real).abs().mean()
        # Above 1 the fake score knows G's images less well than the teacher does: it lags, and the gradient is noise.
        return gradient.float(), {"gradient": gradient.abs().mean(), "lag": error}

    def real(
        self, x: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, batch: Mapping[str, Any], last: list[int]
    ) -> torch.Tensor:
        """mu_real, float64; decoupled, guidance's part is of a timestep and noise of its own (arXiv 2511.22677, eq. 8):

        mu_cond(x_t) + (scale - 1) (mu_cond(x_s) - mu_uncond(x_s)), x_s being x at the other timestep s.
        """
        scale = self.recipe.real_guidance
        if not self.recipe.decoupled:
            return self.process.x0(self.guided(x_t, t, batch, scale)[1], x_t, t)
        conditional = self.process.x0(self.guided(x_t, t, batch, 1.0)[0], x_t, t)
        s, eps = self.matching_noise(batch, "guidance", last)
        x_s = self.process.add_noise(x, eps, s)
        without, guided = (self.process.x0(said, x_s, s) for said in self.guided(x_s, s, batch, scale))
        return conditional + guided - without

    def guided(
        self, x_t: torch.Tensor, t: torch.Tensor, batch: Mapping[str, Any], scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's prediction without and with classifier-free guidance (arXiv 2207.12598), in float64."""
        with self._away.computing() if self._away else contextlib.nullcontext():
            said = guided(self.family, self.teacher, x_t, t, self.family.conditions(batch), scale)
        if self._away:
            self._away.leave()
        return said

    # ------------------------------------------------------------------------------------------------------------ parts

    def normal(self, batch: Mapping[str, Any], stream: str, draw: int = 0) -> torch.Tensor:
        return take(batch, self.recipe.seed, Draw(stream, draw))

    def noise_level(self, batch: Mapping[str, Any], stream: str, draw: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """A timestep of all [b] and noise of the latents' shape."""
        level, noise = (take(batch, self.recipe.seed, one) for one in self.noise_draws(stream, draw))
        return level, noise

    def noise_draws(self, stream: str, draw: int = 0) -> tuple[Draw, Draw]:
        return Draw(stream, draw, high=self.process.levels), Draw(stream, draw + 1)

    def matching_level(self, stream: str) -> Draw:
        """A timestep of the range of matching."""
        count = self.process.levels
        return Draw(stream, low=int(self.recipe.low * count), high=int(self.recipe.high * count) + 1)

    def constrained(self, stream: str) -> bool:
        """Whether a timestep is below that of the step which made an image: what is coarser was decided before it."""
        return self.recipe.decoupled == "constrained" or stream == "guidance" and self.recipe.decoupled == "hybrid"

    def matching_noise(
        self, batch: Mapping[str, Any], stream: str, last: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A timestep of the range of matching [b] and noise of the latents' shape."""
        level = self.matching_level(stream)
        if not self.constrained(stream):
            return take(batch, self.recipe.seed, level), self.normal(batch, stream, 1)
        ends = [min(level.high, self.timesteps[step]) for step in last]
        t = rng.integers(self.recipe.seed, batch["index"], stream, level.low, ends)
        return sent(t, batch["latent_mean"].device), self.normal(batch, stream, 1)

    def draws_of_matching(self) -> tuple[Draw, ...]:
        """What matching reads that does not depend on the images."""
        streams = ("matching", "guidance") if self.recipe.decoupled else ("matching",)
        levels = [self.matching_level(stream) for stream in streams if not self.constrained(stream)]
        return *levels, *(Draw(stream, 1) for stream in streams)

    def draws_of_images(self) -> tuple[Draw, ...]:
        """What `draw` reads."""
        if not self.recipe.backward_simulation:
            return NOISE, POSTERIOR
        return NOISE, *(Draw("renoise", number) for number in range(len(self.timesteps) - 1))

    def draws_of_generator(self) -> tuple[Draw, ...]:
        """What the generator's turn reads."""
        adversarial = self.noise_draws("fake", 2) if self.recipe.adversarial_weight else ()
        return *self.draws_of_images(), *self.draws_of_matching(), *adversarial

    def draws_of_critic(self) -> tuple[Draw, ...]:
        """What the critic's turn reads; the images too, as the generator's turn comes seldom."""
        own = (*self.draws_of_images(), *self.noise_draws("critic"))
        if not self.recipe.adversarial_weight:
            return own
        return *own, *self.noise_draws("fake"), *self.noise_draws("real"), POSTERIOR

    def steps(self, last: list[int], like: torch.Tensor) -> torch.Tensor:
        """`last` as the critic takes it, [b]."""
        return self._constants(last, like.device)

    def at(self, number: int, like: torch.Tensor) -> torch.Tensor:
        return torch.full((len(like),), self.timesteps[number], device=like.device)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def samples(self) -> Any:
        return self.family.samples(self.generator, self.timesteps)

    def save(self, folder: Path) -> None:
        self.family.save(folder, self.generator, self.timesteps)


def check_decoupled(recipe: DMD2Recipe, timesteps: tuple[int, ...], low: int) -> None:
    """Raises UserError where there is no guidance to decouple, or a step leaves nothing to constrain it to."""
    if not recipe.decoupled:
        return
    if recipe.real_guidance == 1:
        raise UserError("--real-guidance 1 has no guidance to decouple", "leave out --decoupled, or --real-guidance 8")
    if recipe.decoupled != "full" and timesteps[-1] <= low:
        raise UserError(
            f"the step at {timesteps[-1]} leaves no timestep for --decoupled {recipe.decoupled}: they begin at {low}",
            "--decoupled full, a smaller --low, or a later last step",
        )


def matching_gradient(x: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Equation 3 of DMD2 with the normalisation of DMD (arXiv 2311.18828, equation 8), float64 [b, c, h, w]."""
    scale = (x.double() - real.double()).abs().flatten(1).mean(1)
    return (fake.double() - real.double()) / per_row(scale, real.double())


def matching_loss(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient by x is `gradient` / x.numel(): half the squared distance to x - gradient, held fixed."""
    return 0.5 * F.mse_loss(x.float(), (x.float() - gradient).detach())


def timesteps_of(recipe: DMD2Recipe, training_steps: int) -> tuple[int, ...]:
    """The student's timesteps, falling.

    Raises:
        UserError: for steps or timesteps out of range.
    """
    if recipe.timesteps:
        try:
            given = tuple(int(text) for text in recipe.timesteps.split(","))
        except ValueError:
            raise UserError(f"timesteps {recipe.timesteps!r} are not numbers", "--timesteps 999,749,499,249") from None
    else:
        if not 1 <= recipe.few_steps <= training_steps:
            raise UserError(
                f"invalid few_steps: {recipe.few_steps} (expected an integer >= 1 and <= {training_steps})",
                "--few-steps 1, 2, 4 or 8",
            )
        given = tuple(dmd2_timesteps(recipe.few_steps, training_steps, one_step=training_steps - 1))
    if list(given) != sorted(set(given), reverse=True) or not 0 <= given[-1] <= given[0] < training_steps:
        raise UserError(
            f"timesteps {','.join(map(str, given))} do not fall within 0 to {training_steps - 1}",
            "--timesteps 999,749,499,249",
        )
    return given
