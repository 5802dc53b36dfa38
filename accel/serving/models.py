"""The models of a server: what the APIs ask of one, how one is loaded, and by which name it is found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .job import Event, Order
from .limits import Limits, UnknownModel
from .metrics import Observer


class Maker(Protocol):
    """Makes the images of one model: `worker.Worker` in this process, `cluster.remote.Remote` in others.

    Attributes:
        name: what clients call it.
        limits: what a client may ask for.
        loras: LoRA files that clients may ask for, by name.
        digest: what the model is, as a hexadecimal number.
    """

    name: str
    limits: Limits
    loras: Mapping[str, Any]
    digest: str

    @property
    def orders(self) -> list[Order]:
        """The orders that wait or are in the making, oldest first."""

    async def take(
        self, call: Mapping[str, Any], tell: Callable[[Event], None], *, partial: int = 0, loras: Sequence[Any] = ()
    ) -> Order:
        """Check an order and put it in the queue.

        Args:
            call: arguments of the pipeline's call, by our names: one prompt, `num_images_per_prompt`, and a seed.
            tell: as in `Order`; called from any thread.
            partial: how many previews are told of each image.
            loras: names of `loras`, or (name, scale).

        Raises:
            UserError: for what does not fit the model or the limits.
            Busy: when the queue is full, or the server is shutting down.
        """

    async def progress(self, order: Order, image: bool) -> tuple[int, Any]:
        """Steps of an order that are made, and what the last of them predicts (PIL; None where not wanted)."""

    async def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether it can make images; and more about that, where there is more."""

    async def families(self) -> list[Any]:
        """What it counts elsewhere than in this process's metrics: metric families of prometheus-client."""

    def close(self, drain: float = 30.0) -> None:
        """Finish what was ordered, for so many seconds, and end."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides how a model is served; plain data, which other machines can read.

    Attributes:
        name: what clients call it.
        model: a bundle or a pipeline.
        engine, options: as `accel.load` takes them.
        batch: rows of the largest UNet call; None for the model's own most, or 8.
        fixed: fill every call up to that.
        policy: a key of `batch.POLICIES`.
        share: whether images share calls.
        limits: what a client may ask for.
        loras: LoRA files that clients may ask for, by name.
    """

    name: str
    model: str
    engine: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None
    fixed: bool = False
    policy: str = "fifo"
    share: bool = True
    limits: Limits = Limits()
    loras: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """What the model is that lies there now, as a hexadecimal number; nothing of it is loaded.

        Raises:
            UserError: where there is no model, its engine cannot run here, or it does not take the batch.
        """
        from ..loading.loader import opened

        bundle = opened(self.model, self.engine, safety_checker=self.options.get("safety_checker", True))
        self.shapes(bundle.component("unet"))
        return bundle.digest

    def shapes(self, unet: Any) -> Any:
        """The batches that a UNet (its record in the manifest) is called with: `batch.Shapes`.

        Raises:
            UserError: for a batch that it does not take.
        """
        from .batch import Shapes

        return Shapes.of(unet.dims[unet.inputs[0].shape[0]], self.batch, self.fixed, int8=bool(unet.int8))


def open_worker(settings: Settings, observer: Observer) -> Any:
    """A model, loaded, and the thread that makes its images: a `worker.Worker`.

    Raises:
        UserError: as `accel.load`; for a batch that the UNet does not take.
    """
    from ..bundle import Bundle
    from ..loading.loader import load, runnable
    from .row_unet import with_row_timesteps
    from .worker import Worker

    engine, options = settings.engine, dict(settings.options)
    ready = runnable(settings.model, engine, safety_checker=options.get("safety_checker", True))
    bundle = ready if isinstance(ready, Bundle) else Bundle.open(ready)
    bundle = with_row_timesteps(bundle, engine, options.get("device", "auto"))
    pipeline = load(bundle, engine, **options)
    try:
        return Worker(
            settings.name,
            pipeline,
            shapes=settings.shapes(pipeline.engines["unet"].component),
            policy=settings.policy,
            limits=settings.limits,
            loras=settings.loras,
            observer=observer,
            share=settings.share,
            digest=settings.digest,
        )
    except BaseException:
        pipeline.close()
        raise


class Models(Mapping[str, Maker]):
    """Models by name; the first is the one that is meant where none is named.

    Attributes:
        since: when they were loaded, seconds since 1970.
    """

    def __init__(self, makers: Sequence[Maker]):
        self._makers = {maker.name: maker for maker in makers}
        self.since = int(time.time())

    def __getitem__(self, name: str) -> Maker:
        return self._makers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def named(self, name: str | None) -> Maker:
        """A model by its name; None for the first.

        Raises:
            UnknownModel: naming those there are.
        """
        if name is None:
            return next(iter(self._makers.values()))
        if name not in self._makers:
            raise UnknownModel(f"unknown model {name!r}; this server has: {', '.join(self._makers)}")
        return self._makers[name]
