"""A bundle's graphs become TensorRT engine files for this GPU."""

from __future__ import annotations

import argparse
import json

from ..bundle import Bundle
from ..engines import fitting_engine_file
from .options import add_build, add_json, build_engine_files

EXAMPLE = "accel build my-bundle --components unet,vae_decoder --profile sd-512 --profile sd-768"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a bundle folder; the engine files go to its engines/")
    parser.add_argument("--components", help="comma-separated (default: all of the bundle)")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        help="shapes to build for, within the bundle's own; repeat for several in one engine file (default: the "
        "bundle's own)",
    )
    parser.add_argument("--force", action="store_true", help="build again what is there and fits")
    add_build(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    components = tuple(name.strip() for name in args.components.split(",")) if args.components else ()
    built = build_engine_files(bundle, args, components, args.profile)
    if args.json:
        print(json.dumps([dict(engine_file.record) for engine_file in built], indent=2))
        return 0
    for engine_file in built:
        found, profiles = engine_file.record["audit"], engine_file.identity["profiles"]
        layers = ", ".join(f"{count} in {name}" for name, count in found["heavy"].items())
        print(
            f"{engine_file.component:<15} {engine_file.record['plan']['bytes'] / 1e6:9.1f} MB  "
            f"{engine_file.record['seconds']:7.1f} s  "
            f"{', '.join(p['name'] for p in profiles)}; {layers}"
        )
    device = f"cuda:{args.gpu}"
    whole = all(fitting_engine_file(bundle, name, device) for name in bundle.manifest.components)
    where = f" --device {device}" if args.gpu else ""
    engine = "tensorrt" if whole else "auto"  # the rest elsewhere
    print(f"{bundle.path} is ready: accel run {bundle.path} --engine {engine}{where} --prompt ...")
    return 0
