"""The whole story on the model that ships with the package, in about a minute, offline."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..errors import UserError
from .options import stages

EXAMPLE = "accel demo --out out/demo"

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GAIN = 50.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="accel-demo", help="folder to write (default: accel-demo)")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that an earlier demo made")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls per engine (default: 5)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from accel.export.pipeline import COMPONENTS, export_pipeline

    from .. import bench, report
    from ..engines import status
    from ..files import write_json
    from ..pipeline import load

    started = time.perf_counter()
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", "choose another --out")
    if out.exists() and not args.overwrite and any(out.iterdir()):
        raise UserError(f"{out} exists already", "add --overwrite, or choose another --out")
    engines = [name for name in ("eager", "onnxruntime", "openvino") if status(name).ok]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("export: starting", total=1.0)
        bundle = export_pipeline(
            "digits", out / "bundle", profile="digits", overwrite=args.overwrite,
            components=tuple(name for name in COMPONENTS if name != "vae_encoder"),
            progress=stages(bar, task, "export: "),
        )  # fmt: skip
        task = bar.add_task("bench: starting", total=1.0)
        result = bench.measure(
            bundle,
            [bench.parse(name) for name in engines],
            bench.Settings(prompts=("a handwritten seven",), rounds=args.rounds, memory=False),
            command=f"accel demo --rounds {args.rounds}",
            progress=stages(bar, task, "bench: "),
        )
        task = bar.add_task("pictures", total=len(engines))
        pictures = {}
        for name in engines:
            images = load(bundle, engine=name)([f"a handwritten {word}" for word in WORDS], output_type="np").images
            pictures[name] = (images * 255).round().astype("uint8")
            bar.advance(task)
    document = result.document.as_dict()
    write_json(out / "demo.json", document)
    (out / "demo.html").write_text(report.html(document, result.images))
    _sheet(pictures).save(out / "demo.png")
    report.show(document)
    print(
        f"{out / 'demo.png'}: ten digits from every engine, and their differences {GAIN:g} times brighter\n"
        f"{out / 'demo.html'}: the table as a page; {out / 'demo.json'}: for machines\n"
        f'{bundle.path}: the bundle; try: accel run {bundle.path} --prompt "a handwritten seven"\n'
        f"{time.perf_counter() - started:.0f} s in all"
    )
    return 130 if result.document.interrupted else 1 if result.failed else 0


def _sheet(images):
    """Every engine's pictures, then how each differs from eager."""
    import numpy as np

    from ..sheet import contact_sheet

    rows, gain = dict(images), {}
    for name, own in images.items():
        if name != "eager" and "eager" in images:
            difference = np.abs(own.astype(float) - images["eager"].astype(float)) * GAIN
            rows[f"|{name} - eager|"] = difference.clip(0, 255).astype(np.uint8)
            gain[f"|{name} - eager|"] = GAIN
    return contact_sheet(rows, WORDS, gain=gain)
