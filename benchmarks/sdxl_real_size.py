"""SDXL's UNet at its real size with random weights: export, files, memory, and one step on ONNX Runtime beside torch.

    python benchmarks/sdxl_real_size.py --work out/sdxl-real --json benchmarks/sdxl-512.json

Every stage is a process of its own, which gives all of its memory back; its peak is what the system counted for it
(ru_maxrss: resident memory, mapped files included). The stages:

    weights       a pipeline folder with random weights (14 GB on the disk; skipped where --source names one)
    export        accel export --components unet
    torch         one step in float32 on the source's weights: the truth
    onnxruntime   the same step on the bundle

The step is that of a few-step student: batch 1, t = 999, no guidance. Stages whose results lie in --work already,
made with the same options, are not run again. Random weights are enough for time, memory and parity, and say nothing
about images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from accel.bundle import Bundle
from accel.files import write_json
from accel.machine import machine
from accel.parity import relative_l2

LIMIT = 24 * 2**30
STAGES = ("weights", "export", "torch", "onnxruntime")
TIMESTEP = 999.0


def feeds(bundle: Bundle, size: int) -> dict[str, np.ndarray]:
    """What the UNet is fed: noise from one seed, float32 whatever the bundle computes in."""
    cells = size // bundle.manifest.pipeline["vae_scale"]
    sizes = {"batch": 1, "latent_height": cells, "latent_width": cells}
    generator, made = np.random.default_rng(0), {}
    for spec in bundle.component("unet").inputs:
        made[spec.name] = generator.standard_normal(spec.concrete(sizes)).astype(np.float32)
    sides = np.array([[size, size, 0, 0, size, size]], np.float32)
    return made | {"timestep": np.array(TIMESTEP, np.float32), "time_ids": sides}


def run_torch(source: Path, bundle: Bundle, size: int) -> tuple[np.ndarray, dict[str, float]]:
    import torch

    from accel.models import networks
    from accel.models.source import open_source

    began = time.perf_counter()
    module = networks.unet(open_source(source).load("unet")).module.eval()
    loaded = time.perf_counter()
    with torch.no_grad():
        (out,) = module(**{name: torch.from_numpy(value) for name, value in feeds(bundle, size).items()})
    return out.numpy(), {"load_seconds": loaded - began, "step_seconds": time.perf_counter() - loaded}


def run_onnxruntime(source: Path, bundle: Bundle, size: int) -> tuple[np.ndarray, dict[str, float]]:
    import accel

    began = time.perf_counter()
    unet = accel.load_engine(bundle, "unet", "onnxruntime", verify=False)
    dtypes = {spec.name: spec.dtype for spec in unet.component.inputs}
    own = {name: value.astype(dtypes[name]) for name, value in feeds(bundle, size).items()}
    loaded = time.perf_counter()
    out = np.asarray(unet(**own)["out_sample"], np.float32)
    first = time.perf_counter()
    unet(**own)
    seconds = {"load_seconds": loaded - began, "first_step_seconds": first - loaded}
    return out, seconds | {"step_seconds": time.perf_counter() - first}


def stage(name: str, args: argparse.Namespace) -> list[str]:
    """The command of a stage."""
    source, bundle = args.source or args.work / "source", args.work / "bundle"
    if name == "weights":
        return [sys.executable, str(Path(__file__).parent / "random_pipeline.py"), args.topology, str(source)]
    if name == "export":
        options = ["--components", "unet", "--precision", args.precision, "--profile", f"batch=1,size={args.size}"]
        few = ["--sampler", "dmd2", "--steps", "4", "--overwrite"]
        return [sys.executable, "-m", "accel", "export", str(source), str(bundle), *options, *few]
    own = ["--work", str(args.work), "--source", str(source), "--size", str(args.size)]
    return [sys.executable, __file__, "--stage", name, *own]


def measured(command: list[str]) -> dict[str, float]:
    """Wall time and peak memory of a process. This one imports no torch, so that a child starts out small."""
    began = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"failed with {child.returncode}: {' '.join(command)}")
    return {"seconds": round(time.perf_counter() - began, 1), "peak_bytes": usage.ru_maxrss * 1024}


def summary(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    bundle = Bundle.open(work / "bundle")
    record = bundle.component("unet")
    truth, found = (np.load(work / f"{name}.npy") for name in ("torch", "onnxruntime"))
    read = {
        name: json.loads((work / f"{name}.json").read_text()) for name in STAGES if (work / f"{name}.json").is_file()
    }
    stages = {name: {key: value for key, value in values.items() if key != "asked"} for name, values in read.items()}
    files = {path.name: path.stat().st_size for path in sorted((bundle.path / record.folder).iterdir())}
    return {
        "schema": "accel-sdxl-real-size/1",
        "command": "python benchmarks/sdxl_real_size.py --work out/sdxl-real --json benchmarks/sdxl-512.json",
        "topology": bundle.manifest.topology,
        "parameters": record.parameters,
        "precision": bundle.manifest.precision,
        "size": args.size,
        "latent": list(found.shape),
        "files_bytes": files,
        "stages": stages,
        "fits_24_gib": all(values["peak_bytes"] < LIMIT for values in stages.values()),
        "parity": {
            "step_relative_l2": float(relative_l2(found, truth)),
            "step_max_abs": float(np.abs(found - truth).max()),
            "export": record.parity["relative_l2"],
            "limit": record.parity["limit"],
        },
        "cpu": machine().cpu,
        "threads": machine().threads,
        "versions": {name: version(name) for name in ("torch", "diffusers", "onnxruntime")},
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['topology']}, {result['parameters'] / 1e6:,.1f} M parameters, {result['precision']}, "
        f"{result['size']} px"
    )
    for name, size in result["files_bytes"].items():
        print(f"  {name:<20} {size / 1e9:8.3f} GB")
    for name, values in result["stages"].items():
        own = ", ".join(f"{key} {value:.1f}" for key, value in values.items() if key != "peak_bytes")
        print(f"  {name:<12} peak {values['peak_bytes'] / 2**30:6.2f} GiB   {own}")
    print(f"  relative L2 of the step from torch: {result['parity']['step_relative_l2']:.2e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for weights, bundle and results")
    parser.add_argument("--source", type=Path, help="pipeline folder to take instead of random weights")
    parser.add_argument("--topology", default="sdxl", help="sdxl, ssd-1b or vega (default: sdxl)")
    parser.add_argument("--precision", default="fp16", help="fp16 or fp32 (default: fp16)")
    parser.add_argument("--size", type=int, default=512, help="pixels (default: 512)")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--stage", choices=STAGES[2:], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        run = {"torch": run_torch, "onnxruntime": run_onnxruntime}[args.stage]
        out, seconds = run(args.source, Bundle.open(args.work / "bundle"), args.size)
        np.save(args.work / f"{args.stage}.npy", out)
        write_json(args.work / f"{args.stage}-seconds.json", seconds)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    asked = {name: str(getattr(args, name)) for name in ("source", "topology", "precision", "size")}
    for name in STAGES[bool(args.source) :]:
        done = args.work / f"{name}.json"
        if done.is_file() and json.loads(done.read_text())["asked"] != asked:
            raise SystemExit(f"{done} was made with other options\n  try: another --work, or rm -r {args.work}")
        if not done.is_file():
            print(f"{name} ...", flush=True)
            result, own = measured(stage(name, args)), args.work / f"{name}-seconds.json"
            write_json(done, result | (json.loads(own.read_text()) if own.is_file() else {}) | {"asked": asked})
    result = summary(args.work, args)
    show(result)
    if args.json:
        write_json(args.json, result)
    return int(not result["fits_24_gib"] or result["parity"]["step_relative_l2"] > result["parity"]["limit"])


if __name__ == "__main__":
    sys.exit(main())
