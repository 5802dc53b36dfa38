"""Evaluate a model's images by a named protocol."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..command_line.options import add_engine, add_sampling, engine_of
from ..command_line.parser import one_of, renamed
from ..progress import progress

EXAMPLE = "accel evaluate digits --protocol digits --out out/digits-quality"

PROTOCOL_NAMES = ("digits", "emoji", "bk-sdm-coco30k", "dmd2-sd15-coco30k", "dmd2-sdxl-coco10k", "imagenet64")


def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a diffusers pipeline folder, a hub id, a shipped model, a bundle; an EDM model"
    )
    text = f"{', '.join(PROTOCOL_NAMES)} (default: digits)"
    parser.add_argument(
        "--protocol", default="digits", type=one_of("protocol", PROTOCOL_NAMES), metavar="NAME", help=text
    )
    text = "folder of the images and the result; an interrupted run continues there"
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help=text)
    parser.add_argument("--overwrite", action="store_true", help="start again, without the images that are there")
    add_sampling(parser, whose="the protocol's", options=False)
    parser.add_argument("--images", type=int, metavar="N", help="evaluate only the first N images of the protocol")
    renamed(parser, "--limit", "--images")
    text = "images per call (default: the protocol's); changes only the speed"
    parser.add_argument("--batch", type=int, metavar="N", help=text)
    text = (
        "folder of real images, or an .npz of their statistics, where the protocol needs them; for emoji, the judge's"
    )
    parser.add_argument("--reference", metavar="PATH", help=text)
    text = "file of captions (.csv, .jsonl or .txt), for protocols that need them"
    parser.add_argument("--captions", metavar="FILE", help=text)
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds that rank 0 waits for the next image of another process (default: 600)",
    )
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    from accel.distill.evaluation.evaluate import evaluate
    from accel.distill.evaluation.work_share import shard_of

    shard = shard_of(os.environ)
    engine, options = engine_of(args)
    if args.overwrite and shard.rank == 0:
        _clear(Path(args.out))
    with progress() as report:
        result = evaluate(
            args.model,
            args.protocol,
            args.out,
            sampler=args.sampler,
            steps=args.steps,
            guidance=args.guidance,
            limit=args.images,
            batch=args.batch,
            reference=args.reference,
            captions=args.captions,
            engine=engine,
            options=options,
            shard=shard,
            patience=args.patience,
            progress=report,
        )
    if result is None:
        done = {"rank": shard.rank, "processes": shard.world, "out": args.out}
        print(json.dumps(done) if args.json else f"rank {shard.rank} of {shard.world}: its images are done")
    elif args.json:
        print(json.dumps(result, indent=2))
    else:
        _show(result, args.out)
    return 0


def _clear(out: Path) -> None:
    """Delete what an evaluation wrote; nothing in a folder that is not one of those."""
    from accel.distill.evaluation.work_share import IMAGES, RUN

    if not (out / RUN).is_file():
        return
    shutil.rmtree(out / IMAGES, ignore_errors=True)
    for file in [out / RUN, *out.glob("result*.json")]:
        file.unlink(missing_ok=True)


def _show(result: dict[str, Any], out: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column, justify in (("metric", "left"), ("figure", "right"), ("protocol", "left")):
        # The id is what makes a figure mean something: it may wrap, but nothing of it may be cut off.
        table.add_column(column, justify=justify, overflow="fold")
    for figure in result["figures"]:
        note = f" (floor {figure['floor']:.4g})" if "floor" in figure else ""
        note += f" ± {figure['deviation']:.2g}" if "deviation" in figure else ""
        note += f" (real drawings {100 * figure['real']:.4g} %)" if "real" in figure else ""
        # Text and not markup: the brackets of an id would be taken for a style.
        value = f"{100 * figure['value']:.4g} %" if "accuracy" in figure["name"] else f"{figure['value']:.4g}"
        table.add_row(_text(figure["name"]), _text(value + note), _text(figure["protocol"]))
    # A pipe has no width; 80 columns would fold the ids that somebody wants to search for.
    console = Console() if Console().is_terminal else Console(width=160)
    part = f", of which the first {result['images']} images" if "images=" in result["protocol"] else ""
    print(f"{result['model']['name']}: {result['title']}{part}")
    console.print(table)
    if part and any(figure["name"].startswith(("FID", "Frechet")) for figure in result["figures"]):
        print(f"not comparable with figures of all images: a distance of {result['images']} is larger")
    sampling = result["sampling"]
    steps = sampling["steps"] or f"timesteps {', '.join(f'{t:g}' for t in sampling['timesteps'])}"
    seconds = result["seconds"]
    print(
        f"{result['images']} images, {sampling['sampler']}, steps {steps}, guidance {sampling['guidance']:g}, "
        f"{sampling['dtype']}; {result['pictures_made']} of them made now in {seconds['pictures']:.1f} s, "
        f"measured in {seconds['metrics']:.1f} s\n"
        f"images and result: {out}"
    )


def _text(value: str) -> Any:
    from rich.text import Text

    return Text(value)
