"""TensorRT's timing cache: one file per GPU and TensorRT version, which every build reads and extends.

The file is a digest and TensorRT's bytes, because TensorRT does not notice every damaged cache.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from accel.files import cache_dir, waiting_for, write_bytes
from accel.trt.engine_files import Here

_DIGEST = hashlib.sha256().digest_size


def path_for(here: Here) -> Path:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{here.gpu} {here.compute_capability} trt {here.tensorrt}")
    return cache_dir() / "tensorrt" / f"{name}.timing"


def load(config: Any, path: Path) -> None:
    """Let a build start from the timings of earlier ones; a file that TensorRT rejects counts as empty."""
    cache = config.create_timing_cache(_bytes(path)) or config.create_timing_cache(b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def save(config: Any, path: Path) -> None:
    """Merge the timings of a build into the file, under a lock: builds that end together lose none."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with waiting_for(path):
        others = config.create_timing_cache(_bytes(path))
        if others is not None:
            cache.combine(others, ignore_mismatch=False)
        data = bytes(cache.serialize())
        write_bytes(path, hashlib.sha256(data).digest() + data)


def _bytes(path: Path) -> bytes:
    """What the file holds; nothing where it is missing or damaged."""
    try:
        digest, data = (content := path.read_bytes())[:_DIGEST], content[_DIGEST:]
    except OSError:
        return b""
    return data if hashlib.sha256(data).digest() == digest else b""
