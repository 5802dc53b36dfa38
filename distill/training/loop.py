"""The training loop, on accelerate: one process or many, exact resume, logs, sample grids.

What learns and how is a `method.Method`; random numbers depend on the seed and the example's index (`data.rng`); so
this file knows neither losses nor data.

`fit.py` is a second, smaller loop on purpose: it trains networks from nothing that belong to no pipeline yet
(classifier, VAE, text encoder), one after another on one CPU, which need no encoders, phases, FSDP or trackers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.utils import clip_grad_norm_

from accel._version import __version__
from accel.dtypes import torch_dtype
from accel.errors import MissingPackage, UserError, unknown
from accel.progress import progress

from ..data.encoders import Encoders, encoded
from ..settings import Recipe
from ..watching import figures
from ..watching.figures import OnTheWay, Step, Turn
from ..watching.log import Log
from ..watching.monitors import Watch
from . import checkpoints, parts, sharding, speed, validation
from .method import Method
from .stop import Stop

TRACKERS = ("tensorboard", "wandb")
_STOP = "stop"  # the share of processes that were asked to stop, which goes round with the losses


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done, whether it was stopped before the last, and the mean seconds of a step."""

    steps: int
    stopped: bool
    seconds_per_step: float


def accelerator_for(recipe: Recipe, run: Path) -> Any:
    """accelerate's `Accelerator` as the launcher and the recipe say (DDP, FSDP2, mixed precision, trackers)."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    names = [name for name in recipe.log.split(",") if name not in ("none", "")]
    if recipe.log == "auto":
        names = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    for name in names:
        if name not in TRACKERS:
            raise unknown("log", name, ("auto", "none", *TRACKERS))
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(name, f"--log {name}", extra="train" if name == "tensorboard" else None)
    # accelerate keeps one state per process; a second run in it may well have another precision.
    if AcceleratorState._shared_state.get("_mixed_precision", recipe.mixed_precision) != recipe.mixed_precision:
        AcceleratorState._reset_state()
    try:
        made = Accelerator(mixed_precision=recipe.mixed_precision, log_with=names or None, project_dir=str(run))
    except ValueError as error:
        raise UserError(f"--mixed-precision {recipe.mixed_precision} is not possible here: {error}", "use no") from None
    if recipe.mixed_precision == "fp16" and made.device.type == "cpu":
        raise UserError("--mixed-precision fp16 needs a GPU: on a CPU nothing scales the loss", "use bf16, or no")
    if sharding.is_sharding(made):
        sharding.set_up(made, compute_dtype(recipe))
    return made


def train(
    method: Method,
    recipe: Recipe,
    encoders: Encoders,
    batches: Any,
    run: Path,
    *,
    accelerator: Any,
    console: Console | None = None,
) -> Outcome:
    """Train to `recipe.steps`, going on from the newest checkpoint of the run folder if there is one.

    Args:
        method: what learns; its networks are replaced by their prepared forms, and hold the averaged weights at the end
            where the recipe averages.
        recipe: the settings.
        encoders: for batches that come as pixels and captions.
        batches: (first step) -> iterator over micro-batches, see `examples.loader`.
        run: folder of checkpoints, logs and samples.

    Raises:
        UserError: when a loss is not finite (the step and the batch are named; the last checkpoint is intact), or the
            run folder belongs to other settings.
    """
    console = console or Console(stderr=True)
    loop = Loop(method, recipe, encoders, run, accelerator, console)
    return loop.run_all(batches)


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """What the networks compute in under the recipe's mixed precision."""
    return torch.float32 if recipe.mixed_precision == "no" else torch_dtype(recipe.mixed_precision)


