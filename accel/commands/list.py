"""`accel list`: what there is by name, so that nobody has to guess a name."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..command_line.parser import one_of

EXAMPLE = "accel list recipes"


def add_arguments(parser: Any) -> None:
    text = f"{', '.join(_LISTS)} (default: all of them)"
    parser.add_argument("what", nargs="*", type=one_of("list", _LISTS), metavar="WHAT", help=text)


def run(args: argparse.Namespace) -> int:
    found = {what: _LISTS[what]() for what in args.what or _LISTS}
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for what, entries in found.items():
        print(f"{what}:")
        width = max(map(len, entries))
        for name, text in entries.items():
            print(f"  {name:<{width}}  {text}".rstrip())
    return 0


def _models() -> dict[str, str]:
    """The pipelines and bundles that ship with the package, by the names that every verb takes for MODEL."""
    from ..assets import DIGITS
    from ..bundle import is_bundle

    return {
        "digits" if path.name == "teacher" else f"digits/{path.name}": _model(path, is_bundle(path))
        for path in sorted(DIGITS.iterdir())
        if (path / "model_index.json").is_file()
    }


def _model(path: Any, bundle: bool) -> str:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return f"{'int8 bundle' if bundle else 'pipeline'}, {size / 1e6:.1f} MB"


def _recipes() -> dict[str, str]:
    from accel.distill.registry import METHODS, load, recipe_names

    named = {}
    for method, entry in METHODS.items():
        for name in recipe_names(method):
            named[name] = f"accel distill {method}"
            if name in entry.presets.split():
                named[name] += f": {_first_line(load(f'.recipes:{name}'))}".removesuffix(": ")
    return named


def _first_line(function: Any) -> str:
    return (function.__doc__ or "").partition("\n")[0]


def _profiles() -> dict[str, str]:
    from ..bundle.shape_profiles import PROFILES

    return {
        name: f"batch {profile.batch}, height {profile.height}, width {profile.width}"
        for name, profile in PROFILES.items()
    }


def _protocols() -> dict[str, str]:
    from accel.distill.evaluation.protocols import PROTOCOLS

    return {name: protocol.title for name, protocol in PROTOCOLS.items()}


def _samplers() -> dict[str, str]:
    from ..sampling.samplers import SAMPLERS

    return {name: sampler.description for name, sampler in SAMPLERS.items()}


def _engines() -> dict[str, str]:
    from ..engines import ENGINES, status

    def state(name: str) -> str:
        found = status(name)
        return f"runs here: {found.detail}" if found.ok else f"not here: {found.detail} (accel doctor has the fix)"

    return {name: state(name) for name in reversed(ENGINES)}


_LISTS = {
    "models": _models,
    "recipes": _recipes,
    "profiles": _profiles,
    "protocols": _protocols,
    "samplers": _samplers,
    "engines": _engines,
}
