"""`accel inspect`: show what a bundle contains, whether it is intact and whether it runs here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ..bundle import Bundle, Component, foreign
from ..command_line.parser import renamed
from ..engines import ENGINES, engine_file_engines, status
from ..engines.select import place
from ..errors import UserError
from ..int8 import summary
from ..progress import progress
from ..trt import engine_files, preflight
from ..trt.flavours import BY_ENGINE

EXAMPLE = "accel inspect my-bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle, the hub id of one, or a folder of optimum's")
    parser.add_argument(
        "--engine",
        dest="target",
        choices=tuple(BY_ENGINE),
        help="ask the parser of this engine whether it takes every node; without it, NVIDIA's operator matrix",
    )
    text = "with --engine: ask its builder as well, and throw away what it builds; minutes for a large network"
    parser.add_argument("--build", action="store_true", help=text)
    renamed(parser, "--for", "--engine")
    parser.add_argument("--no-verify", action="store_true", help="skip comparing the files with their digests")


def run(args: argparse.Namespace) -> int:
    if args.build and not args.target:
        raise UserError("--build asks a builder, and none was named", "add --engine tensorrt-rtx")
    bundle = Bundle.open(args.bundle)
    problem = None
    here = [entry for entry in bundle.manifest.files if not bundle.origin or (bundle.path / entry).exists()]
    if not args.no_verify:
        try:
            bundle.compare(here)
        except UserError as error:
            problem = error
    engines = {name: status(name) for name in ENGINES}
    files = _engine_files(bundle)
    answers = _ask(bundle, args.target, args.build) if args.target else {}
    if args.json:
        print(
            json.dumps(
                {
                    "manifest": bundle.manifest.as_dict(),
                    "digest": bundle.digest,
                    "origin": vars(bundle.origin) if bundle.origin else None,
                    "downloaded": here,
                    "intact": None if args.no_verify else problem is None,
                    "problem": str(problem) if problem else None,
                    "engines": {name: vars(state) for name, state in engines.items()},
                    "engine_files": files,
                    "plans": files,  # their name in 0.1
                    **(_as_json(answers) if args.target else {}),
                },
                indent=2,
            )
        )
    else:
        _print(bundle, len(here), args.no_verify, problem, engines)
        for entry in files:
            print(
                f"  engine file      {entry['what']}: {'runs here' if entry['ok'] else 'NO: ' + entry['reason']}"
                f"{'; fix: ' + entry['fix'] if entry['fix'] else ''}"
            )
        _print_answers(answers, BY_ENGINE[args.target][0].title if args.target else "")
    return 1 if problem or any(answer.problems for answer in answers.values()) else 0


def _ask(bundle: Bundle, engine: str, build: bool) -> dict[str, Any]:
    """Component -> what the engine's parser, or NVIDIA's operator matrix, says of its graph."""
    from accel.export.tensorrt.inspection import ask

    with progress("inspect", shown=build) as report:
        return ask(bundle, engine, build=build, progress=report)


def _as_json(answers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tensorrt_operators": {name: answer.problems for name, answer in answers.items()},
        "asked": {name: answer.asked for name, answer in answers.items()},
        "built": {name: answer.figures | {"audit": answer.built} for name, answer in answers.items() if answer.built},
    }


def _print_answers(answers: Mapping[str, Any], title: str) -> None:
    for asked in dict.fromkeys(answer.asked for answer in answers.values()):
        print(f"  asked: {asked}")
    for name, answer in answers.items():
        rows = answer.problems
        count = f"no: {len(rows)} node{'s' * (len(rows) > 1)}"
        print(
            f"  {name:<15} {f'{count} that {title} does not take' if rows else f'every node is one that {title} takes'}"
        )
        for row in rows[:10]:
            print(f"      {row['operator']} {row['node']}: {row['reason']}")
        if answer.built:
            figures = answer.figures
            size = f"{figures['bytes'] / 1e6:,.1f} MB in {figures['cpu_seconds']:.1f} CPU seconds"
            print(f"      built: {size}; {answer.built}")


def _here(engine: str) -> tuple[engine_files.Place | None, UserError | None]:
    """The library and device that engine files of an engine would run on, or the error that says why there are none."""
    try:
        state = status(engine)
        if not state.ok:
            raise UserError(state.detail, state.fix)
        return place(engine), None
    except UserError as error:
        return None, error


def _engine_files(bundle: Bundle) -> list[dict]:
    """The engine files beside a bundle, and the pre-flight's answer for each on this machine."""
    found = engine_files.find(bundle)
    places = {engine: _here(engine) for engine in engine_file_engines() if found}
    rows = []
    for file in found:
        if isinstance(file, UserError):
            rows.append({"what": "?", "key": None, "ok": False, "reason": file.message, "fix": file.fix})
            continue
        here, missing = places.get(file.engine, (None, UserError(f"the engine {file.engine} is unknown")))
        fit = preflight.check(bundle, file, here)
        if fit.ok and missing:
            fit = preflight.Fit(False, missing.message, missing.fix)
        profiles = ", ".join(profile["name"] for profile in file.identity["profiles"])
        what = f"{file.component} {file.key[:8]} ({file.built_for}, {profiles})"
        rows.append({"what": what, "key": file.key, **vars(fit)})
    return rows


