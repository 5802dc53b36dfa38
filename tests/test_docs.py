"""What README and docs say is so: every command is one that accel takes, every program compiles, no figure is stale."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from accel.cli import verb

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/README.md",
]


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands(page: Path) -> list[str]:
    """The `accel ...` lines of a page's code blocks without the first word; so too `accelerate launch -m accel ...`."""
    lines = "\n".join(blocks(page, "", "sh", "bash", "console")).replace("\\\n", " ").splitlines()
    found = [re.match(r"(?:\$ |.* -m )?accel (.+)", line.strip()) for line in lines]
    return [match[1] for match in found if match]


COMMANDS = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)]


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 40 and {"README.md", "docs/export.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_a_command_of_a_page_is_one_that_accel_takes(page, command):
    name, *words = shlex.split(command, comments=True)
    _, parser = verb(name)
    parser.parse_args([word for word in words if word != "..."])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_compile_and_import_what_is_there(page):
    for program in blocks(page, "python"):
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("accel"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield lambda name: importlib.import_module(name)
    for name in (
        "pages",
        "readme_table",
        "whole_image",
        "aoti",
        "cold_start",
        "dmd2_plans",
        "earlier_commit",
        "gpu_counts",
        "gpu_traffic",
        "peers",
        "peers_worker",
        "peers_limits",
        "export_time",
        "folds",
        "growth",
        "random_pipeline",
        "runtimes",
        "single_graph",
        "family_matrix",
        "kernels",
        "loading",
        "lora_switch",
        "sd_tiny_int8",
        "serve_load",
        "vae_tiling",
    ):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("page", "marker", "module", "kept"),
    [
        ("docs/aoti.md", "aoti-sd-tiny", "aoti", "aoti-sd-tiny.json"),
        ("docs/gpu.md", "gpu-counts", "gpu_counts", "gpu-counts.json"),
        ("docs/performance.md", "peers", "peers", "peers.json"),
        ("docs/performance.md", "peers-cases", "peers.cases", "peers-cases.json"),
        ("docs/performance.md", "growth", "growth", "growth.json"),
        ("docs/performance.md", "export-time", "export_time", "export-time.json"),
        ("docs/performance.md", "folds", "folds", "folds.json"),
        ("docs/performance.md", "loading", "loading", "loading.json"),
        ("docs/runtimes.md", "runtimes", "runtimes", "runtimes.json"),
        ("docs/results.md", "whole-image", "whole_image", "whole-image.json"),
        ("docs/results.md", "results", "readme_table", None),
        ("docs/serving.md", "load", "serve_load", None),
        ("docs/single-graph.md", "single graph", "single_graph", None),
    ],
)
def test_a_table_is_what_its_script_makes_of_the_kept_result(benchmarks, page, marker, module, kept):
    name, _, function = module.partition(".")
    made = benchmarks(name)
    write = getattr(made, function or "table", None)
    expected = write(json.loads((ROOT / "benchmarks" / kept).read_text())) if kept else made.tables()
    assert benchmarks("pages").between(ROOT / page, marker) == expected


@pytest.mark.parametrize(
    ("page", "marker", "module", "kept"),
    [
        ("docs/aoti.md", "cold-start", "cold_start", "cold-start.json"),
        ("docs/dmd2.md", "dmd2-plans", "dmd2_plans", "dmd2-plans.json"),
        ("docs/gpu.md", "gpu-faults", "earlier_commit", "gpu-faults.json"),
        ("docs/tensorrt-rtx.md", "tensorrt-rtx-faults", "earlier_commit", "tensorrt-rtx-faults.json"),
    ],
)
def test_a_table_is_what_its_script_makes_of_the_kept_rows(benchmarks, page, marker, module, kept):
    rows = json.loads((ROOT / "benchmarks" / kept).read_text())["rows"]
    assert benchmarks("pages").between(ROOT / page, marker) == benchmarks(module).table(rows)


def test_the_readme_has_the_table_of_libraries_without_some_rows(benchmarks):
    kept = json.loads((ROOT / "benchmarks/peers.json").read_text())
    shown = benchmarks("pages").between(ROOT / "README.md", "peers")
    assert shown == benchmarks("peers").shorter(kept)
    assert set(shown.split("\n")) < set(benchmarks("peers").table(kept).split("\n"))


def test_the_table_of_lora_switches_is_what_its_script_makes(benchmarks):
    kept = json.loads((ROOT / "benchmarks/lora-switch.json").read_text())
    assert benchmarks("pages").between(ROOT / "docs/lora.md", "lora switch") == benchmarks("lora_switch").table(
        kept["models"]
    )


def test_the_table_of_vae_tiling_is_what_its_script_makes(benchmarks):
    kept = json.loads((ROOT / "benchmarks/vae-tiling.json").read_text())
    assert benchmarks("pages").between(ROOT / "docs/python.md", "vae tiling") == benchmarks("vae_tiling").table(
        kept["rows"]
    )


def test_the_tables_of_kernels_are_what_their_script_makes(benchmarks):
    kept = json.loads((ROOT / "benchmarks/kernels.json").read_text())
    assert benchmarks("pages").between(ROOT / "docs/kernels.md", "kernels") == benchmarks("kernels").tables(kept)


def test_the_family_table_is_what_its_script_makes(benchmarks, tmp_path):
    page = tmp_path / "family.md"
    page.write_text((ROOT / "docs/family.md").read_text())
    benchmarks("family_matrix").into_readme(page, json.loads((ROOT / "benchmarks/family-matrix.json").read_text()))
    assert page.read_text() == (ROOT / "docs/family.md").read_text()


def test_a_test_that_a_page_names_is_there():
    named = [entry for page in PAGES for entry in re.findall(r"`(tests/\S+\.py)::(test_\w+)`", page.read_text())]
    assert len(named) > 30
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), (path, name)


def test_the_readme_fits_its_limits():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 180
    tree = (ROOT / "README.md").read_text().partition("```\naccel/")[2].partition("```")[0]
    folders = {path.parent.name for path in (ROOT / "accel").glob("*/__init__.py")}
    assert all(f"  {folder}/" in tree for folder in folders)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", "\n".join(lines)):
        assert (ROOT / target).exists(), target
