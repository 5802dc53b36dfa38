"""How the cost of an image grows with its size, the batch, the steps and the threads, beside the int8 roofline.

    python benchmarks/growth.py out/growth --write      # half an hour on two cores, most of it the exports

A real-size pipeline with random weights (SD-Tiny by default) is exported for several images and for several sizes, in
int8 (its ranges come from one image: they decide nothing about speed), and draws whole images on one engine. Every
figure is the median of its rounds. The roofline is the multiplications of the stored networks at the rate of int8
convolutions on this processor (`peers_limits.py`). `--write` makes `growth.json`, and plot and table of
`docs/performance.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pages
import random_pipeline
from peers_limits import int8_peak, operations

import accel
from accel.export.int8 import speed
from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.files import write_json
from accel.machine import machine
from accel.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "benchmarks" / "growth.json", ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "growth.png"
USUAL = {"size": 256, "batch": 1, "steps": 4}
# What varies -> its values; the others are as usual.
VARIED = {"size": (256, 384, 512, 768, 1024), "batch": (1, 2, 4, 8), "steps": (1, 2, 4, 8, 25)}
PROFILES = ("batch=1-8,size=256", "batch=1,size=256-1024")
LABELS = {"size": "side, px", "batch": "images at once", "steps": "steps", "threads": "threads"}


def prepared(work: Path, topology: str, profile: str) -> Path:
    """The int8 bundle of a profile, written where it is not there yet; `work/pipeline` has the random weights.

    One bundle for all sizes and batches would be compared with torch at the largest of both: more than 21 GB. Nor is
    the speed of each network measured: that is what this script does.
    """
    pipeline, fp32, int8 = work / "pipeline", work / "fp32", work / profile
    say = lambda stage, done: print(profile, stage, flush=True)  # noqa: E731
    if not (pipeline / "model_index.json").is_file():
        random_pipeline.write(topology, pipeline)
        config = pipeline / "unet" / "config.json"  # images are calibrated and compared at the model's own size
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": USUAL["size"] // 8}))
    if not (int8 / "accel.json").is_file():
        sampler = {"name": "ddim", "steps": USUAL["steps"], "guidance": 0.0}
        export_pipeline(pipeline, fp32, profile=profile, sampler=sampler, progress=say, overwrite=True)
        settings = Int8Settings(images=1, evaluation_images=1)
        with mock.patch.object(speed, "engines_for", lambda *_: ()):
            export_pipeline(fp32, int8, precision="int8", int8=settings, progress=say)
        shutil.rmtree(fp32)
    return int8


def draw(pipe: Pipeline, size: int, batch: int, steps: int) -> float:
    """Seconds of `batch` images."""
    began = time.perf_counter()
    pipe(["a fox in the snow"] * batch, height=size, width=size, steps=steps, seed=7, output_type="np")
    return time.perf_counter() - began


def measure(work: Path, topology: str, engine: str, rounds: int) -> list[dict[str, Any]]:
    """One row for each value of what varies."""
    most = os.cpu_count() or 1
    cases = [USUAL | {"varies": key, key: value, "threads": most} for key, values in VARIED.items() for value in values]
    cases += [USUAL | {"varies": "threads", "threads": threads} for threads in range(1, most + 1)]
    few, large = (prepared(work, topology, profile) for profile in PROFILES)
    rows, peaks = [], {threads: int8_peak(threads) for threads in {case["threads"] for case in cases}}
    for threads, varies in sorted({(case["threads"], case["varies"] == "size") for case in cases}, reverse=True):
        with accel.load(large if varies else few, engine=engine, threads=threads) as pipe:
            for case in (case for case in cases if (case["threads"], case["varies"] == "size") == (threads, varies)):
                asked = {key: case[key] for key in USUAL}
                draw(pipe, **asked)  # kernels of this shape are made
                taken = [draw(pipe, **asked) for _ in range(rounds)]
                needed = operations(work / "pipeline", **asked)
                found = {"seconds": statistics.median(taken), "least": min(taken), "operations": needed}
                rows.append(case | found | {"roofline": needed / peaks[threads]})
                print(rows[-1], flush=True)
    order = [*VARIED, "threads"]
    return sorted(rows, key=lambda row: (order.index(row["varies"]), row[row["varies"]]))


def table(document: Mapping[str, Any]) -> str:
    """A line for each row."""
    lines = ["| | | s | s per image | roofline s | share |", "|---|---|---|---|---|---|"]
    for row in document["rows"]:
        seconds, least = row["seconds"], row["roofline"]
        lines.append(
            f"| {LABELS[row['varies']]} | {row[row['varies']]} | {seconds:.2f} | {seconds / row['batch']:.2f} "
            f"| {least:.2f} | {least / seconds:.0%} |"
        )
    line = (
        f"{document['machine']['cpu']}, {document['engine']} int8, {document['topology']}; where nothing else is said "
        f"{USUAL['size']} px, one image, {USUAL['steps']} steps, all threads. `{document['command']}`"
    )
    return "\n".join([*lines, "", line])


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Seconds of an image against each of the four, with the roofline."""
    plt = pages.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(11, 3), sharey=False)
    for axis, key in zip(axes, LABELS, strict=True):
        rows = [row for row in document["rows"] if row["varies"] == key]
        at = [row[key] for row in rows]
        axis.plot(at, [row["seconds"] / row["batch"] for row in rows], "o-", color="#2b6cb0", label="measured")
        least = [row["roofline"] / row["batch"] for row in rows]
        axis.plot(at, least, "--", color="#c05621", label="int8 roofline")
        axis.set_xlabel(LABELS[key])
        axis.set_xticks(at)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds per image")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, nargs="?", help="work folder; without it the kept results are written")
    parser.add_argument("--topology", default="sd15-tiny", help="of the UNet (default: %(default)s)")
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the result; write plot and table")
    args = parser.parse_args()
    if args.work:
        document = {
            "schema": "accel-growth/1",
            "command": "python benchmarks/growth.py WORK --write",
            "machine": machine().as_dict(),
            "engine": args.engine,
            "topology": args.topology,
            "rounds": args.rounds,
            "rows": measure(args.work, args.topology, args.engine, args.rounds),
        }
        write_json(args.work / "growth.json", document)
    else:
        document = json.loads(KEPT.read_text())
    print(table(document))
    if args.write:
        write_json(KEPT, document)
        plot(document, PLOT)
        pages.put(PAGE, "growth", table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
