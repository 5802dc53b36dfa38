"""Hostile images: refused in a sentence, before pixels are made of them."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from accel import images
from accel.distill.evaluation.metrics import read_image
from accel.distill.sources.item import BrokenItem, upright_rgb
from accel.errors import UserError


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def honest(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)).save(file, kind)
    return file.getvalue()


BOMB = chunk(b"zTXt", b"x\0\0" + zlib.compress(b"\0" * (200 << 20), 9))
HOSTILE = {
    "empty": b"",
    "text": b"not an image",
    "cut": honest()[:200],
    "cut jpeg": honest("JPEG")[:300],
    "no pixels": png(48, 48),
    "no size": png(0, 0, chunk(b"IDAT", zlib.compress(b""))),
    "gigapixels": png(60_000, 60_000, chunk(b"IDAT", zlib.compress(b"\0" * 1000))),
    "the widest": png(2**31 - 1, 1, chunk(b"IDAT", zlib.compress(b"\0" * 1000))),
    "half a gigapixel": png(20_000, 20_000, chunk(b"IDAT", zlib.compress(b"\0" * 1000))),
    "a text bomb": png(1, 1, BOMB, chunk(b"IDAT", zlib.compress(b"\0\0\0\0"))),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/tmp/x) (w) file\n%%EOF\n",
    "pdf": b"%PDF-1.4\n",
    "a broken chunk": honest()[:40] + b"\xff" * 60 + honest()[100:],
    "a gif without frames": b"GIF89a\x10\x00\x10\x00\x00\x00\x00;",
    "a tiff that points at itself": b"II*\0\x08\0\0\0\xff\xff" + b"\x08\0\0\0" * 100,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_is_a_sentence_at_once(tmp_path, name):
    path = tmp_path / "image.png"
    path.write_bytes(HOSTILE[name])
    started = time.monotonic()
    for read in (lambda: images.batch(str(path), 1, (64, 64)), lambda: images.canny(path), lambda: read_image(path)):
        with pytest.raises(UserError, match="is not an image|pixels"):
            read()
    with pytest.raises(BrokenItem):
        upright_rgb(path, "image.png")
    assert time.monotonic() - started < 5


def test_a_pipe_or_a_device_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "device.png"):
        with pytest.raises(UserError, match="not an ordinary file"):
            images.batch(tmp_path / name, 1, (64, 64))
        with pytest.raises(BrokenItem, match="not an ordinary file"):
            upright_rgb(tmp_path / name, name)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_an_honest_image_is_read_as_pillow_reads_it(tmp_path, kind):
    path = tmp_path / "image"
    path.write_bytes(honest(kind))
    wanted = np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    assert np.array_equal(images.batch(path, 1, (48, 48))[0], wanted)
