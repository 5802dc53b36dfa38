"""What mkdocs needs to make a site of pages that are written for the code host.

The order of the pages is that of `docs/README.md`. README, changelog and the like lie outside `docs/` and become pages;
a link to another file of the repository becomes its name. The reference of the command line is what `--help` prints.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "project/overview.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "examples/README.md": "project/examples.md",
    "benchmarks/README.md": "project/benchmarks.md",
}
REFERENCE = ("reference/command-line.md", "reference/python.md")
# What a program writes to have them, and where the docstrings stand.
PUBLIC = {
    "import accel: accel.load, accel.load_engine, accel.Pipeline, accel.Output": (
        "accel.loading.loader.load",
        "accel.engines.select.load_engine",
        "accel.pipeline.pipeline.Pipeline",
        "accel.pipeline.output.Output",
    ),
    "accel.attach": ("accel.attaching.attached.attach", "accel.attaching.attached.Attached"),
    "accel.Bundle": ("accel.bundle.manifest.Bundle",),
    "from accel.export import export_pipeline": ("export.pipeline.export_pipeline",),
    "from accel.bench import measure": (
        "accel.bench.measure.measure",
        "accel.bench.work.BenchSettings",
        "accel.bench.document.Document",
    ),
    "accel.UserError": ("accel.errors.UserError", "accel.errors.MissingPackage", "accel.errors.Notice"),
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: Any) -> Any:
    os.environ["COLUMNS"] = "100"  # the width that argparse fills
    config.nav = list(nav((ROOT / "docs/README.md").read_text()))
    return config


def nav(readme: str) -> Iterator[dict[str, Any]]:
    """The pages by bullet of docs/README.md, in its order, and what is made here."""
    yield {"Docs": "README.md"}
    for bullet in re.split(r"^\* ", readme, flags=re.MULTILINE)[1:]:
        title, colon, _ = bullet.partition(":")
        pages = list(dict.fromkeys(re.findall(r"\]\(([\w-]+\.md)\)", bullet)))
        if colon and pages and title.isidentifier():
            yield {title: pages}
    yield {"Reference": list(REFERENCE)}
    yield {"Project": list(OUTSIDE.values())}


def on_files(files: Files, config: Any) -> Files:
    made = {OUTSIDE[name]: outside(name) for name in OUTSIDE}
    made |= dict(zip(REFERENCE, (command_line(), python()), strict=True))
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    files.append(File.generated(config, "assets/site.css", content=Path(__file__).with_name("site.css").read_text()))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """The links of a page in docs/, as they are on the site."""
    name = page.file.src_uri
    return text if name.startswith(("project/", "reference/")) else linked(text, f"docs/{name}", name)


def outside(name: str) -> str:
    """A page of the repository that lies outside docs/."""
    return linked((ROOT / name).read_text(), name, OUTSIDE[name])


def linked(text: str, source: str, page: str) -> str:
    """A Markdown text with its links as they are on the site.

    Args:
        source: where the text lies in the repository.
        page: where it lies on the site.
    """

    def new(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        here = os.path.normpath(os.path.join(os.path.dirname(source), path))
        there = OUTSIDE.get(here) or (here.removeprefix("docs/") if here.startswith("docs/") else None)
        if here == "docs":
            there = "README.md"
        if there is None:
            if not (ROOT / here).exists():
                return match[0]  # mkdocs says that it is not there
            return f"{words} (`{here}`)" if here not in words else words
        return f"{picture}[{words}]({os.path.relpath(there, os.path.dirname(page) or '.')}{hash_}{anchor})"

    return _LINK.sub(new, text)


def command_line() -> str:
    """What every verb prints for --help."""
    sys.path.insert(0, str(ROOT))
    from accel.commands.verbs import VERBS, verb

    parts = ["# Command line\n\nEvery verb with its options, as `accel VERB --help` prints them.\n"]
    for name, purpose in VERBS.items():
        parser = verb(name)[1]
        parts.append(f"## accel {name}\n\n{purpose[0].upper()}{purpose[1:]}.\n\n```text\n{parser.format_help()}```\n")
    return "\n".join(parts)


def python() -> str:
    """The public names with their docstrings."""
    parts = ["# Python\n\nWhat a program imports; `accel.load` and the others at the top of `accel` are these.\n"]
    for title, names in PUBLIC.items():
        parts.append(f"## `{title}`\n")
        parts += [f"::: {name}\n    options: {{heading_level: 3}}\n" for name in names]
    return "\n".join(parts)
