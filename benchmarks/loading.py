"""Loading one network of a bundle: the first time on a machine, the next time, and in two processes at once.

    python benchmarks/loading.py out/peers/ours/fp32 --write      # loading.json, and a table of docs/performance.md

Each load is in a process of its own; the cache is an empty one of the script's. CPU seconds are counted beside the
clock's: other work on the machine does not make them grow. Memory is what Linux says of a process after one call: `pss`
counts a page that n processes share as 1/n of it, `uss` not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENGINES = ("onnxruntime", "openvino")
LOAD = """
import json, sys, time
import accel
from accel.engines.base import noise_for
bundle, component, engine = sys.argv[1:]
opened = accel.Bundle.open(bundle)
began, used = time.perf_counter(), time.process_time()
loaded = accel.load_engine(opened, component, engine)
row = {"load_s": time.perf_counter() - began, "load_cpu_s": time.process_time() - used}
feeds = noise_for(loaded.component, {name: limits.min for name, limits in loaded.component.dims.items()})
began = time.perf_counter()
loaded.run(feeds)
row["first_call_s"] = time.perf_counter() - began
print(json.dumps(row), flush=True)
for line in sys.stdin:
    with open("/proc/self/smaps_rollup") as file:
        pages = dict(line.split(":", 1) for line in file.read().splitlines()[1:])
    kib = {name: int(pages[name].split()[0]) for name in pages if pages[name].endswith("kB")}
    own = kib["Private_Clean"] + kib["Private_Dirty"]
    print(json.dumps({"pss": 1024 * kib["Pss"], "uss": 1024 * own}), flush=True)
"""


class Loaded:
    """A network in a process that holds it until `close`."""

    def __init__(self, bundle: Path, component: str, engine: str, cache: str):
        environment = os.environ | {"ACCEL_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", "-c", LOAD, str(bundle), component, engine]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.row = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a load ended with {self.process.wait()}")
        return json.loads(line)

    def memory(self) -> dict[str, int]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measured(bundle: Path, component: str, engine: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        once = Loaded(bundle, component, engine, cache)
        first = once.row | once.memory()
        once.close()
        pair = [Loaded(bundle, component, engine, cache) for _ in range(2)]
        shared = [one.memory() for one in pair]
        for one in pair:
            one.close()
        kept = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
    return {"first": first, "again": pair[0].row, "two_at_once": shared, "kept_bytes": kept}


def table(document: dict[str, Any]) -> str:
    lines = [
        f"| {document['component']} | first, CPU s | next, CPU s | memory alone, GB | each of two, GB | kept, GB |",
        "|---|---|---|---|---|---|",
    ]
    for engine, row in document["rows"].items():
        cells = [f"{row[when]['load_cpu_s']:.1f}" for when in ("first", "again")]
        two = [one["pss"] for one in row["two_at_once"]]
        cells += [f"{value / 1e9:.2f}" for value in (row["first"]["uss"], sum(two) / len(two), row["kept_bytes"])]
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    packages = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    return "\n".join([*lines, "", f"{document['machine']}; {packages}. `{document['command']}`"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--component", default="unet")
    parser.add_argument("--write", action="store_true", help="write the JSON, and the table of docs/performance.md")
    args = parser.parse_args()

    from accel.machine import machine_name, version_of

    document = {
        "command": f"python benchmarks/loading.py {args.bundle} --component {args.component} --write",
        "machine": machine_name(),
        "component": args.component,
        "bytes": sum(path.stat().st_size for path in (args.bundle / args.component).iterdir()),
        "versions": {name: version_of(name) for name in ENGINES},
        "rows": {engine: measured(args.bundle, args.component, engine) for engine in ENGINES},
    }
    print(table(document))
    if args.write:
        import pages

        (HERE / "loading.json").write_text(json.dumps(document, indent=1) + "\n")
        pages.put(HERE.parent / "docs" / "performance.md", "loading", table(document))


if __name__ == "__main__":
    main()
