"""Let TensorRT engine files run that you have not built yourself."""

from __future__ import annotations

import argparse
import json

from ..bundle import Bundle
from ..errors import UserError
from ..trt import engine_files, preflight
from .options import add_json

EXAMPLE = "accel trust my-bundle --yes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description += ". An engine file is executable code: running one is running a program of whoever made it."
    parser.add_argument("bundle", help="a bundle folder")
    parser.add_argument("--yes", action="store_true", help="sign them; without it they are only shown")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    found = engine_files.find(bundle)
    whole = [engine_file for engine_file in found if isinstance(engine_file, engine_files.EngineFile)]
    foreign = [engine_file for engine_file in whole if not preflight.trusted(engine_file)]
    for engine_file in foreign:
        if reason := preflight.damaged(engine_file) or preflight.changed(engine_file):
            raise UserError(f"{engine_file.path} cannot be trusted: {reason}", "get it again, or build it here")
    rows = [
        {
            "component": p.component,
            "key": p.key,
            "sha256": p.record["plan"]["sha256"],
            "gpu": p.identity["gpu"],
            "tensorrt": p.identity["tensorrt"],
            "built": p.record["built"],
        }
        for p in foreign
    ]
    if args.yes:
        for engine_file in foreign:
            engine_files.sign(engine_file.path, engine_file.text)
    if args.json:
        print(json.dumps({"trusted": args.yes, "plans": rows}, indent=2))
        return 0
    for problem in (entry for entry in found if isinstance(entry, UserError)):
        print(f"left out: {problem.message}")
    for row in rows:
        print(
            f"{row['component']} {row['key'][:8]}: TensorRT {row['tensorrt']}, {row['gpu']}, "
            f"built {row['built'][:16]}, sha256 {row['sha256']}"
        )
    if not foreign:
        print(
            f"{len(whole)} engine files, all of them yours already"
            if whole
            else f"{bundle.path} has no TensorRT engine files"
        )
    elif args.yes:
        print(f"{len(rows)} engine files carry your signature now")
    else:
        print(f"compare these with what their maker says; then: accel trust {bundle.path} --yes")
    return 0
