"""Measurements of gpu_survey.py that run whole programs of the project, and its engines."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_measures import Measures

HERE = Path(__file__).resolve().parent


class Programs(Measures):
    """What takes minutes: an export, a bench, the tests for a GPU."""

    def engine(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """The UNet of the digits model, exported in fp16 at the first call, on an engine of the project."""
        import torch

        import accel

        folder = Path(tempfile.gettempdir()) / "accel-survey-digits-fp16"
        if not (folder / "accel.json").is_file():
            command = [sys.executable, "-m", "accel", "export", "digits/4step", str(folder), "--precision", "fp16"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=200)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
        with accel.load_engine(folder, "unet", name, **options) as unet:
            torch.manual_seed(0)
            feeds = {}
            for spec in unet.component.inputs:
                sizes = {dim: limits.min for dim, limits in unet.component.dims.items()}
                value = torch.randn(spec.concrete(sizes)) if spec.shape else torch.tensor(500)
                feeds[spec.name] = unet.array(value.to(getattr(torch, spec.dtype)))
            began = time.perf_counter()
            unet(**feeds)
            first = time.perf_counter() - began
            return {"ms": 1e3 * self.time(lambda: unet(**feeds)), "first_s": first, "ran": unet.description}

    def bench(self, variants: str) -> dict[str, Any]:
        command = ["-m", "accel", "bench", "digits/4step", "--engine", variants, "--seconds", "30", "--json"]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=230)
        rows = json.loads(done.stdout)["rows"]
        return {row["variant"]: (row["scopes"]["image"]["timing"] or {}).get("p50_s") for row in rows}

    def tests(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--timeout", "120", "-p", "no:cacheprovider"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=290, cwd=HERE.parent)
        return {"code": done.returncode, "said": done.stdout.strip().splitlines()[-12:]}
