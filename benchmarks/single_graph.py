"""One graph against the pipeline of the same bundle on the same engine: file sizes, seconds to load, seconds per image.

    python benchmarks/single_graph.py digits/1step-int8 digits/4step-int8 --out benchmarks/single-graph.json
    OMP_NUM_THREADS=2 python benchmarks/single_graph.py out/tiny --steps 1,4 --out benchmarks/single-graph-sd-tiny.json
    ... single_graph.py out/peers-512/ours/int8-tiny --steps 1,4 --out benchmarks/single-graph-512.json
    python benchmarks/single_graph.py                                # the tables of docs/single-graph.md

Each bundle is written as a single graph first. Engines take turns, one image a round, in one process with one thread
unless OMP_NUM_THREADS says more; medians are kept. The pipeline's time is that of `pipe(prompt)`, tokenizer included,
and the graph's that of its tokenizer and one run. Loading is from files that were read before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pages
from peers_limits import int8_peak

import accel
from accel.bundle import Bundle, finalize
from accel.export.single_graph import export
from accel.files import write_json
from accel.machine import machine
from accel.text.tokenizer import ClipTokenizer

ROOT = Path(__file__).parents[1]
KEPT = [
    ROOT / "benchmarks" / name for name in ("single-graph.json", "single-graph-sd-tiny.json", "single-graph-512.json")
]
# The fastest published image of 512 px on a processor: SDXS-512, one step, a tiny VAE, OpenVINO (FastSD CPU's readme).
RECORD = {"seconds": 0.82, "cpu": "Core i7-12700", "size": 512, "steps": 1}
# Its float32 rate at most: 8 cores with two 256-bit multiply-adds a cycle at 4.5 GHz, 4 with one at 3.6 GHz.
RECORD_PEAK = 8 * 32 * 4.5e9 + 4 * 16 * 3.6e9
PROMPT, THREADS = "a handwritten seven", int(os.environ.get("OMP_NUM_THREADS") or 1)


def on_onnxruntime(graph: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    session = export.onnxruntime_session(str(graph), export.OFF_FOR_INT8 if "uint8" in graph.name else [])
    return lambda feeds: session.run(None, feeds)[0]


def on_openvino(graph: Path, hint: str = "f32") -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(graph, "CPU", options)
    return lambda feeds: compiled(feeds)[0]


def has_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 here, as it does by itself unless it is asked for float32."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    made = work()
    return made, time.perf_counter() - began


def with_steps(bundle: Bundle, steps: int, folder: Path) -> Bundle:
    """The same bundle, sampled with another number of steps; its files are linked."""
    folder.mkdir()
    bundle.copy(folder)
    sampler = dict(bundle.manifest.sampler) | {"steps": steps, "timesteps": None}
    finalize(folder, replace(bundle.manifest, sampler=sampler))
    return Bundle.open(folder)


def measure(bundle: Bundle, folder: Path, rounds: int) -> dict[str, Any]:
    record, seconds = timed(lambda: export.write(bundle, folder))
    tokenizer = ClipTokenizer.from_folder(folder / "tokenizer")
    names = {spec["name"] for spec in record["inputs"]}

    def feeds(seed: int) -> dict[str, np.ndarray]:
        texts = {"input_ids": PROMPT, "negative_input_ids": ""}
        ids = {name: tokenizer([text]) for name, text in texts.items() if name in names}
        return ids | {"seed": np.array([seed], np.int32)}

    own = {"onnxruntime": folder / record["graphs"][-1], "openvino": folder / record["graphs"][0]}
    openers = {"onnxruntime": on_onnxruntime, "openvino": on_openvino}
    engines: dict[str, Any] = {}
    for engine, graph in own.items():
        engines[engine] = compared(partial(_loaded, bundle, engine), partial(openers[engine], graph), feeds, rounds)
        gc.collect()
    if has_bf16():
        load, open_graph = partial(_loaded, bundle, "openvino", dtype="bf16"), partial(on_openvino, hint="bf16")
        engines["openvino bf16"] = compared(load, partial(open_graph, own["openvino"]), feeds, rounds)
    files = {name: entry["bytes"] for name, entry in record["files"].items() if not name.startswith("tokenizer")}
    return {
        "model": record["source"]["name"],
        "decoder": json.loads(bundle.file("vae_decoder/config.json").read_text())["_class_name"],
        "precision": record["precision"],
        "steps": len(record["timesteps"]),
        "size": list(record["outputs"][0]["shape"][1:3]),
        "files": files,
        "written_in_seconds": round(seconds, 1),
        "parity": {key: record["parity"][key] for key in ("largest_of_255", "psnr")},
        "engines": engines,
    }


def compared(load: Callable[[], Any], open_graph: Callable[[], Any], feeds: Callable, rounds: int) -> dict[str, Any]:
    """Pipeline and graph of one engine, taking turns."""
    (pipe, pipe_load), (run, graph_load) = timed(load), timed(open_graph)
    run(feeds(0))
    theirs, ours = [], []
    for seed in range(rounds):
        theirs.append(timed(partial(pipe, PROMPT, seed=seed, output_type="np", progress=False))[1])
        ours.append(timed(partial(_fed, run, feeds, seed))[1])
    pipe.close()
    return {
        "pipeline": {"load_seconds": round(pipe_load, 2), "image_seconds": round(statistics.median(theirs), 4)},
        "single_graph": {"load_seconds": round(graph_load, 2), "image_seconds": round(statistics.median(ours), 4)},
    }


def _fed(run: Callable, feeds: Callable, seed: int) -> Any:
    return run(feeds(seed))


def _loaded(bundle: Bundle, engine: str, **options: Any) -> Any:
    """A pipeline that has drawn once: its networks are loaded when they are first used."""
    pipe = accel.load(bundle, engine, threads=THREADS, text_cache=0, **options)
    pipe(PROMPT, seed=0, progress=False)
    return pipe


def tables() -> str:
    """A table for each record that is there."""
    return "\n\n".join(_table(json.loads(path.read_text())) for path in KEPT if path.exists())


def _table(document: dict[str, Any]) -> str:
    lines = [
        "| bundle | engine | files | load: graph | load: pipeline | image: graph | image: pipeline |",
        "|---" * 7 + "|",
    ]
    for row in document["rows"]:
        for engine, found in row["engines"].items():
            graph, pipeline = found["single_graph"], found["pipeline"]
            unused = "model.uint8.onnx" if engine.startswith("openvino") else "model.onnx" * (len(row["files"]) == 3)
            megabytes = sum(size for name, size in row["files"].items() if name != unused) / 1e6
            model = {"pipeline": "SD-Tiny"}.get(row["model"], row["model"])  # as `random_pipeline.py` writes it
            model += ", tiny VAE" * (row.get("decoder") == "AutoencoderTiny")
            name = f"{model}, {row['precision']}, {row['size'][0]} px, {row['steps']} step{'s' * (row['steps'] > 1)}"
            lines.append(
                f"| {name} | {engine} | {megabytes:,.1f} MB | {graph['load_seconds']:.1f} "
                f"| {pipeline['load_seconds']:.1f} | {graph['image_seconds']:.3f} | {pipeline['image_seconds']:.3f} |"
            )
    here = document["machine"]
    line = f"{here['cpu']}, threads: {here['threads']}, load average {here['load_average']} at the end"
    return "\n".join([*lines, "", f"{line}; `{document['command']}`.", *_beside_the_record(document)])


def _beside_the_record(document: dict[str, Any]) -> list[str]:
    """A paragraph for each image of the record's size and steps; none in a document of others."""
    peak, found = document.get("int8_peak", 0), []
    for row in document["rows"]:
        if row["size"] != [RECORD["size"]] * 2 or row["steps"] != RECORD["steps"]:
            continue
        times = {name: engine["single_graph"]["image_seconds"] for name, engine in row["engines"].items()}
        best = min(times, key=times.__getitem__)
        theirs = RECORD["seconds"] * RECORD_PEAK / 1e12
        text = (
            f"The published record of one step at {RECORD['size']} px on a processor is {RECORD['seconds']} s: "
            f"SDXS-512 with a tiny VAE on OpenVINO, on a {RECORD['cpu']} (FastSD CPU's readme). That processor does "
            f"{RECORD_PEAK / 1e12:.2f} trillion float32 operations a second at most, so it had time for {theirs:.2f} "
            f"trillion. Here it is {times[best]:.2f} s on {best}, at {peak / 1e12:.2f} trillion int8 operations a "
            f"second (measured, `benchmarks/peers_limits.py`): time for {times[best] * peak / 1e12:.2f} trillion."
        )
        found += ["", text]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", help="left out, the tables of docs/single-graph.md are written")
    parser.add_argument("--steps", help="numbers of steps, separated by commas, instead of the bundle's own")
    parser.add_argument("--work", type=Path, help="folder for the graphs (default: that of temporary files)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.bundles:
        return pages.put(ROOT / "docs" / "single-graph.md", "single graph", tables())
    rows = []
    for model in args.bundles:
        for steps in map(int, args.steps.split(",")) if args.steps else [None]:
            with tempfile.TemporaryDirectory(dir=args.work) as work:
                folder, bundle = Path(work), Bundle.open(model)
                bundle = with_steps(bundle, steps, folder / "bundle") if steps else bundle
                rows.append(measure(bundle, folder / "graph", args.rounds))
            print(rows[-1], flush=True)
    packages = {name: version(name) for name in ("onnxruntime", "openvino")}
    names = " ".join(Path(name).name if Path(name).is_absolute() else name for name in args.bundles)
    steps = f" --steps {args.steps}" if args.steps else ""
    document = {
        "command": f"python benchmarks/single_graph.py {names}{steps} --rounds {args.rounds}",
        "machine": asdict(machine()) | {"threads": THREADS, "load_average": round(os.getloadavg()[0], 1)},
        "packages": packages,
        "int8_peak": int8_peak(THREADS),
        "rows": rows,
    }
    if args.out:
        write_json(args.out, document)


if __name__ == "__main__":
    main()
