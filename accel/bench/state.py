"""Everything one benchmark run knows, filled in as it goes."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..pipeline import Pipeline
from ..trt import trust
from .clocks import Clocks
from .probe import Process
from .quality import Sample
from .variants import Variant
from .work import BenchSettings, Recording


@dataclass
class State:
    """What is known so far; an interrupt leaves it as it is, and the document is made of that."""

    bundle: Bundle
    variants: list[Variant]
    settings: BenchSettings
    started: float = field(default_factory=time.time)
    environment: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    partly: dict[str, str] = field(default_factory=dict)  # variant -> the scope that failed, and why
    processes: dict[str, Process] = field(default_factory=dict)
    pipelines: dict[str, Pipeline] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)  # kind of device that a variant's UNet runs on
    reference: Sample | None = None
    again: Sample | None = None
    samples_of: dict[str, Sample] = field(default_factory=dict)
    floors: dict[str, Sample | str] = field(default_factory=dict)
    recordings: dict[str, Recording] = field(default_factory=dict)
    flops: dict[str, dict[str, int]] = field(default_factory=dict)
    calls: dict[str, dict[str, Callable]] = field(default_factory=dict)
    first_calls: dict[str, dict[str, float]] = field(default_factory=dict)
    warm: dict[str, list[float]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    busy_seconds: dict[str, dict[str, float]] = field(default_factory=dict)  # of variants on a GPU
    clocks: Clocks = field(default_factory=Clocks)
    rounds_done: int = 0
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def live(self) -> list[Variant]:
        return [variant for variant in self.variants if variant.name not in self.reasons]


@contextlib.contextmanager
def temporary_caches() -> Iterator[dict[str, str]]:
    """Empty caches of accel and torch.compile for a block, deleted after it: a measurement must neither find what the
    user compiled earlier nor leave anything behind. The key that signs engine files goes along, or none would run.

    Yields:
        The environment variables that name the caches, for child processes.
    """
    with tempfile.TemporaryDirectory(prefix="accel-caches-") as folder:
        caches = {"ACCEL_CACHE": f"{folder}/accel", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        if (key := trust.key_file()).is_file():
            Path(caches["ACCEL_CACHE"]).mkdir(mode=0o700)
            shutil.copy2(key, caches["ACCEL_CACHE"])
        before = {name: os.environ.get(name) for name in caches}
        os.environ.update(caches)
        try:
            yield caches
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
