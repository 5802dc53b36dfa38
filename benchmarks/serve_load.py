"""What step batching gives a server: the same load over HTTP with it and without it, and what the simulator predicts.

    python benchmarks/serve_load.py digits/4step-int8 --engine onnxruntime --threads 1 --out benchmarks/serve-load.json

    python benchmarks/random_pipeline.py sd15-tiny out/sd15-tiny-random
    accel export out/sd15-tiny-random out/sd15-tiny-256 --precision fp32 --profile sd-256
    python benchmarks/serve_load.py out/sd15-tiny-256 --name "SD-Tiny at 256 px, random weights" --few 4 --many 8 \
      --requests 20 --threads 2 --out benchmarks/serve-load-sd-tiny.json

The load: 200 requests of one image, four fifths with the bundle's own few steps (or `--few` of them), one fifth with 25
steps of dpmpp_2m (or `--many`) and guidance, in one order drawn at random. First all at once, which shows the
throughput; then at random times, at a share of that rate, which shows latencies. The simulator gets the times of UNet
calls that were measured before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import socket
import sys
import textwrap
import threading
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import uvicorn
from pages import put

from accel.loading.loader import opened
from accel.machine import machine_name
from accel.pipeline.denoise import predict
from accel.serving.app import create
from accel.serving.job import jobs_of
from accel.serving.limits import Limits
from accel.serving.metrics import Metrics
from accel.serving.models import Settings, open_worker
from accel.serving.simulate import Load, Times, simulate
from accel.serving.worker import Worker

ROOT = Path(__file__).parents[1]
SHARE = 0.2  # of the requests with many steps
ROUNDS = 7


class Counting(Metrics):
    """Keeps the sizes of all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def step(self, model: str, rows: int, seconds: float) -> None:
        super().step(model, rows, seconds)
        self.sizes.append(rows)


def worker_of(args: argparse.Namespace, share: bool, metrics: Metrics, limits: Limits) -> Worker:
    options = {"threads": args.threads, "safety_checker": False}
    how = dict(engine=args.engine, options=options, batch=args.batch, share=share, limits=limits)
    return open_worker(Settings(name="model", model=args.model, **how), metrics)


def measured(args: argparse.Namespace) -> tuple[dict[int, float], float]:
    """Seconds of a UNet call by its rows (median of interleaved rounds), and of text and decoder for an image."""
    worker = worker_of(args, True, Metrics(), Limits())
    few = {"steps": args.few, "sampler": "dpmpp_2m", "guidance_scale": 1.0} if args.few else {}
    order = worker.order({"prompt": args.prompt, "seed": 0} | few, lambda event: None)
    job = jobs_of(worker.pipeline, order)[0].prepared()
    unet, run = worker.pipeline.engines["unet"], job.run
    sizes = [rows for rows in (1, 2, 3, 4, 6, 8, 12, 16) if worker.shapes.least <= rows <= worker.shapes.most]
    found: dict[int, list[float]] = {rows: [] for rows in sizes}
    for _ in range(ROUNDS + 1):
        for rows in sizes:
            started = time.perf_counter()
            predict(unet, [job.part] * rows)
            found[rows].append(time.perf_counter() - started)
    others = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        order.texts = None
        ready = jobs_of(worker.pipeline, order)[0].prepared()
        run.decode(ready.latents)
        others.append(time.perf_counter() - started)
    worker.close(5)
    steps = {rows: round(median(times[1:]), 5) for rows, times in found.items()}
    return {1: steps[min(steps)], **steps}, round(median(others), 5)


