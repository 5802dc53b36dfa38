"""Images as bytes, in and out, and those that clients fetch by an address."""

from __future__ import annotations

import base64
import binascii
import io
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..images import decoded

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encoded(image: Any, kind: str = "png", quality: int | None = None, text: str = "") -> bytes:
    """A PIL image as a file.

    Args:
        kind: a key of `FORMATS`.
        quality: 0 to 100, of JPEG and WebP.
        text: kept in a PNG as `parameters`, as A1111 does.
    """
    options: dict[str, Any] = {} if kind == "png" or quality is None else {"quality": quality}
    if kind == "png" and text:
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("parameters", text)
    file = io.BytesIO()
    image.save(file, kind.upper(), **options)
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def from_base64(text: str, name: str) -> Any:
    """A PIL image of base64, with or without `data:image/png;base64,` before it.

    Raises:
        UserError: for anything else.
    """
    try:
        data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{name} is not base64", "encode the bytes of a PNG or JPEG file") from None
    return decoded(data, name)


def painted(mask: Any) -> Any:
    """A mask that is white where to paint, of OpenAI's, which is transparent there; without alpha it stays."""
    if "A" not in mask.getbands():
        return mask
    from PIL import ImageOps

    return ImageOps.invert(mask.getchannel("A"))


@dataclass
class Shelf:
    """Images that wait to be fetched, each under a name that nobody guesses.

    Attributes:
        room: how many are kept; the oldest go first.
        seconds: how long one is kept.
    """

    room: int = 256
    seconds: float = 3600.0
    _kept: OrderedDict[str, tuple[float, str, bytes]] = field(default_factory=OrderedDict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def put(self, data: bytes, kind: str) -> str:
        """Keep an image; returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        with self._turn:
            self._kept[name] = (time.monotonic(), FORMATS[kind], data)
            while len(self._kept) > self.room:
                self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> tuple[str, bytes] | None:
        """Media type and bytes; None where it was never there, or no longer is."""
        with self._turn:
            kept = self._kept.get(name)
            if kept is None or time.monotonic() - kept[0] > self.seconds:
                self._kept.pop(name, None)
                return None
            return kept[1:]
