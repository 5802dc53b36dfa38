"""Fit one network after another, resumably: what every stage of a small training run needs and nothing more.

Random numbers of a step depend on the seed and the step alone, so a run that is killed and started again ends with the
same weights as one that was not.

`training.loop` is the loop of every training method; it starts from a pipeline. This one makes the parts of the first
pipeline, before there is any: a loss of random numbers is all it takes.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from accel.errors import UserError
from accel.files import read_json, write_json
from accel.progress import progress

CONSOLE = Console()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One network to fit: its name in the run folder, its length, its learning rate."""

    name: str
    steps: int
    batch: int
    learning_rate: float
    run: Path
    every: int
    ema: float
    seed: int


def step_generator(seed: int, name: str, step: int) -> torch.Generator:
    """Random numbers of one step of one stage. They depend on nothing before it, so a resumed run needs no state."""
    return torch.Generator().manual_seed(seed * 10**9 + sum(name.encode()) * 10**6 + step)


def learning_rate_at(step: int, stage: Stage) -> float:
    """Linear warm-up over 50 steps, then half a cosine down to a twentieth."""
    warm_up = min(50, max(1, stage.steps // 10))
    if step < warm_up:
        return stage.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, stage.steps - warm_up)
    return stage.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all: a run killed while it writes keeps its previous checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path, stage: Stage) -> dict[str, Any] | None:
    """The state a stage stopped in, or None to begin.

    Raises:
        UserError: when the run folder belongs to other settings.
    """
    if not path.is_file():
        return None
    state = torch.load(path, weights_only=True)
    if state["stage"] != signature(stage):
        raise UserError(
            f"{path} was written with other settings ({state['stage']}, now {signature(stage)})",
            f"use the same settings, another --run folder, or delete {path.parent}",
        )
    return state


def planned_steps(
    plan: Path, name: str, seconds: float, model: nn.Module, loss_of: Callable[[torch.Generator], torch.Tensor]
) -> int:
    """How many steps of a stage fit into `seconds`, measured once and kept in a file: a resumed run has the same plan.

    The model is not changed. It is timed without the optimizer's step, which small networks hardly notice.

    Raises:
        UserError: when the stage was planned for another time.
    """
    known = read_json(plan, "the plan of the run") if plan.is_file() else {}
    if known.get(name, {"seconds": seconds})["seconds"] != seconds:
        raise UserError(
            f"{plan} has {known[name]['seconds']:.0f} s for {name}, and now it would be {seconds:.0f} s",
            f"use the same --hours, another --run folder, or delete {plan.parent}",
        )
    if name not in known:
        times = []
        for trial in range(4):
            began = time.monotonic()
            loss_of(step_generator(0, name, trial)).backward()
            times.append(time.monotonic() - began)
        model.zero_grad(set_to_none=True)
        known[name] = dict(seconds=seconds, steps=max(2, int(seconds / statistics.median(times[1:]))))
        plan.parent.mkdir(parents=True, exist_ok=True)
        write_json(plan, known)
    return known[name]["steps"]


def signature(stage: Stage) -> str:
    """What must be equal for a checkpoint to go on from."""
    return (
        f"{stage.name} steps={stage.steps} batch={stage.batch} lr={stage.learning_rate} ema={stage.ema} "
        f"seed={stage.seed}"
    )


def fit(
    stage: Stage,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], torch.Tensor],
    look: Callable[[int, nn.Module], None] = lambda step, average: None,
) -> float:
    """Fit a model by AdamW, resuming if there is something to resume; it ends with the averaged weights.

    Args:
        stage: what, how long, where.
        model: its parameters are fitted in place.
        loss_of: the loss of one step, from that step's random numbers.
        look: called at every checkpoint with the step and the averaged model, to show how far it is.

    Returns:
        Seconds spent on the stage, earlier runs included.

    Raises:
        UserError: when the loss is not finite any more.
    """
    path = stage.run / f"{stage.name}.pt"
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    state = load_checkpoint(path, stage)
    first, spent = 0, 0.0
    if state:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
        if first == stage.steps:
            CONSOLE.print(f"{stage.name}: done before")
            model.load_state_dict(average.state_dict())
            return spent
        CONSOLE.print(f"{stage.name}: goes on at step {first} of {stage.steps}")
    began = time.monotonic()
    with progress(stage.name, steps=stage.steps, done=first, keep=True, console=CONSOLE) as report:
        smooth = float("nan")
        for step in range(first, stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, stage)
            loss = loss_of(step_generator(stage.seed, stage.name, step))
            value = loss.item()
            if not math.isfinite(value):
                raise UserError(
                    f"{stage.name}: the loss became {value} at step {step}",
                    "lower the learning rate; the last checkpoint is still good",
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            # Young averages forget fast, or the random start would stay in them.
            decay = min(stage.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
            done = step + 1
            report(f"loss {smooth:.4f}", done)
            if done % stage.every == 0 or done == stage.steps:
                save_checkpoint(
                    path,
                    dict(
                        stage=signature(stage),
                        step=done,
                        seconds=spent + time.monotonic() - began,
                        model=model.state_dict(),
                        average=average.state_dict(),
                        optimizer=optimizer.state_dict(),
                    ),
                )
                left = (time.monotonic() - began) / (done - first) * (stage.steps - done)
                CONSOLE.print(
                    f"{stage.name}: step {done} of {stage.steps}, loss {smooth:.4f}, about {left / 60:.0f} min left"
                )
                look(done, average)
    model.load_state_dict(average.state_dict())
    return spent + time.monotonic() - began
