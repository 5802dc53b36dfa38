"""The whole story on the models that ship with the package, in about a minute, offline."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from .options import stages

EXAMPLE = "accel demo --out out/demo"

MODELS = ("digits/4step", "digits/1step")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GAIN = 50.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="accel-demo", help="folder to write (default: accel-demo)")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that an earlier demo made")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls per engine (default: 5)")
    parser.add_argument(
        "--model",
        nargs="+",
        default=MODELS,
        dest="models",
        metavar="MODEL",
        help=f"digits models to show: `digits` is the teacher in 25 steps (default: {' '.join(MODELS)})",
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ..bench import report
    from ..engines import status

    started = time.perf_counter()
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", "choose another --out")
    if out.exists() and not args.overwrite and any(out.iterdir()):
        raise UserError(f"{out} exists already", "add --overwrite, or choose another --out")
    names = {model.rstrip("/").rpartition("/")[2]: model for model in args.models}
    if len(names) < len(args.models):
        raise UserError(f"two models of one name: {' '.join(args.models)}", "give each once")
    engines = [name for name in ("eager", "onnxruntime", "openvino") if status(name).ok]
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn())
    results, images = {}, {}
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for name, model in names.items():
            results[name] = _measure(model, out / name, engines, args, bar)
            if results[name].document.interrupted:
                break
            images[name] = _images(out / name, engines)
    for result in results.values():
        report.show(result.document.as_dict())
    if images:
        _sheet(images).save(out / "demo.png")
        print(f"{out / 'demo.png'}: ten digits from every engine, and their differences {GAIN:g} times brighter")
    for name in results:
        print(f"{out / name}: the bundle, {name}.html: its table as a page, {name}.json: for machines")
    print(f'try: accel run {out / name} --prompt "a handwritten seven"\n{time.perf_counter() - started:.0f} s in all')
    if any(result.document.interrupted for result in results.values()):
        return 130
    return 1 if any(result.failed for result in results.values()) else 0


def _measure(model: str, folder: Path, engines: list[str], args: argparse.Namespace, bar: Any) -> Any:
    """Export a model into `folder` and time it on every engine; its table and page are written beside the folder."""
    from accel.export.pipeline import COMPONENTS, export_pipeline

    from .. import bench
    from ..bench import report_html
    from ..files import write_json

    task = bar.add_task(f"{folder.name}, export: starting", total=1.0)
    bundle = export_pipeline(
        model,
        folder,
        profile="digits",
        overwrite=args.overwrite,
        components=tuple(name for name in COMPONENTS if name != "vae_encoder"),
        progress=stages(bar, task, f"{folder.name}, export: "),
    )
    task = bar.add_task(f"{folder.name}, bench: starting", total=1.0)
    result = bench.measure(
        bundle,
        [bench.parse(name) for name in engines],
        bench.BenchSettings(prompts=("a handwritten seven",), rounds=args.rounds, memory=False),
        command=f"accel demo --model {model} --rounds {args.rounds}",
        progress=stages(bar, task, f"{folder.name}, bench: "),
    )
    document = result.document.as_dict()
    write_json(folder.parent / f"{folder.name}.json", document)
    (folder.parent / f"{folder.name}.html").write_text(report_html.page(document, result.images))
    return result


def _images(folder: Path, engines: list[str]) -> dict[str, Any]:
    """Ten digits of each engine, uint8 [10, H, W, 3]."""
    from ..pipeline import load

    prompts = [f"a handwritten {word}" for word in WORDS]
    drawn = {name: load(folder, engine=name)(prompts, output_type="np").images for name in engines}
    return {name: (images * 255).round().astype("uint8") for name, images in drawn.items()}


def _sheet(models: dict[str, dict[str, Any]]) -> Any:
    """Of each model every engine's images, then how each differs from eager."""
    import numpy as np

    from ..sheet import contact_sheet

    rows, gain = {}, {}
    for model, drawn in models.items():
        rows |= {f"{model}, {name}": images for name, images in drawn.items()}
        for name, own in drawn.items():
            if name != "eager" and "eager" in drawn:
                label = f"{model}, |{name} - eager|"
                difference = np.abs(own.astype(float) - drawn["eager"].astype(float)) * GAIN
                rows[label] = difference.clip(0, 255).astype(np.uint8)
                gain[label] = GAIN
    return contact_sheet(rows, WORDS, gain=gain)
