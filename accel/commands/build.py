"""Build engine files of a bundle: with TensorRT for this GPU or any RTX card, with AOTInductor for this machine."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from ..bundle import Bundle
from ..command_line.options import add_build, add_gpu, build_engine_files, next_command
from ..command_line.parser import renamed
from ..engines import fitting_engine_file
from ..errors import UserError
from ..trt.engine_files import KINDS
from ..trt.flavours import RTX

EXAMPLE = "accel build my-bundle --components unet,vae_decoder --profile sd-512 --profile sd-768"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle folder; the engine files go to its engines/")
    parser.add_argument(
        "--engine",
        choices=tuple(KINDS),
        default="tensorrt",
        help="tensorrt: for this GPU; tensorrt-rtx: for RTX cards, on any machine; aoti: with torch's compiler, for "
        "this processor or GPU (default: tensorrt)",
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
    text = "with aoti: what to compute in instead of the bundle's own; TensorRT goes by the bundle"
    parser.add_argument("--precision", dest="dtype", choices=("bf16",), help=text)
    add_gpu(parser, "with TensorRT and aoti: what to build on and for; aoti: the GPU if there is one, or cpu", cpu=True)
    add_build(parser.add_argument_group("builder"))


def run(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    if args.dtype and args.engine != "aoti":
        fix = "export the model in another --precision, or --engine aoti"
        raise UserError(f"--precision {args.dtype} is for aoti: {args.engine} computes in what the bundle has", fix)
    components = tuple(name.strip() for name in args.components.split(",")) if args.components else ()
    built = build_engine_files(bundle, args, components, args.profile, args.engine)
    if args.json:
        print(json.dumps([dict(file.record) for file in built], indent=2))
        return 0
    for file in built:
        record, profiles = file.record, ", ".join(profile["name"] for profile in file.identity["profiles"])
        layers = "".join(f"; {count} in {name}" for name, count in record["audit"].get("heavy", {}).items())
        size = record["plan"]["bytes"] / 1e6
        print(f"{file.component:<15} {size:9.1f} MB  {record['seconds']:7.1f} s  {profiles}{layers}")
    device = args.device or ("auto" if args.engine == "aoti" else "cuda")
    fits = partial(fitting_engine_file, bundle, device=device, engines=[args.engine], dtype=args.dtype or "")
    fitting = [fits(name) for name in bundle.manifest.components]
    if not any(fitting) and args.engine == RTX.engine:
        print(f"{bundle.path} is ready for machines with such a card; copy it there, and: accel trust BUNDLE --yes")
        return 0
    if args.engine == "aoti" and (missing := _missing(bundle, fits)):
        print(f"{bundle.path} runs single networks: an image needs an engine file of {', '.join(missing)} too")
        return 0
    how = f" --engine {args.engine}" if all(fitting) else " --engine auto"  # auto runs the others on another engine
    how += f" --precision {args.dtype}" if args.dtype else ""
    how += f" --device {device}" * (device not in ("auto", "cuda", "cuda:0"))
    print(f"{bundle.path} is ready{next_command(bundle, how)}")
    return 0


def _missing(bundle: Bundle, fits: Callable[[str], Any]) -> list[str]:
    """The components of an image that no engine file of AOTInductor fits."""
    from ..pipeline import component_names

    with contextlib.suppress(UserError):  # of a bundle that makes no image by itself
        return [name for name in component_names(bundle) if not fits(name)]
    return []
