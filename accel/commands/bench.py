"""`accel bench`: measure engines against each other on one bundle."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..progress import progress
from .options import add_sampling, sampler_options

EXAMPLE = "accel bench my-bundle --engines eager,compile,openvino:bf16 --json bench.json --html bench.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..engines import ENGINES

    parser.set_defaults(wrong_use=parser.error)
    parser.add_argument("bundle", nargs="?", help="the bundle folder to measure")
    parser.add_argument("--from", dest="saved", metavar="FILE", help="show a saved --json result instead of measuring")
    parser.add_argument(
        "--engines",
        help=f"comma-separated variants, engine[:dtype][:device], such as eager:bf16 or onnxruntime:cuda; the engines "
        f"are {', '.join(reversed(ENGINES))} (default: the usual variants of all that can run here)",
    )
    parser.add_argument("--prompt", action="append", help="text of an image; repeatable (default: built-in ones)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: 0)")
    parser.add_argument("--batch", type=int, default=1, help="images per call (default: 1)")
    parser.add_argument("--height", type=int, help="pixels (default: the model's own size)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's own size)")
    add_sampling(parser)
    parser.add_argument(
        "--control", metavar="FILE", help="image for the bundle's T2I-Adapter or ControlNet (default: a built-in one)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="how often everything is timed (default: 10)")
    parser.add_argument("--seconds", type=float, help="stop after this many seconds, but not before five rounds")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory and load times")
    parser.add_argument("--json", metavar="FILE", help="write the result as one JSON document; - for stdout")
    parser.add_argument("--html", metavar="FILE", help="write the result as one web page, with the images")


def run(args: argparse.Namespace) -> int:
    from ..bench import check_schema, report, report_html
    from ..files import read_json, write_bytes, write_json

    if (args.bundle is None) == (args.saved is None):
        args.wrong_use("give a bundle, or --from FILE")
    for option, name in (("--json", args.json), ("--html", args.html)):
        _check_writable(option, name)
    if args.saved:
        document = check_schema(read_json(Path(args.saved), "the benchmark result"), args.saved)
        images, code = {}, 0
    else:
        document, images, code = _measure(args)
    if args.json == "-":
        print(json.dumps(document, indent=2))
    else:
        report.show(document)
        if args.json:
            write_json(Path(args.json), document)
    if args.html:
        write_bytes(Path(args.html), report_html.page(document, images).encode())
    return code


def _measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], int]:
    from .. import bench
    from ..bench.work import PROMPTS

    settings = bench.BenchSettings(
        prompts=tuple(args.prompt or PROMPTS),
        seed=args.seed,
        batch=args.batch,
        height=args.height,
        width=args.width,
        sampler=args.sampler,
        steps=args.steps,
        guidance=args.guidance,
        options=sampler_options(args),
        rounds=args.rounds,
        seconds=args.seconds,
        memory=not args.no_memory,
        control=args.control or "",
    )
    with progress() as report:
        variants = bench.chosen(args.engines)
        result = bench.measure(args.bundle, variants, settings, command=_command(args), progress=report)
    document = result.document.as_dict()
    for name in result.failed:
        reason = next(row["reason"] for row in document["rows"] if row["variant"] == name)
        print(f"error: {name} was named and could not be measured: {reason}", file=sys.stderr)
    if result.document.interrupted:
        print("interrupted; what was measured until then follows", file=sys.stderr)
        return document, dict(result.images), 130
    return document, dict(result.images), 1 if result.failed else 0


def _command(args: argparse.Namespace) -> str:
    """What was typed, to type it again elsewhere: names of folders and files only, no paths."""
    from ..sampling.constants import OPTIONS

    words = ["accel bench", Path(args.bundle).resolve().name]
    named = ("engines", "seed", "batch", "height", "width", "sampler", "steps", "guidance", "rounds", "seconds")
    for name in (*named, *OPTIONS):
        value = getattr(args, name)
        if value not in (None, {"seed": 0, "batch": 1, "rounds": 10}.get(name)):
            words.append(f"--{name.replace('_', '-')} {value}")
    words += [f"--prompt {json.dumps(prompt)}" for prompt in args.prompt or ()]
    words += [f"--control {Path(args.control).name}"] if args.control else []
    return " ".join(words + ["--no-memory"] * args.no_memory)


def _check_writable(option: str, name: str | None) -> None:
    """Before minutes of measuring, not after."""
    if name is None or name == "-":
        return
    path = Path(name)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{option} {name}: cannot write a file there", "name a file in a folder that exists")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{option} {name}: no permission to write there", "name a file in a folder you may write to")
