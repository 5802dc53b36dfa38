"""A small real bundle that a test may break, and its digests made to match again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from accel.assets import DIGITS

SHIPPED = DIGITS / "tiny-1step-int8"


def sealed(bundle: Path) -> Path:
    """The bundle with the sizes and digests of its files as they are now: an attacker makes them match too."""
    path = bundle / "accel.json"
    data = json.loads(path.read_text())
    for entry in data["files"]:
        if (file := bundle / entry).is_file() and not file.is_symlink():
            content = file.read_bytes()
            data["files"][entry] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    path.write_text(json.dumps(data))
    return bundle


@pytest.fixture
def bundle(tmp_path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "place" / "bundle"))


@pytest.fixture
def seal():
    return sealed
