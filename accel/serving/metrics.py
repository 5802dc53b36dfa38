"""What the server counts, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class Observer:
    """Is told what a worker does; this one forgets it."""

    def queue(self, model: str, images: int) -> None:
        """So many images wait or are in the making."""

    def step(self, model: str, rows: int, seconds: float) -> None:
        """A call of the UNet with so many rows in use was made."""

    def image(self, model: str, seconds: float) -> None:
        """An image is done, so many seconds after it was ordered."""

    def ended(self, model: str, how: str, images: int) -> None:
        """So many images "failed" or were "cancelled"."""


class Metrics(Observer):
    """Counts with prometheus-client, in a registry of its own.

    Attributes:
        registry: for `prometheus_client.generate_latest`.
        requests: counter by endpoint and status code.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        own: dict[str, Any] = dict(registry=self.registry)
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
        self.requests = Counter("accel_requests", "Requests by endpoint and status", ["endpoint", "status"], **own)
        self._queue = Gauge("accel_queue_depth", "Images that wait or are being made", ["model"], **own)
        rows = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
        self._rows = Histogram("accel_batch_size", "Rows in use in a UNet call", ["model"], buckets=rows, **own)
        self._step = Histogram("accel_step_seconds", "Time of a UNet call", ["model"], buckets=seconds, **own)
        text = "Time from the order of an image to the image"
        self._image = Histogram("accel_image_seconds", text, ["model"], buckets=seconds, **own)
        self._images = Counter("accel_images", "Images by outcome", ["model", "outcome"], **own)

    def queue(self, model: str, images: int) -> None:
        self._queue.labels(model).set(images)

    def step(self, model: str, rows: int, seconds: float) -> None:
        self._rows.labels(model).observe(rows)
        self._step.labels(model).observe(seconds)

    def image(self, model: str, seconds: float) -> None:
        self._image.labels(model).observe(seconds)
        self._images.labels(model, "made").inc()

    def ended(self, model: str, how: str, images: int) -> None:
        self._images.labels(model, how).inc(images)

    def text(self, more: Iterable[Any] = ()) -> bytes:
        """All of it, as `/metrics` gives it.

        Args:
            more: metric families of prometheus-client, counted elsewhere; those of one name are one family.
        """
        from prometheus_client import generate_latest

        found = {family.name: family for family in self.registry.collect()}
        for family in more:
            if family.name in found:
                found[family.name].samples += family.samples
            else:
                found[family.name] = family
        return generate_latest(_Collected(found.values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Collected:
    """Families as prometheus-client's own registry gives them."""

    families: Iterable[Any]

    def collect(self) -> Iterable[Any]:
        return self.families
