"""The whole image beside other libraries: same weights, same noise where it can be given, taking turns on one machine.

    bash benchmarks/peers.sh out/peers                       # makes the environments and the files, then measures
    python benchmarks/peers.py out/peers --rounds 5 --write  # measures again; --peers takes some of them

Every library runs in a process and an environment of its own (peers_worker.py) that draws when it is told, so that
one draws at a time and every round times all of them, starting with another one each time. DDIM, no guidance, one
image, from text to pixels. The PSNR is against diffusers' eager float32 image. OpenVINO GenAI gives 8-bit pixels, which
caps its PSNR near 59 dB; stable-diffusion.cpp draws its own noise, so its image is not compared.
`--write` keeps the result in `peers.json`, puts table and plot into `docs/performance.md` and the table into the
README; `--case` keeps it in `peers-cases.json`, beside those of other models, sizes and steps, as one line of a second
table there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pages
from diffusers import AutoencoderTiny
from peers_limits import int8_peak, operations
from peers_worker import PEERS, folder_of

from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.files import write_json
from accel.machine import machine
from accel.models.source import open_source
from accel.parity import psnr
from accel.sampling import noise

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "benchmarks" / "peers.json", ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "peers.png"
CASES = ROOT / "benchmarks" / "peers-cases.json"
REFERENCE = "diffusers eager"
# First words of the name of a peer, or of what is written for it -> its environment beside .venv.
PLACES = {
    "optimum-onnx": ".venv-optimum",
    "optimum-intel": ".venv-openvino",
    "OpenVINO": ".venv-openvino",
    "genai": ".venv-openvino",
    "stable-diffusion.cpp": ".venv-sdcpp",
}
OWN_NOISE = ("stable-diffusion.cpp",)
TINY = "tiny decoder"
LEFT_OUT = ("OpenVINO GenAI bf16", "OpenVINO GenAI int8", "**accel ONNX Runtime**")  # of the README
OTHERWISE = {True: "its own decoder", False: "its own noise"}
SEED = 7


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment."""
    place = next((place for start, place in PLACES.items() if name.startswith(start)), ".venv")
    return ROOT / place / "bin" / "python"


