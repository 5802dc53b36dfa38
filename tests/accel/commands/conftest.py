"""Bundles to break, and folders of an ordinary user."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def bundle_copy(smallest_bundle, tmp_path) -> Path:
    """A bundle that a test may break."""
    return Path(shutil.copytree(smallest_bundle, tmp_path / "bundle"))


@pytest.fixture
def contents():
    """Folder -> the bytes of every file in it."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    return read


@pytest.fixture
def user_folder():
    """A folder of an ordinary user, whom we are for a while: root may write everywhere."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    root = os.geteuid() == 0
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


@pytest.fixture
def drop_privileges():
    """Become an ordinary user; `user_folder` turns back."""

    def drop() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)

    return drop
