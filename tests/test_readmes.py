"""Every folder says in a few lines what it is, and nothing that it names has moved away."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"accel": "accel", "accel.export": "export", "accel.distill": "distill", "accel.kernels": "kernels/ops"}
ROOMS = sorted(
    {
        *("docker", "docs", "kernels", "tests", "tests/fakes"),
        *(
            init.parent.relative_to(ROOT).as_posix()
            for folder in ("accel", "export", "distill")
            for init in (ROOT / folder).rglob("__init__.py")
        ),
    }
)
FILE = re.compile(r"[\w./-]+\.(?:py|md|cpp|sh|toml|txt|yaml)|[\w./-]+/")
TO_COME = ("accel.json", "config.pbtxt", "tests/kernels/", "benchmarks/kernels/")  # what is made when there is need
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


def readme(folder: str) -> str:
    return (ROOT / folder / "README.md").read_text()


def mentioned(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@cache
def names_in(path: Path) -> dict[str, set[str]]:
    """The names that a module defines at its top, each with the names in it if it is a class."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = {inner.name for inner in getattr(node, "body", []) if isinstance(inner, ast.FunctionDef)}
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                found[target.id] = set()
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: set() for alias in node.names}
        if path.name == "__init__.py":  # names that are looked up when they are used
            found |= {leaf.value: set() for leaf in ast.walk(node) if isinstance(leaf, ast.Constant) and leaf.value}
    return found


def defines(start: Path, parts: list[str]) -> bool:
    """Whether a dotted name leads from a folder to a module, or to something that a module defines."""
    if not parts:
        return True
    first, *rest = parts
    if (start / first).is_dir():
        return defines(start / first, rest)
    module = start / f"{first}.py"
    if module.is_file():
        known, names = names_in(module), rest
    else:
        init = start / "__init__.py"
        known, names = names_in(init) if init.is_file() else {}, parts
    if not names:
        return True
    return names[0] in known and (len(names) == 1 or names[1] in known[names[0]])


def missing(folder: str, text: str) -> list[str]:
    """What a README mentions in backticks and is neither a file, nor a module, nor a name that a module defines."""
    here = ROOT / folder
    places = [here, *(parent for parent in here.parents if ROOT in (parent, *parent.parents))]
    wrong = []
    for word in mentioned(text):
        if word in TO_COME or any((place / word).exists() for place in places):
            continue
        if FILE.fullmatch(word):
            known = "/" not in word and any(here.rglob(word))
        elif DOTTED.fullmatch(word):
            package = next((p for p in sorted(PACKAGES, reverse=True) if f"{word}.".startswith(f"{p}.")), None)
            rest = word.removeprefix(package).split(".")[1:] if package else word.split(".")
            starts = [ROOT / PACKAGES[package]] if package else places
            modules = list(here.glob("*.py")) if not package else []
            known = any(defines(start, rest) for start in starts)
            known |= any(rest[0] in names_in(m) and rest[1] in names_in(m)[rest[0]] for m in modules if len(rest) == 2)
        else:
            continue
        if not known:
            wrong.append(word)
    return wrong


def test_what_is_not_there_is_found():
    text = "`nothing_here.py` `Bundle.opened` `accel.bundle.manifest.Bundles` `manifest.py` `Bundle.open` `accel.load`"
    assert missing("accel/bundle", text) == ["nothing_here.py", "Bundle.opened", "accel.bundle.manifest.Bundles"]
    assert "accel/trt" in ROOMS and "distill/edm" in ROOMS


@pytest.mark.parametrize("folder", ROOMS)
def test_every_folder_has_a_short_readme(folder):
    lines = readme(folder).splitlines()
    assert lines[0].startswith("# ") and 4 <= len(lines) <= 15
    assert "To add" in readme(folder) or folder == "distill/digits"  # that one is changed, not added to


@pytest.mark.parametrize("folder", [*ROOMS, "examples"])
def test_what_a_readme_mentions_exists(folder):
    assert missing(folder, readme(folder)) == []


def test_what_a_folder_may_import_lies_below_it():
    spec = importlib.util.spec_from_file_location("layers", ROOT / "tests" / "accel" / "test_layers.py")
    layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layers)
    checked = 0
    for root, floors in layers.FLOORS.items():
        rooms = {entry for floor in floors for entry in floor}
        for path in layers.FOLDER_OF[root].iterdir():
            if path.name not in rooms or path.name == "commands":  # the roof: everything lies below it
                continue
            (line,) = re.findall(r"^\* May import: (.*?\.)(?:\s|$)", (path / "README.md").read_text(), re.M | re.S)
            for word in set(mentioned(line)) & rooms:
                assert not layers.upward(f"{root}.{path.name}.x", f"{root}.{word}.x"), (path, word)
                checked += 1
    assert checked > 50
