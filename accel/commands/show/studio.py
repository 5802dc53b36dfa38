"""`accel studio`: compare two engines by eye, in a browser on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ...errors import UserError

EXAMPLE = "accel studio digits/4step-int8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "a bundle; or a pipeline folder or shipped model. The page offers these and no other"
    parser.add_argument("models", nargs="+", metavar="MODEL", help=help)
    help = "the engines to choose from, with commas between them, as in accel bench (default: all that run here)"
    parser.add_argument("--engine", metavar="NAMES", help=help)
    parser.add_argument("--lora", action="append", default=[], metavar="FILE", help="LoRA file to offer; repeatable")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port; 0 for a free one (default: 7860)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def run(args: argparse.Namespace) -> int:
    import webbrowser

    from ...assets import DIGITS_PROMPTS, knows_only_digits
    from ...loading import opened
    from ...studio import Choices, Engines
    from ...studio.layout import layout
    from ...studio.server import bound, serve

    bundles = [opened(model) for model in args.models]
    for file in args.lora:
        if not Path(file).is_file():
            raise UserError(f"--lora {file}: there is no such file", "name a LoRA file")
    choices = Choices(models=tuple(args.models), engines=_engines(args.engine, bundles), loras=tuple(args.lora))
    digits = all(knows_only_digits(str(bundle.manifest.source["name"])) for bundle in bundles)
    engines = Engines()
    page = layout(choices, engines, DIGITS_PROMPTS[0] if digits else "a fox in the snow")

    def ready(address: str) -> None:
        print(json.dumps({"url": address}) if args.json else f"{address} (Ctrl-C ends it)", flush=True)
        if args.open:
            webbrowser.open(address)

    serve(page, bound(args.port), ready)
    engines.close()
    return 0


def _engines(named: str | None, bundles: list[Any]) -> tuple[str, ...]:
    """The variants that were named, or those that run every model here; the reference first.

    Raises:
        UserError: where one that was named cannot run here, or none can.
    """
    from ...bench import chosen
    from ...bench.variants import unable

    variants = chosen(named)
    names = [v.name for v in variants if not any(unable(v, bundle) for bundle in bundles)]
    names = names if not named else [variant.name for variant in variants]
    if not names:
        raise UserError("no engine here runs all of these models", "accel doctor says what is missing")
    return tuple(sorted(names, key=lambda name: name != "eager"))
