"""Where the time of an export goes: SD-Tiny at real size with random weights, float32, and int8 with its calibration.

    python benchmarks/export_time.py out/peers --write      # ten minutes on two cores

Exports WORK/pipeline (written by `random_pipeline.py` where it is not there) to WORK/ours/fp32 and that to
WORK/ours/int8, as `accel export` does, each in a process of its own whose peak memory is kept: the same folders as
`peers.py` reads. `--write` makes `export-time.json` and the table of `docs/performance.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pages

from accel.files import write_json
from accel.machine import machine

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "benchmarks" / "export-time.json", ROOT / "docs" / "performance.md"
KINDS = ("fp32", "int8")


class Stages:
    """A progress callback that adds up seconds and CPU seconds of each stage, and keeps its peak of memory."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}
        self.stage, self.at = "start", self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def __call__(self, stage: str, done: float) -> None:
        now, total = self._now(), self.found.setdefault(self.stage, [0.0, 0.0])
        for i in (0, 1):
            total[i] += now[i] - self.at[i]
        self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), _peak())
        self.stage, self.at = stage, now


def _peak() -> int:
    """Bytes that this process has held at most since the last call."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")  # "reset the peak resident set size": Linux, proc(5)
    return int(lines["VmHWM"].split()[0]) * 1024


def export(kind: str, work: Path, size: int, images: int) -> dict[str, Any]:
    """Export one kind, and what it took."""
    from accel.bundle import Bundle
    from accel.export.int8.settings import Int8Settings
    from accel.export.pipeline import export_pipeline

    stages, began = Stages(), time.perf_counter()
    if kind == "fp32":
        sampler = {"name": "ddim", "steps": 4, "guidance": 0.0}
        how = dict(profile=f"batch=1,size={size}", sampler=sampler)
        export_pipeline(work / "pipeline", work / "ours" / kind, progress=stages, overwrite=True, **how)
    else:
        int8 = Int8Settings(images=images)
        source, out = work / "ours" / "fp32", work / "ours" / kind
        export_pipeline(source, out, precision="int8", int8=int8, progress=stages, overwrite=True)
    stages("end", 1.0)
    weights = sum(Path(p).stat().st_size for p in (work / "ours" / "fp32").glob("*/model.safetensors"))
    return {
        "kind": kind,
        "seconds": time.perf_counter() - began,
        "peak": max(stages.peaks.values()),
        "weights": weights,
        "stages": {
            name: {"seconds": s, "cpu_seconds": cpu, "peak": stages.peaks[name]}
            for name, (s, cpu) in stages.found.items()
        },
        "precision": {name: c.precision for name, c in Bundle.open(work / "ours" / kind).manifest.components.items()},
    }


def table(document: Mapping[str, Any]) -> str:
    """A line for each stage of more than two per cent, stages of the same name of all networks together."""
    lines = ["| export | stage | s | CPU s | peak, GB |", "|---|---|---|---|---|"]
    for row in document["rows"]:
        merged: dict[str, list[float]] = {}
        for name, taken in row["stages"].items():
            total = merged.setdefault(name.split(": ")[-1], [0.0, 0.0, 0.0])
            total[0] += taken["seconds"]
            total[1] += taken["cpu_seconds"]
            total[2] = max(total[2], taken["peak"])
        peak = f"memory {row['peak'] / row['weights']:.1f} times the float32 weights"
        cpu = sum(taken["cpu_seconds"] for taken in row["stages"].values())
        lines.append(f"| **{row['kind']}** | {peak} | **{row['seconds']:.1f}** | {cpu:.1f} | {row['peak'] / 1e9:.1f} |")
        for name, (seconds, cpu, peak) in sorted(merged.items(), key=lambda item: -item[1][0]):
            if seconds > 0.02 * row["seconds"]:
                lines.append(f"| | {name} | {seconds:.1f} | {cpu:.1f} | {peak / 1e9:.1f} |")
    work, here = document["work"], document["machine"]
    line = (
        f"{here['cpu']}, {here['threads']} threads; {work['size']} px, {work['images']} calibration images of 4 steps."
    )
    return "\n".join([*lines, "", f"{line} `{document['command']}`"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=32, help="of calibration (default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--write", action="store_true", help="keep the result and put the table into the page")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)  # in this process, as JSON on the last line
    args = parser.parse_args()
    if args.one:
        print(json.dumps(export(args.one, args.work, args.size, args.images)))
        return 0
    if not (args.work / "pipeline" / "model_index.json").is_file():
        import random_pipeline

        random_pipeline.write("sd15-tiny", args.work / "pipeline")
    rows = []
    for kind in args.kinds.split(","):
        command = [sys.executable, __file__, str(args.work), "--one", kind]
        command += ["--size", str(args.size), "--images", str(args.images)]
        environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}  # as `accel export` sets it
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(kind, {key: rows[-1][key] for key in ("seconds", "peak", "precision")}, flush=True)
    document = {
        "schema": "accel-export-time/1",
        "command": "python benchmarks/export_time.py WORK --write",
        "machine": machine().as_dict(),
        "work": {"size": args.size, "images": args.images, "topology": "sd15-tiny"},
        "rows": rows,
    }
    print(table(document))
    if args.write:
        write_json(KEPT, document)
        pages.put(PAGE, "export-time", table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
