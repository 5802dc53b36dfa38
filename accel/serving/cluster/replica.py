"""One replica of a model: a worker in a process of the cluster."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ...errors import UserError
from ..exchange import Exchange
from ..job import Event, Order
from ..limits import Busy
from ..metrics import Metrics
from ..models import Settings, open_worker

_LOG = logging.getLogger("accel.serving")
_DRAIN = 30.0


def portable(error: BaseException) -> BaseException:
    """An error as another process can read it: its text, without what only this process knows."""
    if isinstance(error, UserError):
        return UserError(error.message, error.fix)
    if isinstance(error, Busy | TimeoutError):
        return type(error)(str(error))
    _LOG.error("a request failed", exc_info=error)
    return RuntimeError(f"{type(error).__name__}: {error}")


class Replica:
    """A worker that is asked from elsewhere.

    Args:
        settings: of its model.
        digest: of the model that is meant; another one at the same place is refused.
    """

    def __init__(self, settings: Settings, digest: str):
        if settings.digest != digest:
            raise RuntimeError(f"{settings.model} is not on this node what it is where the server was started")
        self._metrics = Metrics()
        self._worker = open_worker(settings, self._metrics)
        self._orders: dict[str, Order] = {}

    async def make(
        self, id: str, call: Mapping[str, Any], partial: int, loras: Sequence[Any]
    ) -> AsyncIterator[Sequence[Any] | Event]:
        """Make an order: first its requests, as they were understood, then its events, of which an error is the last.

        Args:
            id: by which `progress` knows it.
            call, partial, loras: as `Maker.take` has them.
        """
        try:
            exchange = await Exchange.open(self._worker, call, partial=partial, loras=loras)
            self._orders[id] = exchange.order
            yield exchange.order.requests
            async for event in exchange.events():
                yield event
        except Exception as error:
            yield Event("failed", error=portable(error))
        finally:
            self._orders.pop(id, None)

    async def progress(self, id: str, image: bool) -> tuple[int, Any] | None:
        """Steps and image of an order; None where it is another replica's."""
        order = self._orders.get(id)
        return None if order is None else await self._worker.progress(order, image)

    async def families(self) -> tuple[str, list[Any]]:
        """Its id, and what it counts."""
        from ray import serve

        return serve.get_replica_context().replica_id.unique_id, list(self._metrics.registry.collect())

    async def check_health(self) -> None:
        """Ray Serve asks this now and then, and replaces a replica that fails."""
        if not (await self._worker.health())[0]:
            raise RuntimeError("the thread that makes images has ended")

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self._worker.close(_DRAIN)
