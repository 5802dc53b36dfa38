"""Evaluate a model's images by a named protocol."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from ..progress import progress
from .options import add_engine, add_json, engine_options, sampler_names

EXAMPLE = "accel evaluate digits --protocol digits --out out/digits-quality"

PROTOCOL_NAMES = ("digits", "bk-sdm-coco30k", "dmd2-sd15-coco30k", "dmd2-sdxl-coco10k")


def add_arguments(parser: argparse.ArgumentParser) -> None:

    parser.add_argument("model", help="a diffusers pipeline folder, a hub id, digits, digits/NAME, or a bundle")
    parser.add_argument("--protocol", default="digits", help=f"{', '.join(PROTOCOL_NAMES)} (default: digits)")
    parser.add_argument(
        "--out", required=True, help="folder of the images and the result; an interrupted run continues there"
    )
    parser.add_argument("--sampler", help=f"{sampler_names()} (default: the protocol's)")
    parser.add_argument("--steps", type=int, help="number of steps (default: the protocol's)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 0 for none (default: the protocol's)")
    parser.add_argument("--limit", type=int, help="evaluate only the first LIMIT images")
    parser.add_argument("--batch", type=int, help="images per call (default: the protocol's); changes only the speed")
    parser.add_argument("--reference", help="folder of real images, for protocols that need them")
    parser.add_argument("--captions", help="file of captions (.csv, .jsonl or .txt), for protocols that need them")
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        help="seconds that rank 0 waits for the next image of another process (default: 600)",
    )
    add_engine(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from accel.distill.evaluation.evaluate import evaluate
    from accel.distill.evaluation.work_share import shard_of

    shard = shard_of(os.environ)
    with progress() as report:
        result = evaluate(
            args.model,
            args.protocol,
            args.out,
            sampler=args.sampler,
            steps=args.steps,
            guidance=args.guidance,
            limit=args.limit,
            batch=args.batch,
            reference=args.reference,
            captions=args.captions,
            engine=args.engine,
            options=engine_options(args),
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
        # Text and not markup: the brackets of an id would be taken for a style.
        table.add_row(_text(figure["name"]), _text(f"{figure['value']:.4g}{note}"), _text(figure["protocol"]))
    # A pipe has no width; 80 columns would fold the ids that somebody wants to search for.
    console = Console() if Console().is_terminal else Console(width=160)
    print(f"{result['model']['name']}: {result['title']}")
    console.print(table)
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