class Loop:
    """The state of one run: prepared networks, optimizers, averages, and where it is."""

    def __init__(
        self, method: Method, recipe: Recipe, encoders: Encoders, run: Path, accelerator: Any, console: Console
    ):
        self.method, self.recipe, self.encoders, self.run = method, recipe, encoders, run
        self.accelerator, self.console = accelerator, console
        # A GPU is given the next step before the figures of this one are read; a CPU would gain nothing.
        self.ahead = accelerator.device.type == "cuda"
        self.stop = Stop(accelerator)
        run.mkdir(parents=True, exist_ok=True)
        dtype = compute_dtype(recipe)
        encoders.device = accelerator.device
        method.place(accelerator.device, dtype)
        for network in method.networks.values():
            parts.configure(network, recipe, accelerator.device, half=dtype != torch.float32)
        self.optimizers = {
            phase.name: parts.optimizer(
                recipe, sharding.parameters_of(method.networks[name] for name in phase.networks), phase.learning_rate
            )
            for phase in method.phases
        }
        self.prepare()
        self.schedulers = {
            phase.name: parts.schedule(recipe, self.optimizers[phase.name].optimizer, phase) for phase in method.phases
        }
        self.averages = self.make_averages()
        self.kept = {
            "settings": checkpoints.settings(recipe, accelerator.num_processes),
            "phases": {phase.name: list(phase.networks) for phase in method.phases},
            "accel": __version__,
            "torch": torch.__version__,
        }

    def prepare(self) -> None:
        """Hand networks and optimizers to accelerate: with FSDP2 it takes one network at a time, with its optimizer."""
        dtype = compute_dtype(self.recipe)
        sharded = sharding.is_sharding(self.accelerator)
        for phase in self.method.phases:
            networks = [self.method.networks[name] for name in phase.networks]
            modules = [network.module for network in networks]
            if sharded:
                sharding.choose_blocks(self.accelerator, modules[0])
            *prepared, self.optimizers[phase.name] = self.accelerator.prepare(*modules, self.optimizers[phase.name])
            for network, module in zip(networks, prepared, strict=True):
                network.module = module
                if sharded:
                    sharding.begin(module)
                if sharded and dtype != torch.float32:  # of other wrappers accelerate does it
                    module.forward = torch.autocast(self.accelerator.device.type, dtype)(module.forward)

    def make_averages(self) -> dict[str, Any]:
        from diffusers.training_utils import EMAModel

        if not self.recipe.ema:
            return {}
        return {
            name: EMAModel(sharding.parameters_of([network]), decay=self.recipe.ema, foreach=self.recipe.fused == "on")
            for name, network in self.method.networks.items()
            if network.averaged
        }

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, by the argument names of `checkpoints`."""
        return dict(
            networks=self.method.networks,
            averages={name: average.shadow_params for name, average in self.averages.items()},
            optimizers={phase: optimizer.optimizer for phase, optimizer in self.optimizers.items()},
            schedulers=self.schedulers,
            kept=self.kept,
            accelerator=self.accelerator,
        )

    # ------------------------------------------------------------------------------------------------------- the loop

    def run_all(self, batches: Any) -> Outcome:
        first = self.resume()
        log = Log(self.run, first, self.accelerator, self.recipe)
        watch = Watch(getattr(self.method, "monitors", ()))
        shown = self.accelerator.is_main_process
        began, step, kept = time.perf_counter(), first, first
        how = dict(steps=self.recipe.steps, done=first, keep=True, shown=shown, console=self.console)
        queued: deque[Step] = deque()
        validated: dict[int, dict[str, float]] = {}
        with self.stop, log, progress("training", **how) as report:

            def told(most: int) -> None:
                """Read and write down the figures of all but the latest `most` steps."""
                while len(queued) > most:
                    number = queued[0].number
                    figures = self.read(queued.popleft()) | validated.pop(number, {})
                    log.write(number, figures)
                    report(_short(figures), number)
                    for text in watch.see(figures) if shown else ():
                        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

            with contextlib.closing(batches(first)) as stream:
                while step < self.recipe.steps and not self.stop.asked():
                    queued.append(self.one_step(step, stream))
                    step += 1
                    validated[step] = self.validate(step, batches)
                    last = step == self.recipe.steps
                    keeps = last or step % self.recipe.checkpoint_every == 0
                    draws = self.recipe.sample_every and (last or step % self.recipe.sample_every == 0)
                    told(0 if keeps or draws or not self.ahead else 1)
                    if keeps:
                        self.checkpoint(step)
                        kept = step
                    if draws:
                        log.show(step, self.sample(step))
            told(0)
            stopped = step < self.recipe.steps
            if stopped and step > kept:
                self.checkpoint(step)
        if not stopped:
            self.use_averages()
        for network in self.method.networks.values() if self.recipe.channels_last == "on" else ():
            speed.contiguous(network.model)
        return Outcome(step, stopped, (time.perf_counter() - began) / max(1, step - first))

    def one_step(self, step: int, stream: Iterator[Mapping[str, Any]]) -> Step:
        """Run every phase that is due. Its figures are terms, averaged over micro-batches and processes, and norms.

        Where float16 overflows, the scaler skips the update and the step counts all the same: the schedules depend on
        the number of the step alone.
        """
        micro = [encoded(next(stream), self.encoders) for _ in range(self.recipe.accumulation)]
        images = [name for batch in micro for name in batch["name"]]
        turns: list[Turn] = []
        for phase in self.method.phases:
            if not phase.due(step):
                continue
            optimizer, networks = self.optimizers[phase.name], [self.method.networks[name] for name in phase.networks]
            sums: dict[str, torch.Tensor] = {}
            for number, batch in enumerate(micro):
                last = number + 1 == len(micro)
                with contextlib.ExitStack() as stack:
                    if not last:
                        for network in networks:
                            stack.enter_context(self.accelerator.no_sync(network.module))
                    loss, terms = self.method.loss(phase, batch, step)
                    self.accelerator.backward(loss / len(micro))
                for name, value in {"loss": loss, **terms}.items():
                    sums[name] = sums.get(name, 0) + value.detach().float() / len(micro)
            means = self.reduced(sums | {_STOP: float(self.stop.wanted)})
            self.accelerator.unscale_gradients(optimizer)
            norm = clip_grad_norm_(sharding.parameters_of(networks), self.recipe.max_grad_norm)
            names = (*sums, _STOP, "grad_norm")
            values = torch.cat([means, figures.stacked([sharding.whole(norm)], means.device)])
            turn = Turn(phase.name, names, OnTheWay(values), self.schedulers[phase.name].get_last_lr()[0])
            if not self.ahead:
                self.check(turn, step + 1, images)
            turns.append(turn)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.schedulers[phase.name].step()
            for name in phase.networks:
                if name in self.averages:
                    self.averages[name].step(sharding.parameters_of([self.method.networks[name]]))
        return Step(step + 1, turns, images)

    def reduced(self, sums: Mapping[str, torch.Tensor | float]) -> torch.Tensor:
        """Means over all processes, float32 [n] on the device."""
        own = figures.stacked(list(sums.values()), self.accelerator.device)
        return self.accelerator.reduce(own, reduction="mean")

    def read(self, done: Step) -> dict[str, float]:
        """What a step's log line says.

        Raises:
            UserError: for what is not finite.
        """
        said: dict[str, float] = {}
        for turn in done.turns:
            values = self.check(turn, done.number, done.images)
            self.stop.agreed |= values.pop(_STOP) > 0
            prefix = f"{turn.phase}/" if len(self.method.phases) > 1 else ""
            said |= {prefix + name: value for name, value in (values | {"lr": turn.rate}).items()}
        return said

    def check(self, turn: Turn, number: int, images: Sequence[str]) -> dict[str, float]:
        """The figures of a turn.

        A finite loss may have a gradient that is not: it would spoil the weights, and the next checkpoint. On a GPU the
        step after it has begun by then; nothing of either is kept.
        """
        values = turn.read()
        norm = values["grad_norm"]
        if not all(math.isfinite(value) for name, value in values.items() if name != "grad_norm"):
            raise self.not_finite("loss", number, turn.phase, values, images)
        scaler = self.accelerator.scaler
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise self.not_finite("gradient", number, turn.phase, values, images)
        return values

    def not_finite(
        self, what: str, number: int, phase: str, values: Mapping[str, float], images: Sequence[str]
    ) -> UserError:
        from accelerate.utils import gather_object

        names = gather_object(list(images))
        terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != _STOP)
        newest = checkpoints.all_of(self.run)
        last = f"the last checkpoint, {newest[-1]}, is intact" if newest else "there is no checkpoint yet"
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return UserError(
            f"the {what} of phase {phase} is not finite at step {number}: {terms}; batch: {shown}; {last}",
            "look at these images; lower --learning-rate, or use --mixed-precision bf16 instead of fp16",
        )

    # --------------------------------------------------------------------------------------------- checkpoints, samples

    def resume(self) -> int:
        if self.accelerator.is_main_process:
            checkpoints.tidy(self.run)
        self.accelerator.wait_for_everyone()
        found = checkpoints.all_of(self.run)
        if not found:
            return 0
        step = checkpoints.read(found[-1], **self.state)
        if step > self.recipe.steps:
            raise UserError(
                f"the run in {self.run} is at step {step} already, {self.recipe.steps} are asked for",
                f"--train-steps {step}, another --run, or delete the checkpoints beyond step {self.recipe.steps}",
            )
        for name, average in self.averages.items():
            average.optimization_step = sum(phase.count(step) for phase in self.method.phases if name in phase.networks)
        if self.accelerator.is_main_process:
            said = f"goes on at step {step} of {self.recipe.steps}, from {found[-1]}"
            self.console.print(said, soft_wrap=True, markup=False)
        return step

    def checkpoint(self, step: int) -> None:
        path = checkpoints.write(self.run, step, keep=self.recipe.keep, **self.state)
        if self.accelerator.is_main_process:
            self.console.print(f"step {step}: checkpoint {path}", soft_wrap=True, markup=False)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the networks hold their averages."""
        for name, average in self.averages.items():
            average.store(sharding.parameters_of([self.method.networks[name]]))
        self.use_averages()
        try:
            yield
        finally:
            for name, average in self.averages.items():
                average.restore(sharding.parameters_of([self.method.networks[name]]))

    def use_averages(self) -> None:
        for name, average in self.averages.items():
            average.copy_to(sharding.parameters_of([self.method.networks[name]]))

    def validate(self, step: int, batches: Any) -> dict[str, float]:
        """The losses on images held out, where the recipe holds some out and it is time: those of the averages."""
        due = step % self.recipe.validation_every == 0 or step == self.recipe.steps
        if not due or getattr(batches, "held_out", None) is None:
            return {}
        with self.averaged():
            return validation.losses(self.method, batches.held_out(), self.encoders, self.accelerator, step)

    def sample(self, step: int) -> Any:
        with self.averaged(), self.accelerator.autocast():
            for network in self.method.networks.values():
                for unit in sharding.units(network.module):  # so that parts of a network can be called
                    unit.unshard()
            image = self.method.samples()
            for network in self.method.networks.values():
                sharding.reshard(network.module)
        if self.accelerator.is_main_process:
            path = self.run / "samples" / f"step-{step:06d}.png"
            path.parent.mkdir(exist_ok=True)
            image.save(path)
        return image


def _short(figures: Mapping[str, float]) -> str:
    shown = [name for name in figures if not name.endswith(("grad_norm", "lr"))]
    return " ".join(f"{name} {figures[name]:.4f}" for name in shown[:6])
