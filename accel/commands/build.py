"""Build TensorRT engine files from the graphs of a bundle: for this GPU or, with TensorRT-RTX, for any RTX card."""

from __future__ import annotations

import argparse
import json

from ..bundle import Bundle
from ..command_line.options import add_build, add_gpu, build_engine_files, next_command
from ..command_line.parser import renamed
from ..engines import fitting_engine_file
from ..trt.flavours import BY_ENGINE

EXAMPLE = "accel build my-bundle --components unet,vae_decoder --profile sd-512 --profile sd-768"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle folder; the engine files go to its engines/")
    parser.add_argument(
        "--engine",
        choices=tuple(BY_ENGINE),
        default="tensorrt",
        help="tensorrt: for this GPU; tensorrt-rtx: for RTX cards, on any machine (default: tensorrt)",
    )
    text = "with commas between them (default: all of the bundle)"
    parser.add_argument("--components", metavar="NAMES", help=text)
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="SHAPES",
        help="shape profile within the bundle's own (default: the bundle's own); repeat it for several optimization "
        "profiles in one engine",
    )
    parser.add_argument("--overwrite", action="store_true", help="build engine files again that exist already")
    renamed(parser, "--force", "--overwrite")
    add_gpu(parser, "with TensorRT: GPU to build on and for")
    add_build(parser.add_argument_group("builder"))


def run(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    components = tuple(name.strip() for name in args.components.split(",")) if args.components else ()
    built = build_engine_files(bundle, args, components, args.profile, args.engine)
    if args.json:
        print(json.dumps([dict(file.record) for file in built], indent=2))
        return 0
    for file in built:
        record, profiles = file.record, ", ".join(profile["name"] for profile in file.identity["profiles"])
        layers = ", ".join(f"{count} in {name}" for name, count in record["audit"]["heavy"].items())
        size = record["plan"]["bytes"] / 1e6
        print(f"{file.component:<15} {size:9.1f} MB  {record['seconds']:7.1f} s  {profiles}; {layers}")
    device = args.device or "cuda"
    fitting = [fitting_engine_file(bundle, name, device, [args.engine]) for name in bundle.manifest.components]
    if not any(fitting) and not BY_ENGINE[args.engine][0].gpu_to_build:
        print(f"{bundle.path} is ready for machines with such a card; copy it there, and: accel trust BUNDLE --yes")
        return 0
    how = f" --engine {args.engine}" if all(fitting) else " --engine auto"  # auto runs the others on another engine
    how += f" --device {device}" * (device not in ("cuda", "cuda:0"))
    print(f"{bundle.path} is ready{next_command(bundle, how)}")
    return 0
