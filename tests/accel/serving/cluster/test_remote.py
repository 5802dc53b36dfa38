"""Orders whose replicas are lost, refuse, or are cancelled; the replicas are scripts here, and Ray is not needed."""

import asyncio

import pytest

from accel.errors import UserError
from accel.serving.cluster import remote
from accel.serving.cluster.remote import RETRIES, Remote
from accel.serving.cluster.replica import portable
from accel.serving.job import Event
from accel.serving.limits import Busy, Cancelled
from accel.serving.models import Settings

IMAGES = [Event("preview", 0, "p0"), Event("image", 0, "i0"), Event("preview", 1, "p1"), Event("image", 1, "i1")]


class Lost(Exception):
    pass


class Full(Exception):
    pass


class Handle:
    """Replicas by their scripts: an order takes the next of them."""

    def __init__(self, *scripts):
        self.scripts, self.asked, self.cancelled = list(scripts), [], 0
        self.make = self

    def options(self, stream):
        return self

    def remote(self, *asked):
        self.asked.append(asked)
        return Stream(self, self.scripts.pop(0))


class Stream:
    def __init__(self, handle, script):
        self.handle, self.script = handle, list(script)

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        if not self.script:
            raise StopAsyncIteration
        message = self.script.pop(0)
        if message is Ellipsis:
            await asyncio.sleep(60)
        if isinstance(message, BaseException):
            raise message
        return message

    def cancel(self):
        self.handle.cancelled += 1


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE", 0)


def told(*scripts, then=lambda order: None):
    """What an order hears, and the handle."""
    handle, heard = Handle(*scripts), []

    async def take():
        one = Remote(Settings(name="m", model="m"), "digest", handle, (Lost,), (Full,), dict)
        order = await one.take({"seed": 1}, heard.append, partial=1)
        await asyncio.sleep(0)
        then(order)
        await asyncio.gather(order.following)
        assert not one.orders

    asyncio.run(take())
    return heard, handle


def test_an_order_hears_what_its_replica_says():
    heard, handle = told([["request", "request"], *IMAGES])
    assert heard[:-1] == IMAGES and heard[-1].kind == "done" and len(handle.asked) == 1


@pytest.mark.parametrize("after", range(5))
def test_an_order_whose_replica_is_lost_goes_to_another_and_hears_nothing_twice(after):
    """Lost before it was taken, and after each of its messages."""
    whole = [["request", "request"], *IMAGES]
    heard, handle = told([*whole[:after], Lost()], [Lost()], whole)
    assert heard[:-1] == IMAGES and heard[-1].kind == "done"
    assert len(handle.asked) == 3 and handle.asked[0] == handle.asked[2]


def test_an_order_is_given_up_when_every_replica_is_lost():
    heard, handle = told([["request"], Lost()], *[[Lost()]] * RETRIES)
    assert [event.kind for event in heard] == ["failed"] and isinstance(heard[0].error, Lost)
    assert len(handle.asked) == RETRIES + 1


def test_what_the_replica_refuses_is_raised_at_once():
    with pytest.raises(UserError, match="too large"):
        told([Event("failed", error=UserError("too large", "smaller"))])
    with pytest.raises(Busy, match="every replica"):
        told([Full()])


def test_what_fails_later_is_told():
    heard, _ = told([["request"], Event("failed", error=RuntimeError("x"))])
    assert [event.kind for event in heard] == ["failed"]


def test_a_cancelled_order_ends_at_its_replica_too():
    heard, handle = told([["request"], ...], then=lambda order: order.cancel())
    assert isinstance(heard[0].error, Cancelled) and len(heard) == 1 and handle.cancelled == 1


def test_errors_are_read_in_another_process():
    import pickle

    from accel.errors import MissingPackage

    for error in (UserError("a", "b"), MissingPackage("ray", "x", "ray"), Busy("full"), TimeoutError(), ValueError(3)):
        there = pickle.loads(pickle.dumps(portable(error)))
        assert str(error) in str(there) and getattr(there, "fix", "") == getattr(error, "fix", "")
