"""What the programs in JavaScript run on: `make test` installs it where there is npm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def single_graph(tmp_path_factory) -> Path:
    """The shipped one-step int8 digits as one graph."""
    from accel.bundle import Bundle
    from accel.export.single_graph.export import write

    out = tmp_path_factory.mktemp("graph") / "digits"
    write(Bundle.open("digits/1step-int8"), out)
    return out


@pytest.fixture(scope="session")
def node() -> str:
    found = shutil.which("node")
    if found is None or not (EXAMPLES / "single_graph" / "node_modules").is_dir():
        pytest.skip("no Node.js, or not yet: npm install --ignore-scripts --prefix examples/single_graph")
    return found
