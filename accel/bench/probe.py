"""Memory, load time and first image of one variant in a process of its own, where no other engine blurs them.

    python -m accel.bench.probe '{"bundle": ..., "variant": "openvino:bf16", "call": {...}}'

prints one JSON line.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ..engines import facts
from ..errors import UserError
from ..pipeline import opened
from . import variants
from .variants import Variant


@dataclass(frozen=True, kw_only=True)
class Process:
    """One image in a fresh process. Seconds and bytes; None is not measured.

    Attributes:
        imports_s: importing the libraries.
        load_s: loading the pipeline, with the files in the page cache and no engine cache.
        first_image_s: includes whatever the engine compiles on its first call.
        second_image_s: the call that users see from then on.
        baseline_rss_bytes: resident memory after the imports, before any model.
        loaded_rss_bytes: resident memory with the pipeline loaded.
        peak_rss_bytes: highest resident memory of the whole process; memory-mapped weights count.
        device_bytes: GPU memory taken from before loading to after the second image.
        crashed: how the process ended, if not by itself; such a variant is not loaded again.
        reason: why nothing was measured.
    """

    imports_s: float | None = None
    load_s: float | None = None
    first_image_s: float | None = None
    second_image_s: float | None = None
    baseline_rss_bytes: int | None = None
    loaded_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    device_bytes: int | None = None
    crashed: str = ""
    reason: str = ""


def probe(bundle: Path, variant: Variant, call: Mapping[str, Any], environment: Mapping[str, str]) -> Process:
    """Run one variant in a fresh process.

    Args:
        call: keyword arguments of the pipeline call, JSON-able.
        environment: variables to add, such as caches that are empty.
    """
    how = {"variant": variant.name, "threads": variant.threads, "call": dict(call)}
    request = json.dumps({"bundle": str(Path(bundle).absolute()), **how})
    child = subprocess.Popen(
        [sys.executable, "-m", "accel.bench.probe", request],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(environment),
    )
    try:
        out, errors = child.communicate()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if child.returncode < 0:
        number = -child.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = ", perhaps out of memory" if name == "SIGKILL" else ""
        return Process(crashed=f"the process died of {name}{hint}", reason=f"the process died of {name}{hint}")
    lines = [line for line in out.splitlines() if line.startswith('{"probe"')]
    if child.returncode or not lines:
        last = errors.strip().splitlines()
        return Process(reason=last[-1][:300] if last else f"the process ended with code {child.returncode}")
    return Process(**json.loads(lines[-1])["probe"])


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the fresh process does. See `Process`."""
    started = time.perf_counter()
    variant = replace(variants.parse(request["variant"]), threads=request.get("threads"))
    for name in facts(variant.engine).libraries:
        import_module(name)
    imported = time.perf_counter()
    device = _device_used()
    baseline = _rss()
    loading = time.perf_counter()
    pipeline = variants.load(opened(request["bundle"], safety_checker=False), variant)
    loaded = time.perf_counter()
    loaded_rss = _rss()
    images = []
    for _ in range(2):
        before = time.perf_counter()
        pipeline(output_type="np", **request["call"])
        images.append(time.perf_counter() - before)
    return {
        "imports_s": imported - started,
        "load_s": loaded - loading,
        "first_image_s": images[0],
        "second_image_s": images[1],
        "baseline_rss_bytes": baseline,
        "loaded_rss_bytes": loaded_rss,
        "peak_rss_bytes": _peak_rss(),
        "device_bytes": None if device is None else (_device_used() or 0) - device,
    }


def _rss() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _peak_rss() -> int:
    """Highest resident memory in bytes.

    Linux keeps getrusage's maximum across exec, so a child would report its parent's peak; VmHWM starts afresh.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_used() -> int | None:
    """GPU memory in use by everyone, in bytes; engines allocate outside torch, so torch's own count misses them."""
    if shutil.which("nvidia-smi") is None:
        return None  # without importing torch, whose memory would be taken for the model's
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


if __name__ == "__main__":
    try:
        print(json.dumps({"probe": measure(json.loads(sys.argv[1]))}), flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        sys.exit(f"{error.message}")
