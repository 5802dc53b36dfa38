"""`accel push`: put a bundle, or what `accel distill` made, into a repository of the Hugging Face hub."""

from __future__ import annotations

import argparse
import json
from typing import Any

EXAMPLE = "accel push digits/4step-int8 user/name --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle folder, one that ships, or what accel distill made")
    parser.add_argument("repo", metavar="USER/NAME", help="repository of the hub, which is made where there is none")
    text = "licence as the hub spells it, usually that of the model it was made from (the digits know theirs)"
    parser.add_argument("--license", metavar="ID", help=text)
    text = "hub id of the model that it was made from (default: the source's name, where that is one)"
    parser.add_argument("--base-model", metavar="USER/NAME", help=text)
    text = "result of accel bench on this bundle, .json or .html, whose table the card shows"
    parser.add_argument("--bench", metavar="FILE", help=text)
    parser.add_argument("--private", action="store_true", default=None, help="let a new repository be private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    text = "push TensorRT's engine files too, which whoever gets them has to trust first"
    parser.add_argument("--engine-files", action="store_true", help=text)
    parser.add_argument("-m", "--message", metavar="TEXT", help="message of the commit")
    text = "print the card and the names of the files, and send nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    from ...publishing import push
    from ...publishing.trained import is_trained

    if is_trained(args.bundle):
        return _trained(args)
    how = dict(licence=args.license, base_model=args.base_model, bench=args.bench, engine_files=args.engine_files)
    if args.dry_run:
        return _show(args, how)
    done = push(args.bundle, args.repo, private=args.private, revision=args.revision, message=args.message, **how)
    if args.json:
        print(json.dumps(vars(done)))
    else:
        at = "" if args.revision is None else f"@{args.revision}"
        print(f"{done.url}: {len(done.files)} files\naccel run {done.repo}{at} --prompt TEXT")
    return 0


def _trained(args: argparse.Namespace) -> int:
    from ...errors import UserError
    from ...publishing.trained import prepared_trained, push_trained

    for option in ("bench", "engine_files"):
        if getattr(args, option):
            raise UserError(
                f"--{option.replace('_', '-')} is for bundles; {args.bundle} is a training's", "leave it out"
            )
    how = dict(licence=args.license, base_model=args.base_model)
    if args.dry_run:
        return _print(prepared_trained(args.bundle, **how), args)
    more = dict(private=args.private, revision=args.revision, message=args.message)
    done = push_trained(args.bundle, args.repo, **how, **more)
    print(json.dumps(vars(done)) if args.json else f"{done.url}: {len(done.files)} files")
    return 0


def _show(args: argparse.Namespace, how: dict) -> int:
    from ...publishing.upload import prepared

    return _print(prepared(args.bundle, args.repo, **how), args)


def _print(made: Any, args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps({"card": made.card, "files": sorted(made.names)}))
    else:
        print(made.card)
        print("\n".join(sorted(made.names)))
    return 0
