"""Build TensorRT engines for this GPU from the graphs of a bundle."""

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
        help="shape profile within the bundle's own (default: the bundle's own); repeat it for several optimization "
        "profiles in one engine",
    )
    parser.add_argument("--force", action="store_true", help="rebuild engines that already exist")
    add_build(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    components = tuple(name.strip() for name in args.components.split(",")) if args.components else ()
    built = build_engine_files(bundle, args, components, args.profile)
    if args.json:
        print(json.dumps([dict(file.record) for file in built], indent=2))
        return 0
    for file in built:
        record, profiles = file.record, ", ".join(profile["name"] for profile in file.identity["profiles"])
        layers = ", ".join(f"{count} in {name}" for name, count in record["audit"]["heavy"].items())
        size = record["plan"]["bytes"] / 1e6
        print(f"{file.component:<15} {size:9.1f} MB  {record['seconds']:7.1f} s  {profiles}; {layers}")
    device = f"cuda:{args.gpu}"
    complete = all(fitting_engine_file(bundle, name, device) for name in bundle.manifest.components)
    where = f" --device {device}" if args.gpu else ""
    engine = "tensorrt" if complete else "auto"  # auto runs the other components on another engine
    print(f"{bundle.path} is ready: accel run {bundle.path} --engine {engine}{where} --prompt ...")
    return 0