def requests_of(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """The bodies, and of each its steps and the rows of one."""
    own = opened(args.model).manifest.sampler
    steps = args.few or (len(own["timesteps"]) if own.get("timesteps") else own["steps"])
    few = {"num_inference_steps": args.few, "sampler": "dpmpp_2m", "guidance_scale": 1.0} if args.few else {}
    many = {"num_inference_steps": args.many, "sampler": "dpmpp_2m", "guidance_scale": 2.0}
    order = random.Random(args.seed)
    long = [order.random() < SHARE for _ in range(args.requests)]
    bodies = [{"prompt": args.prompt, "seed": i} | (many if one else few) for i, one in enumerate(long)]
    return bodies, [(args.many, 2) if one else (steps, 1) for one in long]


def served(args: argparse.Namespace, share: bool, bodies: list[dict[str, Any]], at: list[float]) -> dict[str, Any]:
    """Run the load over HTTP."""
    metrics, limits = Counting(), Limits(queue=len(bodies))
    worker = worker_of(args, share, metrics, limits)
    server = uvicorn.Server(uvicorn.Config(create([worker], metrics, limits=limits), log_level="error"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        result = asyncio.run(_load(url, bodies, at))
        server.should_exit = True
        thread.join()
    result["batch"] = round(float(np.mean(metrics.sizes)), 2) if metrics.sizes else None
    result["calls"] = len(metrics.sizes) or None
    return result


async def _load(url: str, bodies: list[dict[str, Any]], at: list[float]) -> dict[str, Any]:
    latencies = []
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=httpx.Limits(max_connections=None)) as client:
        await client.post("/v1/images/generations", json=bodies[0])  # the first call is slower
        began = time.perf_counter()

        async def one(body: dict[str, Any], start: float) -> None:
            await asyncio.sleep(max(0.0, start - (time.perf_counter() - began)))
            sent = time.perf_counter()
            answer = await client.post("/v1/images/generations", json=body)
            assert answer.status_code == 200, answer.text
            latencies.append(time.perf_counter() - sent)

        await asyncio.gather(*(one(body, start) for body, start in zip(bodies, at, strict=True)))
        seconds = time.perf_counter() - began
    p50, p99 = np.percentile(latencies, [50, 99])
    rate = len(bodies) / seconds
    return {
        "seconds": round(seconds, 2),
        "rate": round(rate, 3),
        "p50": round(float(p50), 3),
        "p99": round(float(p99), 3),
    }


def tables() -> str:
    """The tables of docs/serving.md, of every record that is there."""
    made = []
    for path in (ROOT / "benchmarks" / name for name in ("serve-load.json", "serve-load-sd-tiny.json")):
        if path.exists():
            made.append(_table(json.loads(path.read_text())))
    return "\n\n".join(made)


def _table(record: dict[str, Any]) -> str:
    columns = "| load | server | images/s | p50 s | p99 s | rows a call | simulated: images/s | p50 s | p99 s |"
    lines = [columns, "|---" * 9 + "|"]
    for load, servers in record["loads"].items():
        for server, found in servers.items():
            real, guess = found["measured"], found["simulated"]
            rows = f"{real['batch']:.2f}" if real["batch"] else "1 or 2"
            cells = [load, server, f"{real['rate']:.2f}", f"{real['p50']:.3f}", f"{real['p99']:.2f}", rows]
            cells += [f"{guess['rate']:.2f}", f"{guess['p50']:.3f}", f"{guess['p99']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    mix = ", ".join(f"{100 * one['share']:.0f} % of {one['steps']} steps" for one in record["mix"])
    busy = f"load average {record['load_average']:.1f} before it began"
    threads = f"{record['threads']} {'thread' if record['threads'] == 1 else 'threads'}"
    about = (
        f"{record['requests']} requests of {record['model']} over HTTP, {mix} (the longer ones with guidance); "
        f"{record['engine']}, {threads}, {record['machine']}, {busy}; "
        f"`{record['command']}`."
    )
    wrapped = textwrap.wrap(about, 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, "", *wrapped])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="left out, the tables of docs/serving.md are written")
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="rows of the largest UNet call (default: 8)")
    parser.add_argument("--name", help="of the model, in the record (default: as it was given)")
    parser.add_argument("--few", type=int, metavar="STEPS", help="of the short requests (default: the bundle's own)")
    parser.add_argument("--many", type=int, metavar="STEPS", default=25, help="of the long requests (default: 25)")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--share-of-rate", type=float, default=0.7, help="of the throughput, for the second load")
    parser.add_argument("--prompt", default="a handwritten seven")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.model is None:
        put(ROOT / "docs/serving.md", "load", tables())
        return
    loaded = os.getloadavg()[0]
    steps, image = measured(args)
    print("UNet calls", steps, "text and decoder", image)
    bodies, kinds = requests_of(args)
    few = min(kind[0] for kind in kinds if kind[1] == 1)
    burst = [0.0] * len(bodies)
    loads: dict[str, Any] = {}
    results = {"all at once": {share: served(args, share, bodies, burst) for share in (True, False)}}
    rate = args.share_of_rate * results["all at once"][True]["rate"]
    spread = Load.poisson(rate, len(bodies), {(few, 1): 1}, args.seed).arrived
    spread = [moment - spread[0] for moment in spread]
    results[f"{rate:.1f} a second"] = {share: served(args, share, bodies, spread) for share in (True, False)}
    for (name, found), at in zip(results.items(), (burst, spread), strict=True):
        load_ = Load(at, [steps_ for steps_, _ in kinds], [rows for _, rows in kinds])
        loads[name] = {}
        for share, result in found.items():
            predicted = simulate(load_, Times(steps, image), rows=args.batch, share=share)
            shown = {key: round(value, 3) for key, value in asdict(predicted).items()}
            loads[name]["step batching" if share else "one by one"] = {"measured": result, "simulated": shown}
            print(f"{name}, {'step batching' if share else 'one by one'}: {result}\n    simulated {shown}")
    record = {
        "schema": "accel-serve-load/1",
        "model": args.name or args.model,
        "engine": args.engine,
        "threads": args.threads,
    }
    record |= {"machine": machine_name(), "load_average": round(loaded, 2), "requests": len(bodies)}
    record |= {"command": shlex.join(["python", "benchmarks/serve_load.py", *sys.argv[1:]])}
    record |= {"batch": args.batch, "step_seconds": steps, "image_seconds": image}
    record["mix"] = [{"steps": s, "rows": r, "share": kinds.count((s, r)) / len(kinds)} for s, r in sorted(set(kinds))]
    record["loads"] = loads
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
