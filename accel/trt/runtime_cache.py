"""TensorRT-RTX's runtime cache: the kernels that were compiled for one engine file on one card, shared by processes.

A file is a digest and TensorRT's bytes, written as a whole; one that is damaged, or that others can
write, counts as empty.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from ..files import cache_dir, waiting_for, write_bytes
from ..machine import Gpu
from . import trust

_DIGEST = hashlib.sha256().digest_size


def path_for(key: str, version: str, gpu: Gpu) -> Path:
    """The file for an engine file's key, a version of TensorRT-RTX, and a card with its driver."""
    card = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu.name} {gpu.compute_capability} {gpu.driver or ''}").strip("-")
    return cache_dir() / "tensorrt-rtx" / version / card / f"{key}.runtime"


def load(cache: Any, path: Path) -> None:
    """Let a runtime cache start from the file; a file that is damaged, or that TensorRT rejects, changes nothing."""
    if data := _read(path):
        cache.deserialize(data)


def save(cache: Any, path: Path) -> None:
    """Write a runtime cache where it holds more than the file; the last process that learned something wins."""
    data = bytes(cache.serialize())
    if len(data) <= len(_read(path)):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    with waiting_for(path):
        if len(data) > len(_read(path)):
            write_bytes(path, hashlib.sha256(data).digest() + data)


def _read(path: Path) -> bytes:
    try:
        if not trust.private(path):  # it holds code, and somebody else may have written it
            return b""
        content = path.read_bytes()
    except OSError:
        return b""
    digest, data = content[:_DIGEST], content[_DIGEST:]
    return data if hashlib.sha256(data).digest() == digest else b""
