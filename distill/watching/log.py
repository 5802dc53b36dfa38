"""The log of a run: a line of figures per step, and the trackers, which get sample grids and the throughput too."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from accel.files import write_bytes

from ..settings import Recipe


class Log:
    """A JSON line per step in `losses.jsonl`, and the trackers. On resume, lines after the checkpoint are dropped."""

    def __init__(self, run: Path, first: int, accelerator: Any, recipe: Recipe):
        self.accelerator, self.path = accelerator, run / "losses.jsonl"
        self.batch = recipe.batch * recipe.accumulation * accelerator.num_processes
        before = 0.0  # seconds of the runs that this one goes on from
        if accelerator.is_main_process:
            lines = self.path.read_text(errors="replace").splitlines() if first and self.path.is_file() else []
            kept = [line for line in lines if _step_of(line) <= first]
            write_bytes(self.path, "".join(line + "\n" for line in kept).encode())
            before = json.loads(kept[-1]).get("seconds", 0.0) if kept else 0.0
        self.began = time.perf_counter() - before
        self.last = first, time.perf_counter()  # what the trackers were told: a step, and when
        if accelerator.log_with:
            plain = {name: value for name, value in vars(recipe).items() if isinstance(value, (int, float, str, bool))}
            accelerator.init_trackers("accel", config=plain)

    def __enter__(self) -> Log:
        self.file = self.path.open("a") if self.accelerator.is_main_process else None
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file:
            self.file.close()
        for tracker in self.accelerator.trackers if self.accelerator.log_with else ():
            tracker.finish()

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if self.file:
            seconds = round(time.perf_counter() - self.began, 3)
            # JSON has no infinity, which is the gradient's norm where float16 overflows.
            plain = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            self.file.write(json.dumps({"step": step, **plain, "seconds": seconds}) + "\n")
            self.file.flush()
        if self.accelerator.log_with:
            (before, then), now = self.last, time.perf_counter()
            self.last = step, now
            speed = {"images": step * self.batch, "images_per_second": (step - before) * self.batch / (now - then)}
            self.accelerator.log({**figures, **speed}, step=step)

    def show(self, step: int, image: Any) -> None:
        """A sample grid, a PIL image, for the trackers."""
        for tracker in self.accelerator.trackers if self.accelerator.log_with else ():
            # TensorBoard takes arrays, and is told which axis is which.
            more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(image.convert("RGB"))[None]}, step=step, **more)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a kill cut in half
