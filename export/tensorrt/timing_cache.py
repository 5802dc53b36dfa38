"""TensorRT's timing cache: one file per GPU and TensorRT version, which every build reads and extends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from accel.files import cache_dir, waiting_for, write_bytes
from accel.trt.engine_files import Here


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
        write_bytes(path, bytes(cache.serialize()))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