def prepare(work: Path, topology: str, peers: list[str], size: int, steps: int, calibration: int) -> None:
    """Write the pipeline with random weights and what each library makes of it; what is there is kept."""
    import random_pipeline

    pipeline = work / "pipeline"
    if not (pipeline / "model_index.json").is_file():
        random_pipeline.write(topology, pipeline)
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(config | {"_class_name": "DDIMScheduler", "clip_sample": False}, indent=2))
    index = json.loads((pipeline / "model_index.json").read_text()) | {"scheduler": ["diffusers", "DDIMScheduler"]}
    (pipeline / "model_index.json").write_text(json.dumps(index, indent=2))
    for side in (256, 512):
        np.save(work / f"noise-{side}.npy", noise.normal([SEED], 0, (4, side // 8, side // 8)))
    if not (work / "pipeline-256").is_dir():  # the same with a native size of 256 px
        shutil.copytree(pipeline, work / "pipeline-256", copy_function=os.link)
        at = work / "pipeline-256" / "unet" / "config.json"
        smaller = json.loads(at.read_text()) | {"sample_size": 32}
        at.unlink()
        at.write_text(json.dumps(smaller))
    shutil.copy(ROOT / "accel" / "assets" / "prompts.txt", work / "prompts.txt")
    if not (work / "tiny-vae").is_dir():
        AutoencoderTiny().save_pretrained(work / "tiny-vae")
    progress = lambda stage, done: print(stage, flush=True)  # noqa: E731
    sampler = {"name": "ddim", "steps": steps, "guidance": 0.0}
    bundles = {PEERS[name][1]["bundle"] for name in peers if "bundle" in PEERS[name][1]}
    for bundle in map(work.__truediv__, sorted(bundles | {"ours/fp32"} if "ours/int8" in bundles else bundles)):
        if (bundle / "accel.json").is_file():
            continue
        began = time.perf_counter()
        if bundle.name == "fp32":
            export_pipeline(pipeline, bundle, profile=f"batch=1,size={size}", sampler=sampler, progress=progress)
        else:
            tiny = {"vae": work / "tiny-vae"} if bundle.name.endswith("tiny") else {}
            source = open_source(pipeline, **tiny) if tiny else work / "ours" / "fp32"
            more = {"profile": f"batch=1,size={size}", "sampler": sampler} if tiny else {}
            settings = Int8Settings(images=calibration)
            export_pipeline(source, bundle, precision="int8", int8=settings, progress=progress, **more)
        print(f"{bundle.name}: {time.perf_counter() - began:.0f} s", flush=True)
    for name in dict.fromkeys(map(folder_of, peers)):
        if not name or (work / name).exists():
            continue
        command = [python_of(name), ROOT / "benchmarks" / "peers_worker.py", "prepare", name, work]
        if subprocess.run(list(map(str, command))).returncode:
            print(f"{name}: not prepared", flush=True)


class Worker:
    """A peer that draws when it is told."""

    def __init__(self, name: str, work: Path, size: int, steps: int, threads: int):
        script = ROOT / "benchmarks" / "peers_worker.py"
        options = ["--size", size, "--steps", steps, "--threads", threads]
        command = [python_of(name), script, "serve", name, work, *options]
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(work / f"{name.replace(' ', '-')}.log").open("w"),
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )
        word, _, rest = self._answer().partition(" ")
        assert word == "ready"
        self.start = json.loads(rest)

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"ended with {self.process.wait()}")
        return line

    def _tell(self, word: str) -> str:
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self._answer()

    def draw(self) -> float:
        return float(self._tell("draw"))

    def image(self, file: Path) -> np.ndarray:
        self._tell(f"save {file}")
        return np.load(file)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()


def measure(work: Path, peers: list[str], size: int, steps: int, threads: int, rounds: int) -> dict[str, Any]:
    """Seconds of an image per peer and round, and the PSNR of its image."""
    workers: dict[str, Worker] = {}
    rows: dict[str, dict[str, Any]] = {}
    images: dict[str, np.ndarray] = {}
    for name in peers:
        try:
            workers[name] = Worker(name, work, size, steps, threads)
            images[name] = workers[name].image(work / "image.npy")
            rows[name] = {"seconds": [], **workers[name].start}
        except (RuntimeError, OSError) as error:
            rows[name] = {"error": str(error)}
        print(name, rows[name], flush=True)
    names = list(workers)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if "error" in rows[name]:
                continue
            time.sleep(0.3)  # threads of the last one that still spin
            try:
                rows[name]["seconds"].append(workers[name].draw())
            except (RuntimeError, OSError) as error:  # such as one that was ended because memory ran out
                rows[name] = {"error": str(error)}
                continue
            print(f"round {number + 1} of {rounds}, {name}: {rows[name]['seconds'][-1]:.2f} s", flush=True)
    for name, worker in workers.items():
        worker.close()
        if "error" in rows[name]:
            continue
        if REFERENCE in images and name != REFERENCE and not name.startswith(OWN_NOISE) and TINY not in name:
            rows[name]["psnr"] = float(psnr(images[name], images[REFERENCE], data_range=1.0))
    return {
        "schema": "accel-peers/1",
        "command": f"python benchmarks/peers.py WORK --size {size} --steps {steps} --rounds {rounds}"
        f" --peers {','.join(peers)!r}",
        "machine": machine().as_dict(),
        "versions": {place: versions(ROOT / place) for place in (".venv", *dict.fromkeys(PLACES.values()))},
        "work": {"size": size, "steps": steps, "threads": threads, "rounds": rounds, "guidance": 0.0, "batch": 1},
        "limit": {"operations": operations(work / "pipeline", size, steps), "int8_peak": int8_peak(threads)},
        "rows": rows,
    }


def versions(place: Path) -> dict[str, str]:
    """The libraries of an environment that matter here."""
    wanted = ("torch", "diffusers", "onnxruntime", "optimum-onnx", "optimum-intel", "nncf", "openvino")
    wanted += ("openvino-genai", "stable-diffusion-cpp-python")
    python = place / "bin" / "python"
    if not python.is_file():
        return {}
    code = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {name: found[name] for name in wanted if name in found}


def shorter(document: Mapping[str, Any]) -> str:
    """The table without the rows of a library that has a faster one of the same kind."""
    lines = table(document).split("\n")
    return "\n".join(line for line in lines if line.split("|")[1:2] not in [[f" {name} "] for name in LEFT_OUT])


def table(document: Mapping[str, Any]) -> str:
    """Fastest first, with the speed over eager and over the best library that is not ours."""
    work, rows = document["work"], {k: v for k, v in document["rows"].items() if v.get("seconds")}
    median = {name: statistics.median(row["seconds"]) for name, row in rows.items()}
    title = f"{work['steps']} steps, {work['size']} px, {work['threads']} threads"
    lines = [f"| {title} | image s | over eager | over the best peer | same image |", "|---|---|---|---|---|"]
    for name in sorted(median, key=median.__getitem__):
        seconds, row = median[name], rows[name]
        # The best of those that do the same work: with the model's own decoder, or with a tiny one.
        theirs = [v for n, v in median.items() if not n.startswith("accel") and (TINY in n) == (TINY in name)]
        versus = [f"{base / seconds:.2f}x" if base else "-" for base in (median.get(REFERENCE), min(theirs, default=0))]
        same = (
            "reference" if name == REFERENCE else f"{row['psnr']:.0f} dB" if "psnr" in row else OTHERWISE[TINY in name]
        )
        shown = f"**{name}**" if name.startswith("accel") else name
        lines.append(f"| {shown} | {seconds:.2f} | {' | '.join(versus)} | {same} |")
    failed = [f"{name}: {row['error']}" for name, row in document["rows"].items() if "error" in row]
    here = document["machine"]
    isa = next((f", {name}" for name in ("amx_int8", "avx512_vnni", "avx_vnni", "avx2") if name in here["isa"]), "")
    places = {f"{name} {number}" for place in document["versions"].values() for name, number in place.items()}
    line = f"{here['cpu']}{isa}; medians of {work['rounds']} rounds, taking turns; {', '.join(sorted(places))}."
    if limit := document.get("limit"):
        whole = [value for name, value in median.items() if TINY not in name]
        least = limit["operations"] / limit["int8_peak"]
        line += (
            f" An image is {limit['operations'] / 1e9:,.0f} billion operations; in int8 this processor reached "
            f"{limit['int8_peak'] / 1e12:.2f} trillion a second (`benchmarks/peers_limits.py`), {least:.2f} s: "
            f"the fastest row is at {least / min(whole):.0%} of that."
        )
    return "\n".join([*lines, "", line, *(["", "Not run: " + "; ".join(failed) + "."] if failed else [])])


def plot(document: Mapping[str, Any], path: Path) -> None:
    """A bar for each library, fastest on top, and the time that the multiplications need at the int8 rate reached."""
    plt = pages.pyplot()
    work = document["work"]
    median = {name: statistics.median(row["seconds"]) for name, row in document["rows"].items() if row.get("seconds")}
    names = sorted(median, key=median.__getitem__, reverse=True)
    figure, axis = plt.subplots(figsize=(8, 0.3 * len(names) + 0.8))
    colours = ["#2b6cb0" if name.startswith("accel") else "#a0aec0" for name in names]
    bars = axis.barh(names, [median[name] for name in names], color=colours, height=0.7)
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    if limit := document.get("limit"):
        least = limit["operations"] / limit["int8_peak"]
        axis.axvline(least, color="#c05621", linestyle="--", linewidth=1)
        axis.text(least, len(names) - 0.5, " int8 roofline", color="#c05621", fontsize=8, va="bottom")
    axis.set_xlabel(f"seconds for an image of {work['size']} px in {work['steps']} steps")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def cases(documents: list[Mapping[str, Any]]) -> str:
    """One line for each model, size and number of steps."""
    lines = [
        "| model | size, steps | diffusers eager s | best peer s | best of accel s | over eager | over the best peer |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for document in documents:
        work, rows = document["work"], document["rows"]
        median = {name: statistics.median(row["seconds"]) for name, row in rows.items() if row.get("seconds")}
        for tiny in (False, True):
            same = [name for name in median if (TINY in name) == tiny]
            ours = min((name for name in same if name.startswith("accel")), key=median.__getitem__, default=None)
            theirs = min((name for name in same if not name.startswith("accel")), key=median.__getitem__, default=None)
            if not ours or not theirs:
                continue
            shown = [
                f"{name.removesuffix(f' {TINY}')}: {median[name]:.2f}"
                + (f" ({rows[name]['psnr']:.0f} dB)" if "psnr" in rows[name] else "")
                for name in (theirs, ours)
            ]
            over = [f"{base / median[ours]:.2f}x" for base in (median[REFERENCE], median[theirs])]
            cells = [
                work["topology"] + (f", {TINY}" if tiny else ""),
                f"{work['size']} px, {work['steps']}",
                f"{median[REFERENCE]:.2f}",
            ]
            lines.append(f"| {' | '.join([*cells, *shown, *over])} |")
    machines = sorted({document["machine"]["cpu"] for document in documents})
    rounds = sorted({document["work"]["rounds"] for document in documents})
    line = f"{', '.join(machines)}; medians of {' or '.join(map(str, rounds))} rounds, taking turns, of the rows in"
    return "\n".join([*lines, "", f"{line} `benchmarks/peers-cases.json`, which has each command."])


def keep_case(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Keep a result among those of other models, sizes and steps; an older one of the same work is replaced."""
    keys = ("topology", "size", "steps", "threads")
    identity = lambda one: tuple(one["work"][key] for key in keys)  # noqa: E731
    kept = json.loads(CASES.read_text()) if CASES.is_file() else []
    made = sorted([*(one for one in kept if identity(one) != identity(document)), document], key=identity)
    write_json(CASES, made)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, nargs="?", help="work folder; without it the kept results are written")
    parser.add_argument("--topology", default="sd15-tiny", help="of the UNet (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calibration-images", type=int, default=32)
    parser.add_argument("--peers", default=",".join(PEERS), help="names, separated by commas")
    parser.add_argument("--prepare", action="store_true", help="write what the libraries read, and measure nothing")
    parser.add_argument("--write", action="store_true", help="keep the result and put the table into the page")
    parser.add_argument("--case", action="store_true", help="keep the result as a line of the second table")
    args = parser.parse_args()
    peers = [name.strip() for name in args.peers.split(",")]
    if unknown := [name for name in peers if name not in PEERS]:
        parser.error(f"unknown: {', '.join(unknown)}; of {', '.join(PEERS)}")
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
        prepare(args.work, args.topology, peers, args.size, args.steps, args.calibration_images)
        if args.prepare:
            return 0
        document = measure(args.work, peers, args.size, args.steps, args.threads, args.rounds)
        document["work"] |= {"topology": args.topology, "calibration_images": args.calibration_images}
        document["command"] += f" --topology {args.topology} --calibration-images {args.calibration_images}"
        write_json(args.work / "result.json", document)
    else:
        document = json.loads(KEPT.read_text())
    print(table(document))
    if args.write:
        write_json(KEPT, document)
        plot(document, PLOT)
        pages.put(PAGE, "peers", table(document))
        pages.put(ROOT / "README.md", "peers", shorter(document))
    if args.case:
        pages.put(PAGE, "peers-cases", cases(keep_case(document)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
