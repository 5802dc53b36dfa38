"""Sign engine files that you have not built yourself, so that they may run."""

from __future__ import annotations

import argparse
import json

from ..bundle import Bundle
from ..errors import UserError
from ..trt import engine_files, preflight

EXAMPLE = "accel trust my-bundle --yes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description += ". An engine file is executable code: running one is running a program of whoever made it."
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle folder")
    parser.add_argument("--yes", action="store_true", help="sign them; without it they are only listed")


def run(args: argparse.Namespace) -> int:
    bundle = Bundle.open(args.bundle)
    found = engine_files.find(bundle)
    readable = [file for file in found if isinstance(file, engine_files.EngineFile)]
    foreign = [file for file in readable if not preflight.trusted(file)]
    for file in foreign:
        if reason := preflight.damaged(file) or preflight.changed(file):
            raise UserError(f"{file.path} cannot be trusted: {reason}", "get it again, or build it here")
    rows = [
        {
            "component": file.component,
            "key": file.key,
            "sha256": file.record["plan"]["sha256"],
            "gpu": file.identity["gpu"],
            "tensorrt": file.identity.get("tensorrt"),
            "engine": file.engine,
            "built_for": file.built_for,
            "built": file.record["built"],
        }
        for file in foreign
    ]
    if args.yes:
        for file in foreign:
            engine_files.sign(file.path, file.text)
    if args.json:
        # "plans" is what "engine_files" was called in 0.1.
        print(json.dumps({"trusted": args.yes, "engine_files": rows, "plans": rows}, indent=2))
        return 0
    for error in (entry for entry in found if isinstance(entry, UserError)):
        print(f"left out: {error.message}")
    for row in rows:
        print(
            f"{row['component']} {row['key'][:8]}: {row['built_for']}, "
            f"built {row['built'][:16]}, sha256 {row['sha256']}"
        )
    if not readable:
        print(f"{bundle.path} has no engine files")
    elif not foreign:
        print(f"{len(readable)} engine files, all signed by you already")
    elif args.yes:
        print(f"{len(rows)} engine files carry your signature now")
    else:
        print(f"compare the digests with those that the builder gives you; then: accel trust {bundle.path} --yes")
    return 0
