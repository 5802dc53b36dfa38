"""How well the tree shows the architecture, in figures that can be compared between commits.

    git worktree add /tmp/before 7a28eaa
    python benchmarks/tree_figures.py /tmp/before . > benchmarks/tree.json

A room is a folder or a loose module of a package; an arrow is an import from one room to another, wherever it stands.
Code lines are lines with code that are neither comment nor docstring. Compare after `ruff format`: it moves lines.
"""

from __future__ import annotations

import ast
import io
import json
import statistics
import sys
import tokenize
from pathlib import Path
from typing import Any

PACKAGES = {"accel": "accel", "export": "accel.export", "distill": "accel.distill"}
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def modules(root: Path) -> dict[str, Path]:
    """Modules by import name."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that one imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found & known.keys() - {name}


def code_lines(path: Path) -> int:
    source = path.read_text()
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in _LAYOUT for line in range(t.start[0], t.end[0] + 1)}
    return len(code - documented)


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves over others."""
    left = dict(arrows)
    while leaves := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in leaves:
            del left[name]
    while roots := [name for name in left if not any(name in targets for targets in left.values())]:
        for name in roots:
            del left[name]
    return sorted(left)


def figures(root: Path) -> dict[str, Any]:
    known = modules(root)
    arrows = {name: imports(name, path, known) for name, path in known.items() if path.name != "__init__.py"}
    sizes = [len(path.read_text().splitlines()) for path in known.values()]
    packages = {}
    for folder, package in PACKAGES.items():
        own = {name for name in known if name.startswith(f"{package}.")}
        own = {n for n in own if package != "accel" or not n.startswith(("accel.export", "accel.distill"))}
        room = {name: name.removeprefix(f"{package}.").partition(".")[0] for name in own}
        between = {(room[a], room[b]) for a in own & arrows.keys() for b in arrows[a] & own if room[a] != room[b]}
        packages[folder] = {
            "rooms": len(set(room.values())),
            "arrows": len(between),
            "loose_files": len([p for p in (root / folder).glob("*.py") if p.name != "__init__.py"]),
        }
    return {
        "packages": packages,
        "modules_in_circles": circles(arrows),
        "files": len(sizes),
        "lines": sum(sizes),
        "code_lines": sum(code_lines(path) for path in known.values()),
        "median_file": statistics.median(sizes),
        "largest_file": max(sizes),
    }


if __name__ == "__main__":
    print(json.dumps({root: figures(Path(root)) for root in sys.argv[1:]}, indent=2))
