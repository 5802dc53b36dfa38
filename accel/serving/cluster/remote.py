"""A model whose replicas are elsewhere in the cluster: orders go to one of them, and to another where that is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..job import Event, Order
from ..limits import Busy, Cancelled
from ..models import Settings

_LOG = logging.getLogger("accel.serving")
RETRIES = 5
_PAUSE = 0.2  # seconds, doubled at each retry: a replica that was lost is known to all before long


@dataclass(eq=False)
class RemoteOrder(Order):
    """An order that a replica makes.

    Attributes:
        id: by which the replicas know it.
        following: the task that hears of it.
    """

    id: str = ""
    following: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        super().cancel()
        if self.following is not None and not self.following.done():
            self.following.get_loop().call_soon_threadsafe(self.following.cancel)


@dataclass
class Remote:
    """A `Maker` over Ray Serve.

    An image is decided by its call, which has its seed: made a second time, by another replica, it is the same image.
    So an order whose replica is lost is sent to another, and what was told of it already is not told twice.

    Args:
        settings: of the model.
        digest: of the model.
        handle: Ray Serve's, of the model's deployment.
        lost: exceptions that say that a replica is lost, and nothing about the order.
        full: exceptions that say that no replica has room.
        states: -> how many replicas are in which state.
    """

    settings: Settings
    digest: str
    handle: Any
    lost: tuple[type[BaseException], ...]
    full: tuple[type[BaseException], ...]
    states: Callable[[], Mapping[str, int]]
    _orders: dict[str, RemoteOrder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name, self.limits, self.loras = self.settings.name, self.settings.limits, self.settings.loras

    @property
    def orders(self) -> list[Order]:
        return sorted(self._orders.values(), key=lambda order: order.arrived)

    async def take(
        self, call: Mapping[str, Any], tell: Callable[[Event], None], *, partial: int = 0, loras: Sequence[Any] = ()
    ) -> Order:
        id = uuid.uuid4().hex
        messages = self._messages(id, call, partial, tuple(loras))
        first = await anext(messages)
        if isinstance(first, Event):
            raise first.error or RuntimeError("failed")
        order = RemoteOrder(call, list(first), tell, id=id, loras=tuple(loras))
        self._orders[id] = order
        order.following = asyncio.create_task(self._follow(order, messages))
        return order

    async def _follow(self, order: RemoteOrder, messages: AsyncIterator[Any]) -> None:
        try:
            async for event in messages:
                order.tell(event)
                if event.kind == "failed":
                    return
            order.tell(Event("done"))
        except asyncio.CancelledError:
            order.tell(Event("failed", error=Cancelled()))
        except Exception as error:
            order.tell(Event("failed", error=error))
        finally:
            self._orders.pop(order.id, None)
            await messages.aclose()  # type: ignore[attr-defined]

    async def _messages(self, *asked: Any) -> AsyncIterator[Any]:
        """What replicas say of an order, each thing once."""
        told: Counter[Any] = Counter()
        for attempt in range(RETRIES + 1):
            said: Counter[Any] = Counter()
            stream = None
            try:
                stream = self.handle.options(stream=True).make.remote(*asked)
                async for message in stream:
                    what = (message.kind, message.index) if isinstance(message, Event) else "requests"
                    said[what] += 1
                    if said[what] > told[what]:
                        told[what] += 1
                        yield message
                return
            except self.full as error:
                raise Busy("the queue is full: every replica has as much as it takes") from error
            except self.lost as error:
                if attempt == RETRIES:
                    raise
                _LOG.warning("a replica of %s is lost, the order goes to another: %r", self.name, error)
                await asyncio.sleep(_PAUSE * 2**attempt)
            finally:
                if stream is not None:
                    with contextlib.suppress(Exception):
                        stream.cancel()

    async def progress(self, order: Order, image: bool) -> tuple[int, Any]:
        assert isinstance(order, RemoteOrder)
        found = await self._all("progress", order.id, image)
        return next((one for one in found if one is not None), (0, None))

    async def health(self) -> tuple[bool, dict[str, Any]]:
        states = dict(await asyncio.to_thread(self.states))
        return states.get("RUNNING", 0) > 0, states

    async def families(self) -> list[Any]:
        """The families of all replicas, whose samples say which one's they are."""
        found = []
        for replica, families in await self._all("families"):
            for family in families:
                family.samples = [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
                found.append(family)
        return found

    async def _all(self, method: str, *args: Any) -> list[Any]:
        """What the replicas answer; those that do not are left out."""
        try:
            answers = await self.handle.broadcast(method, *args).results_async(timeout_s=5, return_exceptions=True)
        except TimeoutError:
            return []
        return [one for one in answers if not isinstance(one, BaseException)]

    def close(self, drain: float = 30.0) -> None:
        """Nothing: Ray ends replicas when they are no longer wanted."""
