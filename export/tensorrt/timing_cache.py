"""TensorRT's timing cache: one file per GPU and TensorRT version, which every build adds to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from accel.files import cache_dir, waiting_for, write_bytes
from accel.trt.engine_files import Here


def path_for(here: Here) -> Path:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{here.gpu} {here.compute_capability} trt {here.tensorrt}")
    return cache_dir() / "tensorrt" / f"{name}.timing"


def give(config: Any, path: Path) -> None:
    """Let a build start from what earlier ones have measured; a file that TensorRT does not want counts as empty."""
    cache = config.create_timing_cache(_bytes(path)) or config.create_timing_cache(b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def keep(config: Any, path: Path) -> None:
    """Merge what a build has measured into the file; two builds that end together lose nothing."""
    found = config.get_timing_cache()
    if found is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with waiting_for(path):
        others = config.create_timing_cache(_bytes(path))
        if others is not None:
            found.combine(others, ignore_mismatch=False)
        write_bytes(path, bytes(found.serialize()))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
