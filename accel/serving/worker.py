"""The thread that owns a pipeline: it takes orders, and makes one step of several images at a time."""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays import all_finite, to_host
from ..errors import Notice, Stopped, UserError
from ..pipeline import Pipeline
from ..pipeline.denoise import predict
from ..pipeline.output import not_finite, of_type
from ..pipeline.previews import shown
from ..pipeline.run import BLACK
from . import batch
from .batch import Shapes
from .job import Event, Job, Order, can_share, jobs_of
from .limits import Busy, Cancelled, Limits
from .metrics import Observer


class Worker:
    """Makes the images of one model.

    Args:
        name: what clients call it.
        pipeline: loaded, with a UNet that takes a timestep for each row where its engine can (`row_unet`); the worker
            closes it.
        shapes: the batches that the UNet is called with.
        policy: a key of `batch.POLICIES`.
        limits: `queue` of them is kept here.
        loras: LoRA files that clients may ask for, by name.
        observer: is told of steps and images.
        share: whether images share calls; without it each is made from its first step to its last by itself.
        digest: of the model, where it is not that of the pipeline's bundle.
    """

    def __init__(
        self,
        name: str,
        pipeline: Pipeline,
        *,
        shapes: Shapes | None = None,
        policy: str = "fifo",
        limits: Limits = Limits(),  # noqa: B008
        loras: Mapping[str, Any] | None = None,
        observer: Observer | None = None,
        share: bool = True,
        digest: str | None = None,
    ):
        batch.check_policy(policy)
        self.name, self.pipeline, self.policy, self.limits, self.share = name, pipeline, policy, limits, share
        unet = pipeline.engines["unet"].component
        self.shapes = shapes or Shapes.of(unet.dims[unet.inputs[0].shape[0]], None, int8=bool(unet.int8))
        self.row_timesteps = next(bool(spec.shape) for spec in unet.inputs if spec.name == "timestep")
        self.loras, self.observer = dict(loras or {}), observer or Observer()
        self.digest = digest or pipeline.bundle.digest
        self._jobs: list[Job] = []  # of orders that share calls
        self._waiting: list[Order] = []  # in order of arrival; from the first that runs alone on
        self._changed = threading.Condition()
        self._closing = self._abandon = False
        self._thread = threading.Thread(target=self._loop, name=f"accel-serve-{name}", daemon=True)
        self._thread.start()

    # What the APIs ask: `models.Maker`

    async def take(
        self, call: Mapping[str, Any], tell: Callable[[Event], None], *, partial: int = 0, loras: Sequence[Any] = ()
    ) -> Order:
        order = await asyncio.to_thread(self.order, call, tell, partial=partial, loras=loras)
        self.submit(order)
        return order

    async def progress(self, order: Order, image: bool) -> tuple[int, Any]:
        picture = await asyncio.to_thread(self.current, order) if image else None
        return order.done, picture

    async def health(self) -> tuple[bool, dict[str, Any]]:
        return self._thread.is_alive(), {}

    async def families(self) -> list[Any]:
        return []

    # From any thread

    def current(self, order: Order) -> Any:
        """What the last step of an order predicts, as a PIL image; None before the first."""
        if order.latest is None:
            return None
        return self.pipeline.previewer()(shown(*order.latest), order.requests[0].pixels)[0]

    def order(
        self, call: Mapping[str, Any], tell: Callable[[Event], None], *, partial: int = 0, loras: Sequence[Any] = ()
    ) -> Order:
        """An order of a call of the pipeline, refused where the pipeline would refuse it; nothing runs yet.

        Args:
            call: arguments of the call, by our names: one prompt, `num_images_per_prompt`, and a seed.
            tell: as in `Order`.
            partial: how many previews are told of each image.
            loras: names of `loras`, or (name, scale).

        Raises:
            UserError: for what does not fit the model or the limits.
        """
        from ..pipeline import arguments
        from ..pipeline.pipeline import default_call

        self.limits.check(call)
        count, seed = call.get("num_images_per_prompt") or 1, call["seed"]
        files = tuple(self._lora(entry) for entry in loras)
        requests = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Notice)
            for i in range(count):
                one = arguments.read(
                    default_call | {**call, "num_images_per_prompt": 1, "seed": seed + i}, default_call, {}
                )
                requests.append(self.pipeline.request(one))
        plan = requests[0].plan
        self.limits.check({"steps": plan.steps})
        shares = self.share and not files and plan.rows <= self.shapes.most and can_share(self.pipeline, requests[0])
        return Order(call, requests, tell, not shares, _spread(partial, plan.steps), files)

    def submit(self, order: Order) -> None:
        """Put an order in the queue.

        Raises:
            Busy: when the queue is full, or the server is shutting down.
        """
        with self._changed:
            if self._closing:
                raise Busy("the server is shutting down")
            if self._queued + order.images > self.limits.queue:
                raise Busy(f"the queue is full: {self._queued} images wait or are being made")
            self._waiting.append(order)
            self._changed.notify()
        self._count()

    @property
    def orders(self) -> list[Order]:
        """The orders that wait or are in the making, oldest first."""
        with self._changed:
            found = dict.fromkeys([*(job.order for job in self._jobs), *self._waiting])
        return sorted(found, key=lambda order: order.arrived)

    def close(self, drain: float = 30.0) -> None:
        """Finish what was ordered, for so many seconds, and end; what is left then is told that it failed."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(drain)
        self._abandon = True
        self._thread.join()
        self.pipeline.close()

    @property
    def _queued(self) -> int:
        return len(self._jobs) + sum(order.images for order in self._waiting)

    def _lora(self, entry: Any) -> Any:
        name, scale = entry if isinstance(entry, tuple) else (entry, 1.0)
        if name not in self.loras:
            known = ", ".join(self.loras) or "none: start the server with --lora NAME=FILE"
            raise UserError(f"unknown lora {name!r}", f"one of: {known}")
        return self.loras[name], scale

    def _count(self) -> None:
        with self._changed:
            self.observer.queue(self.name, self._queued)

    # In the thread

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._waiting or self._closing)
                if self._abandon or not (self._jobs or self._waiting):
                    left = dict.fromkeys([*(job.order for job in self._jobs), *self._waiting])
                    self._jobs, self._waiting = [], []
                    break
                self._forget_cancelled()
                alone = self._admit()
            if alone is not None:
                self._run_alone(alone)
            elif self._jobs:
                self._step()
            self._count()
        for order in left:
            order.tell(Event("failed", error=Busy("the server was shut down")))
        self._count()

    def _forget_cancelled(self) -> None:
        gone = {job.order for job in self._jobs if job.order.cancelled}
        gone |= {order for order in self._waiting if order.cancelled}
        for order in gone:
            self.observer.ended(self.name, "cancelled", order.images)
            order.tell(Event("failed", error=Cancelled()))
        self._jobs = [job for job in self._jobs if job.order not in gone]
        self._waiting = [order for order in self._waiting if order not in gone]

    def _admit(self) -> Order | None:
        """Let orders in up to the first that runs alone; returns that one once nothing else is in the making."""
        while self._waiting:
            order = self._waiting[0]
            if order.alone:
                return None if self._jobs else order
            self._waiting.pop(0)
            self._jobs += jobs_of(self.pipeline, order)
        return None

    def _step(self) -> None:
        """One call of the UNet, and what follows from it."""
        candidates = [job.candidate(self.row_timesteps) for job in self._jobs]
        chosen = [one.id for one in batch.next_call(candidates, self.shapes.most, self.policy, time.monotonic())]
        ready = []
        for job in chosen:
            if job.state is None:
                job = self._attempt(job, job.prepared)
            if job is not None:
                ready.append(job)
        began = time.perf_counter()
        for job, prediction in self._predicted(ready):
            further = self._attempt(job, lambda job=job, p=prediction: self._further(job, p))
            if further is not None and further.over:
                self._attempt(further, lambda job=further: self._finish(job))
        self.observer.step(self.name, sum(job.request.plan.rows for job in ready), time.perf_counter() - began)

    def _predicted(self, ready: Sequence[Job]) -> list[tuple[Job, Any]]:
        """The predictions of one call. Where it fails, each image is tried alone, and only those fail that do."""
        if not ready:
            return []
        unet = self.pipeline.engines["unet"]
        try:
            rows = self.shapes.padded(sum(job.request.plan.rows for job in ready))
            return list(zip(ready, predict(unet, [job.part for job in ready], rows=rows), strict=True))
        except Exception as error:
            if len(ready) == 1:
                self._fail(ready[0].order, error)
                return []
            return [found for job in ready for found in self._predicted([job])]

    def _further(self, job: Job, prediction: Any) -> Job:
        x, i, plan, order = job.state.x, job.state.row, job.request.plan, job.order
        job = job.advanced(prediction)
        order.latest = (plan, i, x, prediction)
        order.done += 1
        if job.made in order.previews and not job.over:
            image = self.pipeline.previewer()(shown(plan, i, x, prediction), job.request.pixels)[0]
            order.tell(Event("preview", job.index, image))
        return job

    def _attempt(self, job: Job, work: Callable[[], Job | None]) -> Job | None:
        """Put what becomes of a job in its place; an error fails its order alone."""
        try:
            made = work()
        except Exception as error:
            self._fail(job.order, error)
            return None
        with self._changed:
            # The order may have failed meanwhile, by another of its images.
            same = [i for i, one in enumerate(self._jobs) if one.order is job.order and one.index == job.index]
            if not same:
                return None
            self._jobs[same[0] : same[0] + 1] = [] if made is None else [made]
        return made

    def _finish(self, job: Job) -> None:
        latents, run = job.latents, job.run
        pixels = run.decode(latents) if np.isfinite(latents).all() else latents
        if not all_finite(pixels):
            raise not_finite(self.pipeline.bundle.manifest, self.pipeline.engines.descriptions)
        checker = self.pipeline.safety_checker
        pixels = pixels if checker is None else to_host(pixels)
        if checker is not None and run.checked(pixels, checker)[0]:
            pixels[:] = BLACK
        (image,) = of_type("pil", pixels, latents)
        order = job.order
        order.tell(Event("image", job.index, image, job.chunk.seeds[0]))
        self.observer.image(self.name, time.monotonic() - order.arrived)
        if not any(one.order is order and one.index != job.index for one in self._jobs):
            order.tell(Event("done"))

    def _fail(self, order: Order, error: BaseException) -> None:
        with self._changed:
            self._jobs = [job for job in self._jobs if job.order is not order]
        self.observer.ended(self.name, "failed", order.images)
        order.tell(Event("failed", error=error))

    def _run_alone(self, order: Order) -> None:
        """A whole order by the pipeline itself: what no call can be shared for."""
        plan, pipeline = order.requests[0].plan, self.pipeline

        def preview(i: int, images: list[Any]) -> None:
            if i + 1 - plan.start in order.previews:
                order.tell(Event("preview", 0, images[0]))

        def after(*_: Any) -> bool:
            order.done += 1
            return not (order.cancelled or self._abandon)

        call = {**order.call, "callback": after, "preview_callback": preview if order.previews else None}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Notice)
                if order.loras:
                    pipeline.set_loras(order.loras)
                try:
                    made = pipeline(**call)
                finally:
                    if order.loras:
                        pipeline.set_loras(())
            for i, image in enumerate(made.images):
                order.tell(Event("image", i, image, made.seeds[i]))
                self.observer.image(self.name, time.monotonic() - order.arrived)
            order.tell(Event("done"))
        except Stopped:
            self.observer.ended(self.name, "cancelled", order.images)
            order.tell(Event("failed", error=Cancelled()))
        except Exception as error:
            self.observer.ended(self.name, "failed", order.images)
            order.tell(Event("failed", error=error))
        finally:
            with self._changed:
                self._waiting = [one for one in self._waiting if one is not order]


def _spread(partial: int, steps: int) -> frozenset[int]:
    """The steps after which so many previews are shown, none after the last."""
    partial = max(0, min(partial, steps - 1))
    return frozenset(round((i + 1) * steps / (partial + 1)) for i in range(partial))
