"""`accel tune`: find the fastest engine for each network of a bundle on this machine, and let `auto` take it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ...bundle import Bundle, tuned
from ...errors import UserError
from ...progress import progress

if TYPE_CHECKING:
    from ...bench.tune import Result

EXAMPLE = "accel tune digits/4step-int8 --seconds 20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description += (
        ". Engines take turns on every network, with other numbers of threads, without folds and in bfloat16 (taken "
        "if the image stays the same within 40 dB); the best of each is kept in the cache for this bundle, processor "
        "and versions. An engine or option that is named goes before it."
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle folder, or one that ships")
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="about how long to measure (default: %(default)g)"
    )
    parser.add_argument("--forget", action="store_true", help="remove what was found before, and measure nothing")


def run(args: argparse.Namespace) -> int:
    if not 0 < args.seconds < float("inf"):
        raise UserError(f"--seconds {args.seconds:g} makes no sense", "--seconds 60")
    bundle = Bundle.open(args.bundle)
    if args.forget:
        gone = tuned.forget(bundle)
        text = "forgotten" if gone else "there is nothing to forget"
        print(json.dumps({"forgotten": gone}) if args.json else f"{bundle.path}: {text}")
        return 0
    bundle.refuse_by_class()  # the mixture is tried on the image of a prompt
    bundle.verify(None)
    from ...bench.tune import tune

    with progress("tune") as report:
        found = tune(bundle, args.seconds, report)
    file = tuned.write(bundle, found.choices, {"networks": found.measured, "image": found.image, "psnr": found.psnr})
    if args.json:
        chosen = {name: vars(choice) | {"options": dict(choice.options)} for name, choice in found.choices.items()}
        said = {"record": str(file), "choices": chosen, "measured": found.measured, "image": found.image}
        print(json.dumps(said | {"psnr": found.psnr}))
        return 0
    _show(found)
    print(f"`auto` takes this from now on; kept in {file}")
    return 0


def _show(found: Result) -> None:
    from ...bench.tune import label

    for name, ways in found.measured.items():
        print(f"{name}:")
        for title, taken in sorted(ways.items(), key=lambda way: (isinstance(way[1], str), way[1])):
            shown = f"{1e3 * taken:9.2f} ms" if isinstance(taken, float) else f"  {taken}"
            print(f"  {title:<28} {shown}{'   <- taken' if title == label(found.choices[name]) else ''}")
    best, single = found.image["tuned"], found.image["single"]
    if found.psnr is not None:
        kept = any("dtype" in choice.options for choice in found.choices.values())
        print(f"with bf16 the image is {found.psnr:.1f} dB from {found.single}'s: {'taken' if kept else 'not taken'}")
    print(f"whole image: {1e3 * best:.1f} ms; on {found.single} alone {1e3 * single:.1f} ms ({single / best:.2f}x)")
