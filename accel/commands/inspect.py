"""`accel inspect`: show what a bundle contains, whether it is intact and whether it runs here."""

from __future__ import annotations

import argparse
import json

from ..bundle import Bundle, Component
from ..command_line.parser import renamed
from ..engines import ENGINES, status
from ..errors import UserError
from ..int8 import summary
from ..trt import engine_files, preflight

EXAMPLE = "accel inspect my-bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle folder")
    parser.add_argument(
        "--engine",
        dest="target",
        choices=("tensorrt",),
        help="check that the parser of this engine takes every operator",
    )
    renamed(parser, "--for", "--engine")
    parser.add_argument("--no-verify", action="store_true", help="skip comparing the files with their digests")


def run(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    problem = None
    if not args.no_verify:
        try:
            bundle.verify()
        except UserError as error:
            problem = error
    engines = {name: status(name) for name in ENGINES}
    files = _engine_files(bundle)
    refused = _operators(bundle) if args.target else {}
    if args.json:
        print(
            json.dumps(
                {
                    "manifest": bundle.manifest.as_dict(),
                    "digest": bundle.digest,
                    "intact": None if args.no_verify else problem is None,
                    "problem": str(problem) if problem else None,
                    "engines": {name: vars(state) for name, state in engines.items()},
                    "engine_files": files,
                    "plans": files,  # their name in 0.1
                    **({"tensorrt_operators": refused} if args.target else {}),
                },
                indent=2,
            )
        )
    else:
        _print(bundle, args.no_verify, problem, engines)
        for entry in files:
            print(
                f"  engine file      {entry['what']}: {'runs here' if entry['ok'] else 'NO: ' + entry['reason']}"
                f"{'; fix: ' + entry['fix'] if entry['fix'] else ''}"
            )
        for name, rows in refused.items():
            print(
                f"  {name:<15} {'no: ' + str(len(rows)) + ' nodes' if rows else 'every node is one'} "
                f"{'that TensorRT does not take' if rows else 'that TensorRT takes'}"
            )
            for row in rows[:10]:
                print(f"      {row['operator']} {row['node']}: {row['reason']}")
    return 1 if problem or any(refused.values()) else 0


def _operators(bundle: Bundle) -> dict[str, list[dict]]:
    """Component -> the nodes that TensorRT's published operator matrix does not list."""
    from accel.bundle.graph_file import graph_file
    from accel.export.tensorrt.operators import check

    return {
        name: [vars(problem) for problem in check(graph_file(bundle, component))]
        for name, component in bundle.manifest.components.items()
    }


def _here() -> tuple[engine_files.Here | None, UserError | None]:
    """The TensorRT and GPU that engine files would run on, or the error that says why there are none."""
    from ..trt import library
    from ..trt.cuda import Cuda

    try:
        return engine_files.Here.of(library.load().__version__, Cuda()), None
    except UserError as error:
        return None, error


def _engine_files(bundle: Bundle) -> list[dict]:
    """The TensorRT engine files beside a bundle, and the pre-flight's answer for each on this machine."""
    found = engine_files.find(bundle)
    here, missing = _here() if found else (None, None)
    rows = []
    for file in found:
        if isinstance(file, UserError):
            rows.append({"what": "?", "key": None, "ok": False, "reason": file.message, "fix": file.fix})
            continue
        fit = preflight.check(bundle, file, here)
        if fit.ok and missing:
            fit = preflight.Fit(False, missing.message, missing.fix)
        profiles = ", ".join(profile["name"] for profile in file.identity["profiles"])
        built = f"TensorRT {file.identity['tensorrt']}, {file.identity['gpu']}"
        what = f"{file.component} {file.key[:8]} ({built}, {profiles})"
        rows.append({"what": what, "key": file.key, **vars(fit)})
    return rows


def _print(bundle: Bundle, unverified: bool, problem: UserError | None, engines) -> None:
    from ..pipeline import component_names

    manifest = bundle.manifest
    sampler = manifest.sampler
    steps = sampler.get("timesteps") or f"{sampler.get('steps')} steps"
    total = sum(entry["bytes"] for entry in manifest.files.values())
    kind = f"{manifest.family}, topology {manifest.topology}, {manifest.precision}"
    print(f"{bundle.path}: {kind}, {total / 1e6:,.1f} MB")
    print(
        f"  made from {manifest.source['name']} with opset {manifest.exporter['opset']}, "
        f"torch {manifest.exporter['torch']}"
    )
    options = "".join(f", {name.replace('_', ' ')} {value}" for name, value in sampler.get("options", {}).items())
    own = f"; the model's own scheduler: {scheduler}" if (scheduler := manifest.source.get("scheduler")) else ""
    print(f"  sampler   {sampler['name']}, {steps}, guidance {sampler['guidance']:g}{options}{own}")
    profile = manifest.profile
    print(
        f"  profile   {profile.name}: batch {profile.batch}, height {profile.height}, width {profile.width}, "
        f"{profile.tokens} tokens"
    )
    for component in manifest.components.values():
        _print_component(component)
    if problem:
        print(f"  files     DAMAGED: {problem}")
    else:
        print(f"  files     {'not checked' if unverified else f'{len(manifest.files)} files match their digests'}")
    try:
        component_names(bundle)
    except UserError as error:
        print(f"  makes no image by itself: {error.message}")
    for name, state in engines.items():
        print(f"  {name:<12} {'runs here: ' + state.detail if state.ok else f'no: {state.detail}; fix: {state.fix}'}")


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