def _print(bundle: Bundle, here: int, unverified: bool, problem: UserError | None, engines) -> None:
    from ..pipeline import component_names

    manifest = bundle.manifest
    sampler = manifest.sampler
    steps = sampler.get("timesteps") or f"{sampler.get('steps')} steps"
    total = sum(entry["bytes"] for entry in manifest.files.values())
    kind = f"{manifest.family}, topology {manifest.topology}, {manifest.precision}"
    print(f"{bundle.name}: {kind}, {total / 1e6:,.1f} MB")
    print(
        f"  made from {manifest.source['name']} with opset {manifest.exporter['opset']}, "
        f"torch {manifest.exporter['torch']}"
    )
    if "foreign" in manifest.source:
        kind = foreign.KINDS[manifest.source["foreign"]].title
        print(f"  {kind}: never compared with torch, and its digests are those of the first reading")
        print(f"  assumed   {'; '.join(manifest.source['assumed'])}")
    options = "".join(f", {name.replace('_', ' ')} {value}" for name, value in sampler.get("options", {}).items())
    own = f"; the model's own scheduler: {scheduler}" if (scheduler := manifest.source.get("scheduler")) else ""
    print(f"  sampler   {sampler['name']}, {steps}, guidance {sampler['guidance']:g}{options}{own}")
    profile = manifest.profile
    print(
        f"  profile   {profile.name}: batch {profile.batch}, height {profile.height}, width {profile.width}, "
        + (_classes(manifest.pipeline["classes"]) if manifest.by_class else f"{profile.tokens} tokens")
        + (f", VAE in tiles of {profile.vae_tile} px" if profile.vae_tile else "")
    )
    for component in manifest.components.values():
        _print_component(component)
    if problem:
        print(f"  files     DAMAGED: {problem}")
    else:
        count = (
            f"{len(manifest.files)} files" if here == len(manifest.files) else f"{here} of {len(manifest.files)} files"
        )
        rest = "" if here == len(manifest.files) else " (downloaded); the others arrive when they are used"
        print(f"  files     {'not checked' if unverified else f'{count} match their digests{rest}'}")
    try:
        component_names(bundle)
    except UserError as error:
        print(f"  makes no image by itself: {error.message}")
    for name, state in engines.items():
        print(f"  {name:<12} {'runs here: ' + state.detail if state.ok else f'no: {state.detail}; fix: {state.fix}'}")


def _classes(count: int) -> str:
    return f"{count} classes" if count else "no classes"


def _parity(component: Component) -> str:
    error, limit = component.parity.get("relative_l2"), component.parity.get("limit")
    if not isinstance(error, float) or not isinstance(limit, float):
        return "difference from torch not measured"
    return f"differs from {'float32' if component.int8 else 'torch'} by {error:.1e} (limit {limit:.1e})"


def _print_component(component: Component) -> None:
    print(f"  {component.name:<15} {component.parameters / 1e6:,.1f} M {component.precision}, {_parity(component)}")
    for line in summary.lines(component):
        print(f"      {line}")
    for arrow, specs in (("<-", component.inputs), ("->", component.outputs)):
        for spec in specs:
            shape = ", ".join(f"{d} {component.dims[d]}" if isinstance(d, str) else str(d) for d in spec.shape)
            print(f"      {arrow} {spec.name}: {spec.dtype} [{shape}]")
