"""Workers and servers on the digits models; a server listens at a real socket."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

MODEL, PROMPTS = "digits/4step-int8", [f"a handwritten {word}" for word in ("zero", "one", "two", "three", "seven")]


@dataclass
class Listener:
    """What an order tells, and a way to wait for its end."""

    images: dict[int, Any] = field(default_factory=dict)
    previews: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Any) -> None:
        if event.kind == "image":
            assert event.index not in self.images
            self.images[event.index] = event.image
        elif event.kind == "preview":
            self.previews.append(event.image)
        else:
            self.error = event.error
            self.ended.set()

    def wait(self) -> Listener:
        assert self.ended.wait(60)
        return self


def _worker(model: str = MODEL, engine: str = "onnxruntime", **options: Any) -> Any:
    from accel.bundle import Bundle
    from accel.loading.loader import load, runnable
    from accel.serving.row_unet import with_row_timesteps
    from accel.serving.worker import Worker

    ready = runnable(model, engine)
    bundle = with_row_timesteps(ready if isinstance(ready, Bundle) else Bundle.open(ready), engine)
    threads = {"threads": 1} if engine in ("onnxruntime", "openvino") else {}
    return Worker(model, load(bundle, engine, **threads), **options)


def _ask(worker: Any, prompt: str = PROMPTS[-1], *, loras: Any = (), partial: int = 0, **call: Any) -> Listener:
    """Order images; what the order tells comes to the listener."""
    listener = Listener()
    order = worker.order({"prompt": prompt, "seed": 0, **call}, listener, loras=loras, partial=partial)
    worker.submit(order)
    listener.order = order
    return listener


@contextlib.contextmanager
def _listening(workers: list[Any], metrics: Any, **options: Any) -> Iterator[str]:
    """A server at a free port of this machine: its address."""
    import uvicorn

    from accel.serving.app import create

    app = create(workers, metrics, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=10))
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        until = time.monotonic() + 20
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def make_worker():
    return _worker


@pytest.fixture(scope="session")
def ask():
    return _ask


@pytest.fixture(scope="session")
def listening():
    return _listening


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Any]:
    """What `accel.load` makes, to compare with."""
    import accel

    with accel.load(MODEL, "onnxruntime", threads=1) as loaded:
        yield loaded


@pytest.fixture
def worker() -> Iterator[Any]:
    made = _worker()
    yield made
    if not made.pipeline.closed:
        made.close(5)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """With two models: few steps in int8, and the pipeline that has a VAE encoder too, on eager torch."""
    from accel.serving.limits import Limits
    from accel.serving.metrics import Metrics

    metrics, limits = Metrics(), Limits(images=4, steps=60, queue=40, body=2 << 20)
    how = dict(limits=limits, observer=metrics)
    workers = [_worker(**how), _worker("digits/4step", "eager", **how)]
    with _listening(workers, metrics, limits=limits) as url:
        yield url


@pytest.fixture(scope="module")
def repainted() -> Any:
    """An image, a mask that is white on its left half, and what the pipeline makes of them."""
    from PIL import Image, ImageDraw

    import accel

    photo, mask = Image.new("RGB", (64, 64)), Image.new("L", (64, 64), 0)
    ImageDraw.Draw(photo).ellipse((14, 10, 50, 54), outline="white", width=7)
    mask.paste(255, (0, 0, 32, 64))
    with accel.load("digits/4step", "eager") as pipe:
        made = pipe("a handwritten two", image=photo, mask_image=mask, strength=1.0, seed=2).images[0]
    return photo, mask, made
