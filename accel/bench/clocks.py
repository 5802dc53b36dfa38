"""What a GPU did while it was timed: clocks, power, temperature, and what held it back; `nvidia-smi` reads them.

A figure of a GPU that was throttled, or that ran at its idle clocks, says nothing about the engine.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Our name -> nvidia-smi's.
_FIELDS = {
    "index": "index",
    "busy": "utilization.gpu",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "watts_limit": "power.limit",
    "celsius": "temperature.gpu",
    "reasons": "clocks_event_reasons.active",
}
# Bits of NVML's nvmlClocksEventReason*; an idle GPU (1) and clocks that were asked for (2, 16, 256) hold nothing back.
_HELD_BACK = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
_BUSY = 50  # per cent of the time since the last sample in which a kernel ran
_EVERY_MS = 200


class Clocks:
    """Samples of every GPU that `nvidia-smi` lists, taken while `watch` lasts."""

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []

    def add(self, line: str) -> None:
        """Take a line of `nvidia-smi`; what it cannot read ("[N/A]") is left out."""
        values = [value.strip() for value in line.split(",")]
        if len(values) != len(_FIELDS):
            return
        sample: dict[str, float] = {}
        for name, value in zip(_FIELDS, values, strict=True):
            with contextlib.suppress(ValueError):
                sample[name] = int(value, 16) if value.startswith("0x") else float(value)
        self.samples.append(sample)

    def summary(self) -> dict[str, Any] | None:
        """What the busiest GPU did while it was busy (or at all, where it never was for long); None without samples.

        Returns:
            {"samples": how many, "sm_mhz": [least, median, most], "sm_max_mhz", "memory_mhz": median, "watts": [median,
            most], "watts_limit", "celsius": most, "held_back": [what, ...]}; null for what was not read.
        """
        if not self.samples:
            return None
        work = Counter[float]()
        for sample in self.samples:
            work[sample.get("index", 0)] += sample.get("busy", 0)
        own = [sample for sample in self.samples if sample.get("index", 0) == max(work, key=work.__getitem__)]
        own = [sample for sample in own if sample.get("busy", 0) >= _BUSY] or own
        read = {name: [sample[name] for sample in own if name in sample] for name in _FIELDS}
        middle = lambda name: statistics.median(read[name]) if read[name] else None  # noqa: E731
        most = lambda name: max(read[name], default=None)  # noqa: E731
        reasons = {bit for value in read["reasons"] for bit in _HELD_BACK if int(value) & bit}
        return {
            "samples": len(own),
            "sm_mhz": [min(read["sm_mhz"], default=None), middle("sm_mhz"), most("sm_mhz")],
            "sm_max_mhz": most("sm_max_mhz"),
            "memory_mhz": middle("memory_mhz"),
            "watts": [middle("watts"), most("watts")],
            "watts_limit": most("watts_limit"),
            "celsius": most("celsius"),
            "held_back": [_HELD_BACK[bit] for bit in sorted(reasons)],
        }


@contextlib.contextmanager
def watch(clocks: Clocks) -> Iterator[None]:
    """Sample the GPUs five times a second; where there is no `nvidia-smi`, nothing is sampled."""
    program = shutil.which("nvidia-smi")
    if program is None:
        yield
        return
    query = f"--query-gpu={','.join(_FIELDS.values())}"
    command = [program, query, "--format=csv,noheader,nounits", f"--loop-ms={_EVERY_MS}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        reader = threading.Thread(target=lambda: [clocks.add(line) for line in process.stdout or ()], daemon=True)
        reader.start()
        try:
            yield
        finally:
            process.terminate()
            reader.join(5)


def sentence(found: dict[str, Any]) -> str:
    """One line for people, such as "GPU while timed: 1,980 of 1,980 MHz, 412 of 700 W, 54 degrees; not held back"."""
    said = []
    if found["sm_mhz"][1] is not None:
        said.append(f"{found['sm_mhz'][1]:,.0f}{_of(found['sm_max_mhz'])} MHz")
    if found["watts"][0] is not None:
        said.append(f"{found['watts'][0]:,.0f}{_of(found['watts_limit'])} W")
    if found["celsius"] is not None:
        said.append(f"{found['celsius']:.0f} degrees")
    held = f"held back by {', '.join(found['held_back'])}" if found["held_back"] else "not held back"
    return f"GPU while timed: {', '.join(said)}; {held}"


def _of(limit: float | None) -> str:
    return "" if limit is None else f" of {limit:,.0f}"
