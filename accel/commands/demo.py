"""`accel demo`: export, measure and compare the models that ship with the package, offline, in about a minute."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any

from ..command_line.options import add_out
from ..errors import UserError
from ..progress import progress

EXAMPLE = "accel demo --out out/demo"

MODELS = ("digits/4step", "digits/1step")
WEB_MODEL = "digits/1step-int8"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEED = 40  # of the first forty-odd, the one whose ten digits the classifier reads most surely in four steps and in one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser, "folder to write (default: accel-demo)", default="accel-demo", metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed calls per engine (default: 5)")
    parser.add_argument("--no-open", action="store_true", help="do not open the page in a browser when it is ready")
    parser.add_argument(
        "--model",
        nargs="+",
        default=None,
        dest="models",
        metavar="MODEL",
        help=f"models to show; `digits` is the teacher, in 25 steps (default: {' '.join(MODELS)}; "
        f"with --web {WEB_MODEL})",
    )
    parser.add_argument(
        "--web",
        action="store_true",
        help="one model in the browser instead: write a page that draws where it is shown, and serve it",
    )
    text = "with --web: where to serve; 0 takes a free one (default: 8000)"
    parser.add_argument("--port", type=int, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    if args.port is not None and not args.web:
        raise UserError("--port is for --web", "add --web")
    return _web(args) if args.web else _demo(args)


def _demo(args: argparse.Namespace) -> int:
    from ..bench import report
    from ..bench.results import verdict
    from ..engines import ENGINES, facts, status
    from ..files import write_json

    started = time.perf_counter()
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", "choose another --out")
    if out.exists() and not args.overwrite and any(out.iterdir()):
        raise UserError(f"{out} exists already", "add --overwrite, or choose another --out")
    args.models = args.models or MODELS
    names = {model.rstrip("/").rpartition("/")[2]: model for model in args.models}
    if len(names) < len(args.models):
        raise UserError(f"two models of one name: {' '.join(args.models)}", "name each model once")
    from ..class_to_image import opened as opened_by_class

    for model in args.models:  # before the first one takes its minutes
        if (found := opened_by_class(model)) is not None:
            found.refuse_by_class()
    engines = [name for name in reversed(ENGINES) if facts(name).auto and status(name).ok]
    results: dict[str, Any] = {}
    images: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name, model in names.items():
        results[name] = _measure(model, out / name, engines, args)
        if results[name].document.interrupted:
            break
        images[name] = _images({engine: out / name for engine in engines})
        if int8 := _int8(model, engines):
            images[name] |= _images(int8)
            rows[name] = _int8_rows(out / name, int8, images[name], args.rounds)
    say = (lambda text: None) if args.json else print
    for document in (result.document.as_dict() for result in results.values()):
        if not args.json:
            report.show(document, heading=verdict.sentence(document))
    for name, found in rows.items():
        write_json(out / f"{name}-int8.json", found)
        for way, row in found.items():
            say(
                f"{name}, {way}: {1e3 * row['seconds']:.1f} ms an image, {row['speedup']:.2f}x eager, "
                f"{row['psnr']:.0f} dB from eager's images"
            )
    if args.json:
        documents = {name: result.document.as_dict() for name, result in results.items()}
        print(json.dumps(documents | {f"{name}-int8": found for name, found in rows.items()}, indent=2))
    if images:
        _comparison(images).save(out / "demo.png")
        say(f"{out / 'demo.png'}: ten digits from every engine, and how far they are from eager's")
    for name in results:
        say(f"{out / name}: the bundle; {name}.html: its table as a web page; {name}.json: the numbers")
    say(f'try: accel run {out / name} --prompt "a handwritten seven"\n{time.perf_counter() - started:.0f} s in all')
    if _may_open(args):
        webbrowser.open((out / f"{next(iter(results))}.html").absolute().as_uri())
    if any(result.document.interrupted for result in results.values()):
        return 130
    return 1 if any(result.failed for result in results.values()) else 0


def _web(args: argparse.Namespace) -> int:
    """Write the page with a model as one graph, and serve it until Ctrl-C."""
    from accel.export.single_graph.export import write
    from accel.export.single_graph.web import copy_page, server

    from ..bundle import Bundle
    from ..files import new_folder

    if len(args.models or ()) > 1:
        raise UserError(f"--web shows one model, not {len(args.models)}", "give one")
    bundle, out = Bundle.open((args.models or [WEB_MODEL])[0]), Path(args.out)
    with server(out, 8000 if args.port is None else args.port) as web:
        with progress("page", keep=True) as report, new_folder(out, overwrite=args.overwrite) as folder:
            copy_page(folder)
            write(bundle, folder / "graph", progress=report)
            for path in (folder / "graph").iterdir():
                path.rename(folder / path.name)
            (folder / "graph").rmdir()
        url = f"http://127.0.0.1:{web.server_port}/"
        print(
            json.dumps({"url": url, "folder": str(out)})
            if args.json
            else f"{url} draws in your browser; Ctrl-C ends it",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            web.serve_forever()
    return 0


def _may_open(args: argparse.Namespace) -> bool:
    """Whether somebody sits before this terminal and has a screen."""
    screen = sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(screen) and sys.stdout.isatty() and not (args.json or args.no_open)


def _measure(model: str, folder: Path, engines: list[str], args: argparse.Namespace) -> Any:
    """Export a model into `folder` and time it on every engine; its table and page are written beside the folder."""
    from accel.export.pipeline import COMPONENTS, export_pipeline

    from .. import bench
    from ..bench.page import page
    from ..files import write_json

    with progress(f"{folder.name}, export", keep=True) as report:
        bundle = export_pipeline(
            model,
            folder,
            profile="digits",
            overwrite=args.overwrite,
            components=tuple(name for name in COMPONENTS if name != "vae_encoder"),
            progress=report,
        )
    with progress(f"{folder.name}, bench ", keep=True) as report:
        result = bench.measure(
            bundle,
            [bench.parse(name) for name in engines],
            bench.BenchSettings(prompts=("a handwritten seven",), rounds=args.rounds, memory=False),
            command=f"accel demo --model {model} --rounds {args.rounds}",
            progress=report,
        )
    document = result.document.as_dict()
    write_json(folder.parent / f"{folder.name}.json", document)
    (folder.parent / f"{folder.name}.html").write_text(page(document, result.images))
    return result


def _images(pipelines: dict[str, Path]) -> dict[str, Any]:
    """Ten digits of each {engine, with what is said of it: bundle}, float32 [10, H, W, 3] in [0, 1]."""
    from ..pipeline import load

    prompts = [f"a handwritten {word}" for word in WORDS]
    return {
        way: load(folder, engine=way.split()[0])(prompts, seed=SEED, output_type="np").images
        for way, folder in pipelines.items()
    }


def _int8(model: str, engines: list[str]) -> dict[str, Path]:
    """{"onnxruntime int8": bundle} of a model whose int8 bundle ships, for the engines that compute in int8."""
    from ..assets import resolve
    from ..bundle import is_bundle
    from ..engines import facts

    folder = Path(resolve(f"{model}-int8"))
    return {f"{name} int8": folder for name in engines if "int8" in facts(name).formats} if is_bundle(folder) else {}


def _int8_rows(folder: Path, int8: dict[str, Path], images: dict[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of the whole image, how many times as fast as eager float32, and PSNR in dB of ten images."""
    from contextlib import ExitStack
    from functools import partial

    from ..bench import timing
    from ..parity import psnr
    from ..pipeline import load

    with ExitStack() as loaded:
        calls = {}
        for way, path in ({"eager": folder} | int8).items():
            pipe = loaded.enter_context(load(path, engine=way.split()[0]))
            calls[way] = partial(pipe, "a handwritten seven", output_type="np")
            calls[way]()
        median = timing.medians(calls, rounds=rounds, lead_in=True)
    return {
        way: {
            "seconds": median[way],
            "speedup": median["eager"] / median[way],
            "psnr": min(float(psnr(images[way], images["eager"], 1.0)), 100.0),
        }
        for way in int8
    }


def _comparison(models: dict[str, dict[str, Any]]) -> Any:
    """A contact sheet: of each model every engine's images, labelled with their largest difference from eager's."""
    from ..bench.contact_sheet import contact_sheet

    rows = {}
    for model, drawn in models.items():
        for name, own in drawn.items():
            label = f"{model}, {name}"
            if name != "eager" and "eager" in drawn:
                label += f", differs by {255 * abs(own - drawn['eager']).max():.3g} of 255"
            rows[label] = (own * 255).round().astype("uint8")
    return contact_sheet(rows, WORDS)
