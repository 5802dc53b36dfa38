"""`accel bench`: measure engines against each other on one bundle."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from .. import attention
from ..assets import DIGITS_PROMPTS, knows_only_digits
from ..command_line.options import (
    add_few_step,
    add_prompts,
    add_sampling,
    add_seed,
    add_size,
    prompts_of,
    sampler_options,
)
from ..command_line.parser import WrongUse, one_of, renamed
from ..errors import Notice, UserError
from ..progress import progress

EXAMPLE = "accel bench digits/4step --engine eager,compile --out bench.html"


def add_arguments(parser: Any) -> None:
    from ..engines import ENGINES

    parser.add_argument("bundle", nargs="?", metavar="MODEL", help="a bundle; or a pipeline folder or shipped model")
    parser.add_argument("--from", dest="saved", metavar="FILE", help="show a saved result instead of measuring")
    parser.add_argument(
        "--engine",
        metavar="NAMES",
        help="variants with commas between them, engine[:precision][:device], such as eager:bf16,onnxruntime:cuda; the "
        f"engines are {', '.join(reversed(ENGINES))} (default: the usual variants of all that can run here)",
    )
    renamed(parser, "--engines", "--engine")
    add_prompts(parser)
    add_seed(parser)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images per call (default: 1)")
    add_size(parser)
    add_sampling(parser, whose="the bundle's own")
    add_few_step(parser)
    parser.add_argument(
        "--control", metavar="FILE", help="image for the bundle's T2I-Adapter or ControlNet (default: a built-in one)"
    )
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="how often everything is timed (default: 10)"
    )
    text = "stop after this many seconds, but not before five rounds"
    group.add_argument("--seconds", type=float, metavar="S", help=text)
    group.add_argument("--threads", type=int, metavar="N", help="number of CPU threads of every engine")
    text = f"kernel of the attention layers on eager and compile: {', '.join(attention.NAMES)}"
    kind = one_of("attention", attention.NAMES)
    group.add_argument("--attention", type=kind, metavar="NAME", help=text)
    group.add_argument("--no-memory", action="store_true", help="do not measure memory and load times")
    group = parser.add_argument_group("predicting")
    text = "say what the engines will take in memory, from files and shapes: nothing is loaded, and nothing measured"
    group.add_argument("--memory-estimate", action="store_true", help=text)
    text = "with --memory-estimate: GB of a card, and which options make the model fit into it"
    group.add_argument("--device-memory", type=float, metavar="GB", help=text)
    group = parser.add_argument_group("result")
    group.add_argument("--full", action="store_true", help="print every column, not the short table")
    group.add_argument(
        "-o",
        "--out",
        action="append",
        default=[],
        metavar="FILE",
        help="write the result: one JSON document (.json) or one web page with the images (.html); repeatable",
    )
    group.add_argument("--overwrite", action="store_true", help="replace files that are already there")
    # Until 0.2 these took the files; --json without one is what it is in every verb.
    group.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print the result as one JSON document")
    group.add_argument("--html", metavar="FILE", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from ..bench import page, report
    from ..bench.results import saved, verdict
    from ..files import write_bytes, write_json

    if args.bundle is None and args.json not in (None, "-") and not args.json.endswith(".json"):
        args.bundle, args.json = args.json, "-"  # --json MODEL: the switch, and then the model
    if (args.bundle is None) == (args.saved is None):
        raise WrongUse("accel bench: give a model, or --from FILE", f"for example {EXAMPLE}")
    files = _files(args)
    if args.memory_estimate:
        return _estimate(args)
    if args.device_memory is not None:
        raise UserError("--device-memory is for a prediction", "add --memory-estimate")
    if args.saved:
        document, images, code = saved.read(args.saved), {}, 0
    else:
        document, images, code = _measure(args)
    if args.json == "-":
        print(json.dumps(document, indent=2))
    else:
        report.show(document, heading=verdict.sentence(document), full=args.full)
    for file in files:
        if file.suffix == ".json":
            write_json(file, document)
        else:
            write_bytes(file, page.page(document, images).encode())
    return code


def _estimate(args: argparse.Namespace) -> int:
    from .. import bench
    from ..bench.memory import report
    from ..bench.memory.estimate import Call
    from ..bundle.shape_profiles import native_sides
    from ..pipeline import opened

    if args.saved or args.out:
        raise UserError("--memory-estimate predicts, and measures nothing that could be shown or kept", "leave it out")
    if args.batch < 1:
        raise UserError(f"invalid batch: {args.batch} (expected an integer >= 1)", "--batch 1")
    bundle = opened(args.bundle, few_step=args.few_step, safety_checker=False)
    variants = [bench.parse(name) for name in args.engine.split(",")] if args.engine else report.usual(bundle)
    call = Call(args.batch, args.height, args.width)
    found = report.predicted(bundle, variants, call, args.device_memory)
    if args.json == "-":
        print(json.dumps(found, indent=2))
        return 0
    height, width = native_sides(bundle.manifest.pipeline["native_size"])
    size = f"{args.height or height} x {args.width or width} px"
    images = "1 image" if args.batch == 1 else f"{args.batch} images"
    print(report.text(f"{bundle.manifest.source['name']}, {images} of {size}", found))
    return 0


def _measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], int]:
    from .. import bench
    from ..bench.work import PROMPTS
    from ..pipeline import opened

    bundle = opened(args.bundle, few_step=args.few_step, safety_checker=False)
    usual = DIGITS_PROMPTS if knows_only_digits(str(bundle.manifest.source["name"])) else PROMPTS
    settings = bench.BenchSettings(
        prompts=tuple(prompts_of(args) or usual),
        seed=args.seed,
        batch=args.batch,
        height=args.height,
        width=args.width,
        sampler=args.sampler,
        options=sampler_options(args),
        steps=args.steps,
        guidance=args.guidance,
        rounds=args.rounds,
        seconds=args.seconds,
        memory=not args.no_memory,
        threads=args.threads,
        attention=args.attention,
        control=args.control or "",
    )
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # torch has no option for it, and is not imported yet
    with progress() as report:
        variants = bench.chosen(args.engine)
        result = bench.measure(bundle, variants, settings, command=_command(args), progress=report)
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
    named = "engine seed batch height width sampler steps guidance rounds seconds threads attention".split()
    for name in (*named, *OPTIONS):
        value = getattr(args, name)
        if value not in (None, {"seed": 0, "batch": 1, "rounds": 10}.get(name)):
            words.append(f"--{name.replace('_', '-')} {value}")
    words += [f"--prompt {json.dumps(prompt)}" for prompt in args.prompt or ()]
    words += [f"--prompt-file {Path(args.prompt_file).name}"] if args.prompt_file else []
    words += [f"--control {Path(args.control).name}"] if args.control else []
    return " ".join(words + ["--no-memory"] * args.no_memory)


def _files(args: argparse.Namespace) -> list[Path]:
    """The files to write, checked before minutes of measuring and not after.

    Raises:
        UserError: for a name of another kind, a file that is there, or a folder that cannot be written.
    """
    for old in ("json", "html"):
        if (name := getattr(args, old)) not in (None, "-"):
            warnings.warn(f"--{old} {name} is now --out {name}", Notice, stacklevel=2)
    files = [(Path(name), args.overwrite, (".json", ".html")) for name in args.out]
    files += [(Path(name), True, (Path(name).suffix,)) for name in (args.json, args.html) if name not in (None, "-")]
    for path, overwrite, suffixes in files:
        if path.suffix not in suffixes:
            raise UserError(f"--out {path}: the result is written as .json or .html", "such as --out bench.html")
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UserError(f"--out {path}: cannot write a file there", "name a file in a folder that exists")
        if not os.access(path.absolute().parent, os.W_OK):
            raise UserError(f"--out {path}: no permission to write there", "name a file in a folder you may write to")
        if path.exists() and not overwrite:
            raise UserError(f"--out {path} exists already", "add --overwrite, or name another file")
    return [path for path, *_ in files]
