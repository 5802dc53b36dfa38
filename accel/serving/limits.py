"""What a client may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError


class Busy(Exception):
    """The queue is full, or the server is shutting down: try again later."""


class Cancelled(Exception):
    """Somebody asked that an order be dropped."""

    def __init__(self) -> None:
        super().__init__("the request was cancelled")


class UnknownModel(Exception):
    """A client names a model that is not loaded."""


@dataclass(frozen=True)
class Limits:
    """The most of everything.

    Attributes:
        images: of one request.
        steps: of one image.
        side: pixels of a side.
        queue: images that wait or are in the making.
        body: bytes of a request.
        seconds: that a request may take.
    """

    images: int = 10
    steps: int = 150
    side: int = 2048
    queue: int = 64
    body: int = 20 << 20
    seconds: float = 600.0

    def check(self, call: Mapping[str, Any]) -> None:
        """Refuse a call of a pipeline that asks for too much.

        Raises:
            UserError: with the value and the limit.
        """
        wanted = {"n": call.get("num_images_per_prompt"), "steps": call.get("steps")}
        wanted |= {side: call.get(side) for side in ("width", "height")}
        most = {"n": self.images, "steps": self.steps, "width": self.side, "height": self.side}
        for name, value in wanted.items():
            if value is not None and not 1 <= value <= most[name]:
                what = {"n": "number of images", "steps": "number of steps"}.get(name, name)
                text = f"invalid {what}: {value} (this server takes 1 to {most[name]})"
                raise UserError(text, "ask for that, or start the server with a higher limit (accel serve --help)")
