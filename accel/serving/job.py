"""A request of a client as an order, and each of its images as a job: what is to be made, and how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..arrays import cast
from ..engines.base import to_numpy
from ..pipeline import Pipeline
from ..pipeline.denoise import Part
from ..pipeline.initial_latents import Start
from ..pipeline.input_images import CONTROL_INPUTS
from ..pipeline.request import Chunk, Request
from ..pipeline.run import Run, extra_rows
from ..sampling.linear import State, begin, step
from .batch import Candidate


@dataclass(frozen=True)
class Event:
    """Something that a client may be told.

    Attributes:
        kind: "preview", "image", "failed" or "done".
        index: which image of the order.
        image: a PIL image.
        seed: of the image.
        error: what went wrong.
    """

    kind: str
    index: int = 0
    image: Any = None
    seed: int = 0
    error: BaseException | None = None


@dataclass(eq=False)
class Order:
    """A request of a client.

    Attributes:
        call: arguments of a pipeline's call, by our names, with one prompt and a seed.
        requests: each image as a request of its own.
        alone: whether it cannot share calls and runs by itself.
        tell: takes events; called from the worker's thread.
        previews: the steps (counted from 1) after which a preview is told.
        loras: LoRA files that it is made with.
        arrived: seconds, of `time.monotonic`.
        steps: of all its images.
        done: steps that are made.
        latest: (plan, row, what the UNet was shown, what it predicted) of the last step.
    """

    call: Mapping[str, Any]
    requests: list[Request]
    tell: Callable[[Event], None]
    alone: bool = False
    previews: frozenset[int] = frozenset()
    loras: tuple[Any, ...] = ()
    arrived: float = field(default_factory=time.monotonic)
    done: int = 0
    latest: tuple[Any, ...] | None = None
    texts: Mapping[str, Any] | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def images(self) -> int:
        return len(self.requests)

    @property
    def steps(self) -> int:
        return sum(request.plan.steps for request in self.requests)

    @property
    def cancelled(self) -> bool:
        return self._over.is_set()

    def cancel(self) -> None:
        """Nobody wants it any more; the worker drops it before its next step."""
        self._over.set()


@dataclass(frozen=True, eq=False)
class Job:
    """One image of an order.

    Attributes:
        order, index: whose it is.
        run: the functions of the pipeline for its request.
        feeds: what the UNet takes beside latents and timestep.
        start: its initial latents, and what is put back after each step.
        extra: further input channels of the UNet, for each row of the image.
        state: how far it is; None before it is prepared.
    """

    order: Order
    index: int
    run: Run
    feeds: Mapping[str, Any] = field(default_factory=dict)
    start: Start | None = None
    extra: tuple[Any, ...] = ()
    state: State | None = None

    @property
    def request(self) -> Request:
        return self.order.requests[self.index]

    @property
    def chunk(self) -> Chunk:
        return self.request.chunks[0]

    @property
    def made(self) -> int:
        """Steps that are made."""
        return 0 if self.state is None else self.state.row - self.request.plan.start

    @property
    def t(self) -> float:
        table = self.request.plan.table
        return table.rows[self.made].t

    @property
    def over(self) -> bool:
        return self.state is not None and self.request.plan.table.over(self.state)

    def candidate(self, row_timesteps: bool) -> Candidate:
        """What a policy knows of it.

        Args:
            row_timesteps: whether the UNet takes a timestep for each row.
        """
        plan, pictures = self.request.plan, self.request.images.prompt
        key: Hashable = (self.request.size, None if pictures is None else pictures.shape[1])
        if not row_timesteps:
            key = (key, self.t)
        return Candidate(self, self.order.arrived, plan.steps - self.made, plan.rows, key)

    def prepared(self) -> Job:
        """Ready for its first step: text encoded, initial latents made. The texts of an order are encoded once."""
        run, unet = self.run, self.run.engines["unet"]
        if self.order.texts is None:
            pictures = run.image_prompts()
            self.order.texts = run.texts(self.chunk) | run.image_prompt(self.chunk, pictures)
        feeds = run.feeds(self.chunk, dict(self.order.texts), unet)
        start, plan = run.start(self.chunk), self.request.plan
        x = cast(unet.array(start.x), "float32")
        state = begin(plan.table, x, noised=start.noised)
        return replace(self, feeds=feeds, start=start, extra=tuple(extra_rows(plan, start, unet)), state=state)

    @property
    def part(self) -> Part:
        """Its rows of the next call."""
        return Part(self.request.plan, self.state.x, self.t, self.feeds, self.extra)

    def advanced(self, prediction: Any) -> Job:
        """One step further: the same computation as a pipeline's loop."""
        i = self.state.row
        state = step(self.request.plan.table, self.state, prediction, lambda i: self.run.fresh(self.chunk, i))
        if self.start.constrain is not None:
            state = replace(state, x=self.start.constrain(i, state.x, self.run.engines["unet"].array))
        return replace(self, state=state)

    @property
    def latents(self) -> np.ndarray:
        return to_numpy(self.state.x)


def jobs_of(pipeline: Pipeline, order: Order) -> list[Job]:
    """The images of an order that shares calls."""
    parts = (pipeline.bundle, pipeline.engines, pipeline.tokenizers, pipeline.schedule)
    return [Job(order, i, Run(*parts, request, pipeline.text_cache)) for i, request in enumerate(order.requests)]


def can_share(pipeline: Pipeline, request: Request) -> bool:
    """Whether an image can share calls: not with a T2I-Adapter or a ControlNet, or a sampler with its own loop."""
    controlled = any(spec.name.startswith(CONTROL_INPUTS) for spec in pipeline.bundle.component("unet").inputs)
    return request.plan.table is not None and not controlled
