"""What the first call of the digits' UNet costs a fresh process: CPU seconds, of its compilers too, and no wall time.

    python benchmarks/cold_start.py --write      # benchmarks/cold-start.json, and the table of docs/aoti.md

Every row is a process of its own with one thread. Torch's own cache on disk is empty;
imports of torch and of the network's classes are not counted; those of its compiler, and loading the weights, are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL, NETWORK = "digits/tiny-4step", "unet"
# What is written, what runs, and its options; a row finds in accel's cache what an earlier one filled it with.
ROWS = (
    ("eager", "eager", {}),
    ("compile, filling accel's cache", "compile", {}),
    ("compile, from accel's cache", "compile", {}),
    ("compile:regional, filling it", "compile", {"regional": True}),
    ("compile:regional, from it", "compile", {"regional": True}),
    ("aoti", "aoti", {}),
)


def child(bundle: str, engine: str, options: dict[str, Any]) -> None:
    """The first call of the network, loading included."""
    import warnings

    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # noqa: F401

    import accel
    from accel.export.graph.trace import example

    def used() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    warnings.simplefilter("ignore")
    began = used()
    with accel.load_engine(bundle, NETWORK, engine, device="cpu", **options) as loaded:
        sizes = {name: limits.min for name, limits in loaded.component.dims.items()}
        feeds = example(loaded.component.inputs, sizes)
        loaded(**feeds)
        print(json.dumps({"first_call_cpu_s": round(used() - began, 2)}))


def measure(folder: Path) -> list[dict[str, Any]]:
    from accel.export import export_pipeline
    from accel.export.aoti.build import build
    from accel.models.source import open_source

    bundle = folder / "bundle"
    made = export_pipeline(open_source(MODEL), bundle, profile="digits", components=("text_encoder", NETWORK))
    (file,) = build(made, (NETWORK,), device="cpu")
    rows = []
    for name, engine, options in ROWS:
        with tempfile.TemporaryDirectory() as empty:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            command = [sys.executable, __file__, "--child", str(bundle), engine, json.dumps(options)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        rows.append({"what": name} | json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    seconds, size = file.record["measured"]["cpu_seconds"], file.record["plan"]["bytes"]
    rows.append({"what": "accel build --engine aoti", "build_cpu_s": seconds, "bytes": size})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | load and first call, CPU s |", "|---|---|"]
    lines += [f"| {row['what']} | {row['first_call_cpu_s']:.1f} |" for row in rows if "first_call_cpu_s" in row]
    built = rows[-1]
    lines += ["", f"The UNet of `{MODEL}`, batch 1, one thread. The build of its file took {built['build_cpu_s']:.0f}"]
    lines += [f"CPU seconds; it has {built['bytes'] / 1e6:.1f} MB. `python benchmarks/cold_start.py --write`"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/cold-start.json and docs/aoti.md's table"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], json.loads(args.child[2]))
        return
    from accel.machine import machine_name

    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACCEL_CACHE"] = f"{folder}/cache"
        rows = measure(Path(folder))
    document = {"command": "python benchmarks/cold_start.py --write", "machine": machine_name()}
    document |= {"torch": version("torch"), "rows": rows}
    print(table(rows))
    if args.write:
        import pages

        (HERE / "cold-start.json").write_text(json.dumps(document, indent=1) + "\n")
        pages.put(HERE.parent / "docs/aoti.md", "cold-start", table(rows))


if __name__ == "__main__":
    main()
