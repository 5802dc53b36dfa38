"""Faults of an earlier commit, shown on its own code: what `tensorrt_rtx_faults.py` and `gpu_faults.py` share.

A probe is the essence of a test of today. It runs in a process that imports the commit before the fault was mended,
returns what that code does in words, and fails where there is no fault.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Probe = Callable[[Path], str]


@dataclass(frozen=True)
class Faults:
    """The faults of a commit.

    Attributes:
        script: the file that holds the probes.
        commit: before they were mended.
        known: number -> what was wrong, and the tests of today that show it.
        probes: number -> what shows it on the code of then, given a folder to work in.
        page: whose table lies between markers of the script's name.
    """

    script: Path
    commit: str
    known: Mapping[int, tuple[str, list[str]]]
    probes: Mapping[int, Probe]
    page: Path

    @property
    def name(self) -> str:
        return self.script.stem.replace("_", "-")


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("before", type=Path, help="folder for a checkout of the commit before")
    made.add_argument("--faults", help="numbers with commas between them (default: all)")
    made.add_argument("--write", action="store_true", help="write the JSON file of the same name, and the page")
    made.add_argument("--probe", type=int, help=argparse.SUPPRESS)  # one, in this process, on the code of then
    return made


def run(
    faults: Faults,
    args: argparse.Namespace,
    prepare: Callable[[Path], Any] = lambda work: None,
    today: Callable[[int, Path], str] = lambda number, work: "",
    facts: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Run one probe here, or each in a process of its own on the code of then.

    Args:
        prepare: puts into the working folder what today's code has to make.
        today: what today's code says beside a probe.
        facts: further entries of the JSON file.
    """
    if args.probe:
        print(json.dumps(faults.probes[args.probe](args.before)))
        return
    before = args.before.resolve()
    check_out(faults.commit, before)
    work = before / "probes"
    work.mkdir(exist_ok=True)
    prepare(work)
    rows = []
    for number in map(int, args.faults.split(",")) if args.faults else faults.known:
        fault, tests = faults.known[number]
        said = told(faults.script, before, "--probe", str(number)) + today(number, work)
        rows.append({"number": number, "fault": fault, "before": said, "tests": tests})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    if args.write:
        import pages

        command = f"python benchmarks/{faults.script.name} out/{args.before.name} --write"
        document = {"command": command, "commit": faults.commit}
        saved = faults.script.with_name(f"{faults.name}.json")
        saved.write_text(json.dumps(document | facts() | {"rows": rows}, indent=1) + "\n")
        pages.put(faults.page, faults.name, table(rows))


def told(script: Path, before: Path, *options: str) -> Any:
    """What a script of today says on the code of then; its options are followed by a folder to work in."""
    work = before.resolve() / "probes"
    work.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(before.resolve()), "LISTINGS": str(work)}
    environment["ACCEL_CACHE"] = str(work / "cache")
    program = [sys.executable, str(script.resolve()), *options, str(work)]
    done = subprocess.run(program, env=environment, cwd=before, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script.name} {' '.join(options)} failed on the code of then:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def check_out(commit: str, folder: Path) -> None:
    """A commit, importable as `accel` where its folder comes first.

    Raises:
        SystemExit: where the folder holds something else.
    """
    mark = folder / "commit.txt"
    if folder.exists():
        if not mark.is_file() or mark.read_text().strip() != commit:
            sys.exit(f"{folder} is no checkout of {commit}: name another folder, or delete it")
        return
    folder.mkdir(parents=True)
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "x", "-C", str(folder)], input=packed, check=True)
    for name, place in (("export", "export"), ("distill", "distill"), ("kernels", "kernels/ops")):
        if (folder / place).is_dir():
            (folder / "accel" / name).symlink_to(Path("..") / place)
    mark.write_text(f"{commit}\n")


def exported(work: Path, name: str, model: str, *options: str) -> Any:
    """A model as a bundle, exported by the code of then, once."""
    from accel.bundle import Bundle

    out = work / name
    if not out.exists():
        program = [sys.executable, "-c", "import sys; from accel.cli import main; sys.exit(main(sys.argv[1:]))"]
        subprocess.run([*program, "export", model, str(out), *options], check=True, stdout=sys.stderr)
    return Bundle.open(out)


def error(act: Callable[[], Any]) -> str:
    """The error of accel that an act ends in, and its fix."""
    from accel.errors import UserError

    try:
        act()
    except UserError as found:
        return f"{found.message} -> {found.fix}" if hasattr(found, "fix") else str(found)
    raise AssertionError("there is no error")


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| | fault | what the code before did | the test |", "|---|---|---|---|"]
    for row in rows:
        tests = ", ".join(f"`{test}`" for test in row["tests"])
        cells = row["before"].replace("|", "/").split(" -> ")  # a message and its fix
        before = " -> ".join(textwrap.shorten(cell, 200, placeholder=" ...") for cell in cells)
        lines.append(f"| {row['number']} | {row['fault']} | {before} | {tests} |")
    return "\n".join(lines)
