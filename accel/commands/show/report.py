"""`accel report`: results that `accel bench` saved, alone or compared with each other, as a page or a table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ...command_line.options import add_out
from ...errors import UserError

EXAMPLE = "accel report before.json after.json --out report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "a result of accel bench, .json or .html; the first of several is the one that the others are compared with"
    parser.add_argument("results", nargs="+", metavar="FILE", help=help)
    add_out(parser, "page to write, one .html file without a network (default: print the tables)", metavar="FILE")
    parser.add_argument("--full", action="store_true", help="of one result: print every column, not the short table")


def run(args: argparse.Namespace) -> int:
    from ...bench import page, report
    from ...bench.results import comparison, saved, verdict
    from ...files import write_bytes

    out = _out(args)
    documents = [saved.read(name) for name in args.results]
    several = len(documents) > 1
    found: dict[str, Any] = (
        comparison.compare(documents, [Path(name).stem for name in args.results]) if several else documents[0]
    )
    if out:
        write_bytes(out, (page.compared(found) if several else page.page(found)).encode())
    if args.json:
        print(json.dumps(found, indent=2))
    elif not several:
        report.show(found, heading=verdict.sentence(found), full=args.full)
    else:
        report.show_tables(comparison.sentence(found), [comparison.table(found), comparison.changes(found)])
    if out and not args.json:
        print(f"{out}: the page")
    return 0


def _out(args: argparse.Namespace) -> Path | None:
    """The page to write, checked before anything is read.

    Raises:
        UserError: for another kind of file, one that is there, or a folder that is not.
    """
    if args.out is None:
        return None
    out = Path(args.out)
    if out.suffix != ".html":
        raise UserError(f"--out {out}: the page is written as .html", "such as --out report.html")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: cannot write a file there", "name a file in a folder that exists")
    if out.exists() and not args.overwrite:
        raise UserError(f"--out {out} exists already", "add --overwrite, or name another file")
    return out
