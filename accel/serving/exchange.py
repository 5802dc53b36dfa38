"""Between the coroutines of the server and the threads of its workers: an order, and the events that come of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .job import Event, Order
from .limits import Cancelled
from .models import Maker


@dataclass
class Exchange:
    """One order that a coroutine waits for.

    Attributes:
        order: as the worker has it.
        until: when it is given up, of `time.monotonic`.
    """

    order: Order
    until: float
    _events: asyncio.Queue[Event]

    @classmethod
    async def open(
        cls, worker: Maker, call: Mapping[str, Any], *, partial: int = 0, loras: Sequence[Any] = ()
    ) -> Exchange:
        """Check and submit an order.

        Raises:
            UserError, Busy: as `Maker.take`.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        order = await worker.take(call, tell, partial=partial, loras=loras)
        return cls(order, time.monotonic() + worker.limits.seconds, events)

    async def events(self) -> AsyncIterator[Event]:
        """Previews and images as they come. Whoever stops listening, however that happens, cancels the order.

        Raises:
            TimeoutError: when it takes longer than the limits allow.
            BaseException: what the order failed with.
        """
        try:
            while True:
                event = await asyncio.wait_for(self._events.get(), self.until - time.monotonic())
                if event.kind == "failed":
                    raise event.error or RuntimeError("failed")
                if event.kind == "done":
                    return
                yield event
        finally:
            self.order.cancel()

    async def images(self, request: Any) -> list[Event]:
        """All images in order, for a client that is still there.

        Args:
            request: starlette's, whose body has been read.

        Raises:
            Cancelled: when the client has gone away.
            BaseException: as `events`.
        """
        found: list[Event] = []

        async def collect() -> None:
            async for event in self.events():
                if event.kind == "image":
                    found.append(event)

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(collect()), asyncio.create_task(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise Cancelled
            tasks[0].result()
        except Cancelled as error:
            error.images = sorted(found, key=lambda event: event.index)  # type: ignore[attr-defined]
            raise
        finally:
            self.order.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return sorted(found, key=lambda event: event.index)
