"""How TensorRT-RTX fuses our graphs: kernels and float32 islands of each network, by the builder's own list of layers.

    python benchmarks/tensorrt_rtx_layers.py --write                      # all rows; or --rows sd-tiny,vae

Networks at real size with random weights, two images (guidance) of 512 px, one target, on a CPU: as exported
("before"), and in the forms of `accel.export.tensorrt.forms` ("now"). A kernel counts when it writes activations; an
island is a group of kernels that hand float32 tensors to each other. Nothing is run: fewer kernels and fewer bytes
between them are what can be known without a card. `--write` puts the rows into
`tensorrt-rtx-layers.json`, and the table into `docs/tensorrt-rtx.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pages
import tensorrt_rtx_matrix as matrix

ROOT = Path(__file__).parents[1]
SAVED, PAGE = Path(__file__).with_suffix("").with_name("tensorrt-rtx-layers.json"), ROOT / "docs" / "tensorrt-rtx.md"
NETWORKS = {"sd-tiny": "sd-tiny", "sd15": "sd15", "sdxl": "sdxl", "vae": "vae decoder"}  # name -> row of the matrix
FORMS = ("before", "now")


@dataclass(frozen=True)
class Variant:
    """A way to export a network.

    Attributes:
        level: of the layers in int8, the rest in float16; "" for all in float16.
    """

    level: str = ""
    opset: int = 20


VARIANTS = {
    "fp16": Variant(),
    "fp16, opset 23": Variant(opset=23),
    "int8-fp16": Variant("all"),
    "int8-fp16, level attention": Variant("attention"),
}
ROWS = [
    *((name, variant) for name in ("sd-tiny", "sd15", "sdxl") for variant in VARIANTS),
    *(("vae", variant) for variant in list(VARIANTS)[:3]),
]


def measure(name: str, variant: str) -> list[dict[str, Any]]:
    """Trace a network and build it in both forms; its kernels."""
    import onnx

    from accel.bundle.shape_profiles import Profile, Range
    from accel.export.tensorrt import audit, child, kernels, shapes
    from accel.export.tensorrt.compiler import Job
    from accel.export.tensorrt.options import BuildOptions
    from accel.trt.flavours import RTX

    own = VARIANTS[variant]
    row = next(row for row in matrix.ROWS if row.name == NETWORKS[name])
    row = replace(row, int8=own.level, opset=own.opset)
    side = Range(row.size, row.size, row.size)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path, component, _ = matrix.traced(row, False, Profile("layers", Range(2, 2, 2), side, side), Path(folder))
        described = {"name": "layers", "dims": {}, "shapes": shapes.shapes_of(component, component.dims)}
        nodes = audit.of_graph(onnx.load(str(path), load_external_data=False))
        for form, forms in zip(FORMS, ([], list(RTX.forms)), strict=True):
            job = Job(RTX.engine, name, str(path), [described], asdict(BuildOptions()), ["sm89"], forms=forms)
            done = child.compile_apart(job, lambda *_: None)
            counts = audit.audit(done.layers, nodes)
            assert not counts["wider"], counts["wider"]
            rows.append(
                {
                    "network": name,
                    "variant": variant,
                    "form": form,
                    **asdict(kernels.count(done.layers)),
                    "heavy": counts["heavy"],
                    **({"int8_share": counts["int8_share"]} if "int8_share" in counts else {}),
                    "activations": done.activations,
                    "engine": len(done.data),
                    "warnings": done.warnings[:5],
                    "cpu_seconds": done.cpu_seconds,
                    "host": done.peak_memory,
                }
            )
    return rows


def table(rows: list[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown: `before → now`, or one figure where both are the same."""
    lines = [
        "| network | | kernels | attentions in one kernel | float32 islands | MB in them | activations | work in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {(row["network"], row["variant"], row["form"]): row for row in rows}
    for name, variant in ROWS:
        if (name, variant, "now") not in found:
            continue
        pair = [found[name, variant, form] for form in FORMS]

        def cell(key: str, scale: float = 1, pair: list[Mapping[str, Any]] = pair) -> str:
            return " → ".join(dict.fromkeys(f"{row[key] / scale:,.0f}" for row in pair))

        work = ", ".join(f"{count} {kind}" for kind, count in pair[1]["heavy"].items())
        lines.append(
            f"| {name} | {variant} | {cell('kernels')} | {cell('attentions')} | {cell('islands')} "
            f"| {cell('float32_bytes', 1e6)} | {cell('activations', 1e6)} MB | {work} |"
        )
    return "\n".join(lines)


def write(found: list[dict[str, Any]]) -> None:
    """Keep the rows, those of earlier runs too, and put the table into the page."""
    saved = json.loads(SAVED.read_text())["rows"] if SAVED.exists() else []
    rows = {(row["network"], row["variant"], row["form"]): row for row in (*saved, *found)}
    document = {
        "command": "python benchmarks/tensorrt_rtx_layers.py --write",
        "library": matrix.version(),
        "target": "sm89",
        "shapes": "two images of 512 px (SDXL 1024), fixed",
        "rows": list(rows.values()),
    }
    SAVED.write_text(json.dumps(document, indent=1) + "\n")
    pages.put(PAGE, "tensorrt-rtx-layers", table(document["rows"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="networks with commas between them (default: all)")
    parser.add_argument("--variants", help="of them, with semicolons between them (default: all)")
    parser.add_argument("--memory", type=float, default=24.0, metavar="GB", help="leave out what needs more (24)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/tensorrt-rtx-layers.json and the page")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a row in this process, as JSON on the last line
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    wanted = args.rows.split(",") if args.rows else list(NETWORKS)
    variants = args.variants.split(";") if args.variants else list(VARIANTS)
    found = []
    for name, variant in ((name, variant) for name, variant in ROWS if name in wanted and variant in variants):
        needs = 4 * next(row.gigabytes for row in matrix.ROWS if row.name == NETWORKS[name])
        if needs > args.memory:
            print(f"{name}, {variant}: left out, needs about {needs:.0f} GB")
            continue
        done = subprocess.run([sys.executable, __file__, "--one", name, variant], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{name}, {variant}: failed")
        pair = json.loads(done.stdout.strip().splitlines()[-1])
        found += pair
        for row in pair:
            print({key: row[key] for key in ("network", "variant", "form", "kernels", "islands")}, flush=True)
        if args.write:
            write(found)


if __name__ == "__main__":
    main()
