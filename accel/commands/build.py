"""Build TensorRT engines for this GPU from the graphs of a bundle."""

from __future__ import annotations

import argparse
import json

from ..bundle import Bundle
from ..command_line.options import add_build, add_gpu, build_engine_files, next_command
from ..command_line.parser import renamed
from ..engines import fitting_engine_file
from ..trt.cuda import index_of

EXAMPLE = "accel build my-bundle --components unet,vae_decoder --profile sd-512 --profile sd-768"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle folder; the engine files go to its engines/")
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
    add_gpu(parser, "GPU to build on and for")
    add_build(parser.add_argument_group("builder"))


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
    device = f"cuda:{index_of(args.device)}"
    complete = all(fitting_engine_file(bundle, name, device) for name in bundle.manifest.components)
    how = " --engine tensorrt" if complete else " --engine auto"  # auto runs the other components on another engine
    print(f"{bundle.path} is ready{next_command(bundle, how + f' --device {device}' * (device != 'cuda:0'))}")
    return 0
