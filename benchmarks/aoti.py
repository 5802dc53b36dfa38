"""AOTInductor at real size on a CPU: SD-Tiny at 256 px, its build and files, an image beside eager and torch.compile.

    python benchmarks/aoti.py out/aoti --write      # benchmarks/aoti-sd-tiny.json, and a table of docs/aoti.md

Weights are random (`random_pipeline.py`), which decides neither time nor how close two ways of computing are. Engines
draw in turns in one process; nothing else should run. CPU seconds are kept beside the clock's, so that a reader sees
whether something did. The files are kept in the folder (5 GB), so that a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENGINES = ("eager", "aoti", "compile")
PROFILE, PARTS = "batch=1,size=256", ("--components", "text_encoder,unet,vae_decoder")
CALL = dict(prompt="a handwritten seven", seed=7, steps=2, guidance_scale=7.5)


def prepared(out: Path, topology: str) -> Path:
    """The bundle in float32, with an engine file of each network."""
    source, bundle = out / topology, out / "bundle"
    if not (source / "model_index.json").is_file():
        from random_pipeline import write

        write(topology, source)
    accel = [sys.executable, "-m", "accel"]
    if not bundle.exists():
        subprocess.run([*accel, "export", str(source), str(bundle), "--profile", PROFILE, *PARTS], check=True)
    subprocess.run([*accel, "build", str(bundle), "--engine", "aoti", "--device", "cpu"], check=True)
    return bundle


def files(bundle: Path) -> list[dict[str, Any]]:
    """What each build took, its compilers included: seconds, CPU seconds, peak of memory; and the file's bytes."""
    from accel.bundle import Bundle
    from accel.trt import engine_files

    rows = []
    for file in engine_files.find(Bundle.open(bundle)):
        record = file.record
        row = {"network": record["component"], "seconds": record["seconds"], "bytes": record["plan"]["bytes"]}
        row |= {key: record["measured"][key] for key in ("cpu_seconds", "peak_memory")}
        rows.append(row | {"relative_l2": record["audit"]["parity"]["relative_l2"]})
    return rows


def memory(out: Path, bundle: Path, engines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each engine in a process of its own: the first image, and the peak of memory above the libraries'."""
    from accel.bench import parse, probe

    kept = out / "memory.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    missing = (one for one in engines if found.get(one, {}).get("steps") != CALL["steps"])
    for engine in missing:
        done = probe.probe(bundle, parse(engine), CALL, {})
        if done.reason:
            raise SystemExit(f"{engine}: {done.reason}")
        found[engine] = {"load_s": round(done.load_s, 2), "first_image_s": round(done.first_image_s, 2)}
        found[engine]["steps"] = CALL["steps"]
        found[engine]["peak_bytes"] = done.peak_rss_bytes - done.baseline_rss_bytes
        kept.write_text(json.dumps(found))
        print(engine, found[engine], flush=True)
    return {engine: found[engine] for engine in engines}


def drawn(bundle: Path, engines: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of an image, engines in turns, and how far it is from eager's."""
    import accel
    from accel.parity import psnr, relative_l2

    pipes = {engine: accel.load(bundle, engine, text_cache=0) for engine in engines}
    images = {engine: pipe(output_type="np", **CALL).images for engine, pipe in pipes.items()}
    wall: dict[str, list[float]] = {engine: [] for engine in engines}
    cpu: dict[str, list[float]] = {engine: [] for engine in engines}
    for _ in range(rounds):
        for engine, pipe in pipes.items():
            began, used = time.perf_counter(), time.process_time()
            pipe(output_type="np", **CALL)
            cpu[engine].append(round(time.process_time() - used, 3))
            wall[engine].append(round(time.perf_counter() - began, 3))
    return {
        engine: {
            "cpu_s": cpu[engine],
            "wall_s": wall[engine],
            "relative_l2": float(relative_l2(images[engine], images["eager"])),
            "psnr_db": None if engine == "eager" else float(psnr(images[engine], images["eager"], 1.0)),
        }
        for engine in engines
    }


def table(document: dict[str, Any]) -> str:
    lines = ["| network | build s | peak of the build, GB | file, MB | differs from torch |", "|---|---|---|---|---|"]
    for row in document["files"]:
        cells = [f"{row['seconds']:.0f}", f"{row['peak_memory'] / 1e9:.1f}", f"{row['bytes'] / 1e6:,.0f}"]
        lines.append(f"| {row['network']} | {' | '.join(cells)} | {row['relative_l2']:.1e} |")
    where = f"SD-Tiny at its real size with random weights in float32, 256 px; {document['machine']}."
    if not document["images"]:
        return "\n".join([*lines, "", f"{where} `{document['command']}`"])
    lines += [
        "",
        "| engine | image s | over eager | first image s | loading s | peak of memory, GB | image against eager |",
        "|---|---|---|---|---|---|---|",
    ]
    base = statistics.median(document["images"]["eager"]["wall_s"])
    for engine, row in document["images"].items():
        took, alone = statistics.median(row["wall_s"]), document["memory"][engine]
        start, peak = f"{alone['first_image_s']:.1f} | {alone['load_s']:.1f}", alone["peak_bytes"] / 1e9
        same = "reference" if row["psnr_db"] is None else f"{row['relative_l2']:.1e}, {row['psnr_db']:.0f} dB"
        lines.append(f"| {engine} | {took:.2f} | {base / took:.2f}x | {start} | {peak:.1f} | {same} |")
    rounds = len(document["images"]["eager"]["wall_s"])
    lines += [
        "",
        f"{where} {CALL['steps']} steps with guidance, {document['threads']} threads, medians of {rounds} rounds. "
        f"`{document['command']}`",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the pipeline and the bundle")
    parser.add_argument("--topology", default="sd15-tiny", help="a topology of random_pipeline.py")
    parser.add_argument("--engines", default=",".join(ENGINES), help="with commas between them; eager is the reference")
    parser.add_argument("--rounds", type=int, default=5, help="0: builds alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help="write the JSON, and the table of docs/aoti.md")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    bundle, engines = prepared(args.out, args.topology), args.engines.split(",")

    from accel.machine import machine_name

    document = {
        "command": f"python benchmarks/aoti.py out/aoti --engines {args.engines} --rounds {args.rounds} --write",
        "machine": machine_name(),
        "threads": args.threads,
        "load": [round(one, 1) for one in os.getloadavg()],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "files": files(bundle),
        "memory": memory(args.out, bundle, engines) if args.rounds else {},
        "images": drawn(bundle, engines, args.rounds) if args.rounds else {},
    }
    print(table(document))
    if args.write:
        import pages

        (HERE / "aoti-sd-tiny.json").write_text(json.dumps(document, indent=1) + "\n")
        pages.put(HERE.parent / "docs/aoti.md", "aoti-sd-tiny", table(document))


if __name__ == "__main__":
    main()
