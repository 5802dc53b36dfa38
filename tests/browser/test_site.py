"""The documentation as a site: it builds without a warning, and what the hooks make of links is there."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("mkdocstrings", reason="needs the extra docs")
ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("hooks_of_the_docs", ROOT / "docs/site/hooks.py")
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site, built as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not re.search("WARNING|ERROR", done.stderr), done.stderr
    return out


def test_every_page_is_on_the_site_and_none_loads_anything_from_elsewhere(site):
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"README"}
    assert pages <= {page.stem for page in site.glob("*.html")}
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert loaded == [], page
        for target in re.findall(r'(?:src|href)="([^"#?]+)[^"]*"', page.read_text()):
            if not re.match(r"[a-z]+:|/", target):  # the page of 404 has links from the top
                assert (page.parent / target).exists(), (page, target)


def test_the_reference_has_every_verb_and_public_name(site):
    from accel.cli import VERBS

    verbs = (site / "reference/command-line.html").read_text()
    assert all(f"accel {verb}" in verbs for verb in VERBS) and verbs.count("usage:") == len(VERBS)
    names = (site / "reference/python.html").read_text()
    for name in ("load", "load_engine", "attach", "Bundle", "Pipeline", "export_pipeline"):
        assert re.search(rf'id="[\w.]+\.{name}"', names), name


def test_the_order_is_that_of_the_readme_and_no_page_is_left_out():
    listed = [page for entry in hooks.nav((ROOT / "docs/README.md").read_text()) for page in next(iter(entry.values()))]
    pages = [page for page in listed if (ROOT / "docs" / page).is_file()]
    assert {f"{page.name}" for page in (ROOT / "docs").glob("*.md")} - {"README.md"} == set(pages)
    assert list(hooks.nav("* A: [x](x.md), [y](y.md), [x](x.md)\n* Other words.\n"))[1] == {"A": ["x.md", "y.md"]}


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("[docs](docs/export.md#profiles)", "[docs](../export.md#profiles)"),
        ("[law](LICENSE)", "law (`LICENSE`)"),
        ("![a](docs/demo.png)", "![a](../demo.png)"),
        ("[change](CONTRIBUTING.md)", "[change](contributing.md)"),
        ("[out](https://example.org/a.md)", "[out](https://example.org/a.md)"),
        ("[all](docs/)", "[all](../README.md)"),
    ],
)
def test_links_lead_to_the_pages_of_the_site(text, made):
    assert hooks.linked(text, "README.md", "project/overview.md") == made


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", ["index", "tutorial", "reports", "results", "faq", "reference/command-line"])
def test_nothing_overlaps_or_is_cut_off(tab, broken, site, page, width):
    shown = tab((site / f"{page}.html").as_uri(), width)
    shown.evaluate("document.querySelectorAll('header, .md-sidebar, footer').forEach((one) => one.remove())")
    assert shown.evaluate(broken) == []
