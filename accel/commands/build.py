"""A bundle's graphs become TensorRT plans for this GPU."""

from __future__ import annotations

import argparse
import json

from ..bundle import Bundle
from ..engines import fitting_plan
from .options import add_build, add_json, build_plans

EXAMPLE = "accel build my-bundle --components unet,vae_decoder --profile sd-512 --profile sd-768"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a bundle folder; the plans go to its engines/")
    parser.add_argument("--components", help="comma-separated (default: all of the bundle)")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        help="shapes to build for, within the bundle's own; repeat for several in one plan (default: the bundle's own)",
    )
    parser.add_argument("--force", action="store_true", help="build again what is there and fits")
    add_build(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    components = tuple(name.strip() for name in args.components.split(",")) if args.components else ()
    built = build_plans(bundle, args, components, args.profile)
    if args.json:
        print(json.dumps([dict(plan.record) for plan in built], indent=2))
        return 0
    for plan in built:
        found, profiles = plan.record["audit"], plan.identity["profiles"]
        layers = ", ".join(f"{count} in {name}" for name, count in found["heavy"].items())
        print(
            f"{plan.component:<15} {plan.record['plan']['bytes'] / 1e6:9.1f} MB  {plan.record['seconds']:7.1f} s  "
            f"{', '.join(p['name'] for p in profiles)}; {layers}"
        )
    device = f"cuda:{args.gpu}"
    whole = all(fitting_plan(bundle, name, device) for name in bundle.manifest.components)
    where = f" --device {device}" if args.gpu else ""
    engine = "tensorrt" if whole else "auto"  # the rest elsewhere
    print(f"{bundle.path} is ready: accel run {bundle.path} --engine {engine}{where} --prompt ...")
    return 0
